"""The folder of a run: claiming it for a config, and reading and writing its files."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from revnet_jax.config import (
    ConfigError,
    experiment,
    flatten,
    image_classification,
    language_model,
    references,
)
from revnet_jax.config.saved import todays
from revnet_jax.errors import UserError, writing
from revnet_jax.families import CONVOLUTIONAL, FAMILIES
from revnet_jax.files import write_atomically
from revnet_jax.runs import data_record, lock
from revnet_jax.runs.provenance import git_commit, versions
from revnet_jax.runs.resume import Change, changed_settings, check_decay


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Generator[None]:
    """Locks `workdir`, created if missing, against other runs while the context is open.

    Raises ConfigError for a folder that cannot be made, or not hold checkpoints.
    """
    # Orbax finds its own files by a pattern that contains the path. With these characters it finds
    # none, and writes checkpoints that cannot be read.
    if found := re.search(r"\[[^]]+\]|\\", str(workdir.resolve())):
        raise ConfigError(
            f"--workdir {workdir}: got {found[0]!r} in the folder's path, expected a path without "
            "brackets and backslashes: checkpoints cannot be written there"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--workdir {workdir} cannot be made: {error}; choose another --workdir"
        ) from error
    with lock.file_lock(workdir / "lock"):
        # Left by processes that were killed in `write_atomically`.
        for partial in workdir.glob("*.json*.[0-9]*.tmp"):
            if partial.is_file():
                with writing(partial):
                    partial.unlink(missing_ok=True)
        yield


def claim(workdir: Path, config: ConfigDict, data: Mapping[str, Any]) -> dict[str, Change]:
    """Claims `workdir` for a config: writes config.json, or checks that it holds the same run.

    Args:
      data: the record of the data, for config.json.

    Returns the settings that changed, like `check_same`.

    Raises ConfigError, and changes nothing, if the folder holds a run of another config, or a
    config.json that is not a run's.
    """
    path = workdir / "config.json"
    checkpoints, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    # A run writes config.json before anything else, so somebody has removed it.
    if not path.exists() and (checkpoints.exists() or metrics.exists()):
        raise ConfigError(
            f"{workdir} holds a run but no config.json to compare with: bring it back, or "
            f"choose another --workdir, where --config.init_from={workdir} starts from its weights"
        )
    # A run that failed before its first step, out of memory perhaps, may get any new config.
    has_steps = checkpoints.exists() and any(checkpoints.iterdir())
    if has_steps or (metrics.exists() and metrics.stat().st_size):
        return check_same(workdir, config, data)
    record = {
        "config": config.to_dict(),
        "data": dict(data),
        "folders": references.folders_of(flatten(config)),
        "git_commit": git_commit(),
        "versions": versions(),
    }
    if path.exists() and todays(load_record(workdir)["config"]) != todays(record["config"]):
        for name in ("auto.json", "tracker.json"):  # what was found for the config before
            with writing(workdir / name):
                (workdir / name).unlink(missing_ok=True)
    write_json(path, record)
    return {}


def check_same(workdir: Path, config: ConfigDict, data: Mapping[str, Any]) -> dict[str, Change]:
    """Returns the settings that differ from those of the run in `workdir`.

    Raises ConfigError if the folder holds a run on other data, or if a setting differs that must
    not change when a run is resumed.
    """
    recorded = load_record(workdir)["data"]
    if not data_record.is_same(data, recorded):
        raise ConfigError(
            f"{workdir} holds a run on other data: got {data_record.summary(data)}, expected "
            f"{data_record.summary(recorded)}: files were added, removed, renamed or changed. "
            "Choose another --workdir, or bring the data of that run back to resume it"
        )
    # As it will be read back: JSON has no tuples, and a user's own config may have lists.
    now = ConfigDict(todays(config.to_dict()))
    return changed_settings(now, load_config(workdir, compared_with=now), workdir)


def check_can_go_on(workdir: Path, config: ConfigDict, step: int) -> None:
    """Raises ConfigError if the run in `workdir` cannot resume from its checkpoint of `step`.

    Args:
      step: 0 if there is no checkpoint. A run that has metrics up to a late step has then lost its
        checkpoints, and starting again would overwrite its metrics. A run that was killed before
        its first checkpoint may start again. As a checkpoint is written in the background, and
        finished before the next one begins, metrics may reach twice the interval between
        checkpoints.
    """
    if step > config.num_steps:
        raise ConfigError(
            f"config.num_steps: got {config.num_steps}, expected {step} or more: {workdir} has a "
            f"checkpoint of step {step}"
        )
    before = load_config(workdir)
    check_decay(config, before, step, workdir)
    # The metrics may have been written under either interval.
    every_steps = max(config.checkpoint_every_steps, before.checkpoint_every_steps)
    last_step = max((row["step"] for row in read_rows(workdir)), default=0)
    if step == 0 and last_step > 2 * every_steps:
        raise ConfigError(
            f"{workdir / 'metrics.jsonl'} goes to step {last_step}, but there is no checkpoint to "
            f"go on from: bring {workdir / 'checkpoints'} back, or choose another --workdir"
        )


def finished_summary(workdir: Path, num_steps: int) -> dict[str, Any] | None:
    """The content of summary.json if it exists and has `num_steps` steps; else None."""
    path = workdir / "summary.json"
    summary = read_json(path, "steps") if path.exists() else None
    return summary if summary and summary["steps"] == num_steps else None


def known_stored_layers(path: Path, found_for: Mapping[str, Any]) -> int:
    """The number in auto.json, if it was found for these settings and devices; else -1."""
    found = read_json(path, "stored_layers") if path.exists() else {}
    return found["stored_layers"] if found.get("found_for") == found_for else -1


def load_config(workdir: Path, *, compared_with: ConfigDict | None = None) -> ConfigDict:
    """The config that a run was last started with, with the settings that are newer than the run.

    Args:
      compared_with: a config of one's own may lack settings of the package. It then lacks them here
        too.

    Raises ConfigError if it cannot be read.
    """
    record = load_record(workdir)
    saved = todays(record["config"])
    references.look_in(record["folders"], first=False)  # after PYTHONPATH
    # Only the user's config file has the defaults of a model or data of one's own.
    if references.named_in(flatten(ConfigDict(saved))):
        return _with_newer_settings(ConfigDict(saved), compared_with)
    # Today's settings and defaults first, for those that are newer than the run. The update then
    # refuses a key or a type that they do not have.
    config = FAMILIES.get(saved.get("model", {}).get("family"), CONVOLUTIONAL).settings()
    defaults, path = flatten(config), workdir / "config.json"
    try:
        config.update(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged, or of another version: {what}") from error
    for key, value in flatten(config).items():
        if value is None and defaults.get(key) is not None:  # ConfigDict allows None
            raise ConfigError(f"{path} is damaged: got {key}=null, expected a value")
    return config


def _with_newer_settings(config: ConfigDict, compared_with: ConfigDict | None) -> ConfigDict:
    """Adds to a config of one's own the settings that the package has now, where they are missing.

    They are newer than the run, and their defaults are what it did before there was a choice.
    """
    known = flatten(config)
    is_ours = "model.family" in known and known["model.family"] in FAMILIES
    if is_ours:
        defaults = flatten(FAMILIES[known["model.family"]].settings())
    else:
        defaults = flatten(experiment()) | _data_defaults(known)
    missing = defaults.keys() - known.keys()
    if compared_with is not None:
        missing &= flatten(compared_with).keys()
    newer = {key: value for key, value in defaults.items() if key in missing}
    # A config is locked against new keys.
    with config.unlocked():
        config.update_from_flattened_dict(newer)
    return config


# What data sets of the package, and a user's `Dataset` or `Text`, have always needed.
_IMAGES = ("image_shape", "num_classes", "crop_padding", "flip", "min_crop_area")
_TEXT = ("vocab_size", "context", "eval_batches")


def _data_defaults(known: Mapping[str, Any]) -> dict[str, Any]:
    """The data section of the package that a model of one's own was trained with, by dotted key.

    Empty with data that have no such section, a `Source`: its settings are its own.
    """
    for settings, needed in ((image_classification(), _IMAGES), (language_model(), _TEXT)):
        if all(f"data.{name}" in known for name in needed):
            return {f"data.{name}": value for name, value in settings.data.items()}
    return {}


def load_record(workdir: Path) -> dict[str, Any]:
    """The content of config.json: at least its config, data, folders, changes and lost rows.

    Raises ConfigError if the file is missing or its structure is wrong.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text())
        problem = _problem(record)
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"cannot read {path} ({problem}): expected the --workdir of a run")
    return {"data": {}, "folders": [], "changes": [], "lost_rows": [], **record}


