"""The folder of a run: whose it is, and what it tells about itself."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from revnet_jax import references
from revnet_jax.config import ConfigError, flatten
from revnet_jax.errors import UserError, writing
from revnet_jax.families import CONVOLUTIONAL, FAMILIES
from revnet_jax.training import data_record

# Hosts of one run have their own of these; all else they must agree on.
PER_HOST = ("data.dir", "data.verify_images", "data.num_threads", "data.prefetch")
# Neither where data lie and how fast they are read, nor on what and how closely a run is watched,
# changes what is computed; other devices add numbers up in another order, no more. A run that
# on_mismatch stopped may go on with a warning.
MAY_DIFFER = (
    *PER_HOST,
    "on_mismatch",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "profile.start_step",
    "profile.num_steps",
)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def claim(workdir: Path, config: ConfigDict, data: Mapping[str, Any] | None = None) -> None:
    """Makes `workdir` this config's: writes config.json, or checks that it holds the same run.

    data: what is to be recorded of the data.

    Raises ConfigError, and changes nothing, where the folder holds another config's run.
    """
    path = workdir / "config.json"
    if path.exists():
        _check_same(path, config, dict(data or {}))
    elif (workdir / "checkpoints").exists() or (workdir / "metrics.jsonl").exists():
        raise ConfigError(
            f"{workdir} holds a run but no config.json to compare with: choose another --workdir"
        )
    else:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--workdir {workdir} cannot be made: {error}") from error
        record = {
            "config": config.to_dict(),
            "data": dict(data or {}),
            "folders": references.folders_of(flatten(config)),
            "git_commit": _git_commit(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        write_json(path, record)


def check_fresh(workdir: Path, checkpoint_every_steps: int) -> None:
    """Raises ConfigError where metrics tell of checkpoints that are not there.

    Starting at step 0 would replace those metrics. A checkpoint is written while training goes on,
    and finished before the next one is begun: a run killed before that has none, and starts anew.
    """
    path = workdir / "metrics.jsonl"
    last_step = last_values(workdir).get("step", 0) if path.exists() else 0
    if last_step > 2 * checkpoint_every_steps:
        raise ConfigError(
            f"{path} goes to step {last_step}, but there is no checkpoint to go on from: bring "
            f"{workdir / 'checkpoints'} back, or choose another --workdir"
        )


def load_config(workdir: Path) -> ConfigDict:
    """The config that a run was started with. Raises ConfigError where there is none."""
    record = load_record(workdir)
    saved = record["config"]
    references.look_in(record.get("folders", ()), first=False)  # after PYTHONPATH
    if references.named_in(flatten(ConfigDict(saved))):
        return ConfigDict(_tuples(saved))
    config = FAMILIES.get(saved.get("model", {}).get("family"), CONVOLUTIONAL).settings()
    try:
        config.update(_tuples(saved))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{workdir / 'config.json'} is of another version: {error}") from error
    return config


def load_record(workdir: Path) -> dict[str, Any]:
    """What config.json holds, its config and data at least; ConfigError where it has none."""
    try:
        record = json.loads((workdir / "config.json").read_text())
        return {"data": {}, **record, "config": dict(record["config"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cannot read {workdir / 'config.json'} ({error}): expected the --workdir of a run"
        ) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a file atomically: a reader sees the old or the new one, whole."""
    partial = path.with_name(path.name + ".tmp")
    with writing(path):
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)


def read_json(path: Path, *numbers: str) -> dict[str, Any]:
    """What `write_json` wrote, with whole numbers of these names in it; UserError otherwise."""
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and all(type(found.get(name)) is int for name in numbers):
            return found
        problem = f"got {str(found)[:50]}"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise UserError(
        f"cannot read {path} ({problem}): expected what the run wrote there; delete it, and the "
        "same command writes it again"
    )


def last_values(workdir: Path) -> dict[str, Any]:
    """The last value of every metric in metrics.jsonl."""
    values: dict[str, Any] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # a killed run may leave half a row
            values |= json.loads(line)
    return values


def _check_same(path: Path, config: ConfigDict, data: dict[str, Any]) -> None:
    recorded = load_record(path.parent)["data"]
    if not data_record.is_same(data, recorded):
        raise ConfigError(
            f"{path.parent} holds a run on other data: got {data_record.summary(data)}, expected "
            f"{data_record.summary(recorded)}: files were added, removed, renamed or changed. "
            "Choose another --workdir, or bring the data of that run back to resume it"
        )
    expected = flatten(load_config(path.parent))
    got = _tuples(flatten(config))
    differing = [
        f"{key}={got.get(key)!r} (there: {expected.get(key)!r})"
        for key in sorted(got.keys() | expected.keys())
        if key not in MAY_DIFFER and got.get(key) != expected.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path.parent} holds a run of another config: got {', '.join(differing[:4])}"
            + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
            + "; choose another --workdir, or the config of that run to resume it"
        )


def _tuples(tree: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(value) for value in tree) if isinstance(tree, list) else tree


def _git_commit() -> str | None:
    """The commit this runs from, "-dirty" where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