def _problem(record: Any) -> str:
    """Says what is wrong with the structure of a record; "" if nothing is."""
    if not isinstance(record, dict):
        return f"it holds {str(record)[:50]}"
    settings, data = record.get("config"), record.get("data", {})
    model = settings.get("model", {}) if isinstance(settings, dict) else None
    if not isinstance(model, dict):
        return "it holds no config"
    if not isinstance(model.get("family", ""), str):
        return "it names no model.family"
    if not isinstance(data, dict) or not isinstance(data.get("vocabulary", {}), dict):
        return "its data are no record of data"
    folders = record.get("folders", [])
    if not isinstance(folders, list) or not all(isinstance(f, str) for f in folders):
        return "its folders are not a list of folders"
    for name, numbers in (("changes", ("step",)), ("lost_rows", ("first_step", "last_step"))):
        entries = record.get(name, [])
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(n), int) for n in numbers)
            for entry in entries
        ):
            return f"its {name} are not a list of {name}"
    if not all(_is_change(entry.get("settings")) for entry in record.get("changes", [])):
        return "its changes name no settings"
    return ""


def _is_change(settings: Any) -> bool:
    return isinstance(settings, dict) and all(
        isinstance(change, dict) and {"was", "now"} <= change.keys() for change in settings.values()
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file atomically. Raises StorageError if it cannot be written."""
    with writing(path):
        write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, *numbers: str) -> dict[str, Any]:
    """Reads what `write_json` wrote. Raises UserError unless `numbers` name counts in it."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and all(_is_count(found.get(name)) for name in numbers):
            return found
        problem = f"got {str(found)[:50]}"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise UserError(
        f"cannot read {path} ({problem}): expected what the run wrote there; delete it, and the "
        "same command writes it again"
    )


def _is_count(value: Any) -> bool:
    # Not isinstance, for which true and false are integers. Processes exchange them in 32 bits.
    return type(value) is int and 0 <= value < 2**31


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without damaged lines and lines that a killed process cut off."""
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error}; bring it back, or choose another --workdir"
        ) from error
    return [row for line in lines if (row := _row(line)) is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        # The parser runs out of stack (RecursionError) on a damaged line of many brackets.
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def values_at(workdir: Path, step: int) -> dict[str, Any]:
    """The values of every metric in metrics.jsonl at this step."""
    values: dict[str, Any] = {}
    for row in read_rows(workdir):
        # Training and evaluation write rows of their own.
        if row.get("step") == step:
            values |= row
    return values
