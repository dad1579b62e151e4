"""The history of a run: its starts, settings that changed between them, and lost metrics rows.

`starts.jsonl` has a row for each start of the run. `config.json` has the current settings and,
under "changes", the earlier values with the step at which they changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from revnet_jax.errors import write_all, writing
from revnet_jax.runs.provenance import describe_start
from revnet_jax.runs.resume import Change
from revnet_jax.runs.workdir import load_config, load_record, read_rows, write_json


def record_start(
    workdir: Path,
    config: ConfigDict,
    step: int,
    changes: Mapping[str, Change],
    say: Callable[[str], None],
    init_from: Mapping[str, Any] | None = None,
    evaluated: bool = True,
) -> None:
    """Records that the run in `workdir` starts or resumes at `step`. Only for process 0.

    Args:
      changes: settings that differ from those of the last start.
      say: takes a line that says what changed, and one for missing rows of metrics.jsonl.
      init_from: the run whose weights a new run starts with.
      evaluated: False if an evaluation of this step, if one is due, has not been made yet.

    A summary.json from an earlier, shorter end of the run is removed; the run writes a new one.
    """
    record = load_record(workdir)
    # Steps after this one are run again, with the current settings.
    history = [{**entry, "step": min(entry["step"], step)} for entry in record["changes"]]
    updated = {**record, "changes": history}
    # config.json still has the last start's intervals, at which the rows were due.
    lost = lost_rows(workdir, updated, load_config(workdir), step, evaluated)
    if lost:
        say(
            f"{workdir / 'metrics.jsonl'}: {lost['rows']} rows of steps {lost['first_step']} to "
            f"{lost['last_step']} are missing, though a checkpoint of step {step} is there. The "
            "run goes on without them; config.json records it"
        )
        updated["lost_rows"] = [*record["lost_rows"], {"found_at_step": step, **lost}]
    if changes:
        settings = {key: change._asdict() for key, change in changes.items()}
        updated["changes"] = [*history, {"step": step, "settings": settings}]
        told = ", ".join(f"{key}={c.now} (was {c.was})" for key, c in changes.items())
        say(f"resumed at step {step} with {told}")
    if init_from:
        updated["init_from"] = dict(init_from)
    updated["config"] = config.to_dict()
    if json.dumps(updated) != json.dumps(record):
        write_json(workdir / "config.json", updated)
    # A summary says that the run has ended, so it goes before the first new step.
    with writing(workdir / "summary.json"):
        (workdir / "summary.json").unlink(missing_ok=True)
    append_row(workdir / "starts.jsonl", {"step": step, **describe_start()})


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends a line of JSON in one write, and ends a line before it that a full disk has cut."""
    with writing(path), open(path, "a+b", buffering=0) as file:
        if end := file.tell():
            file.seek(end - 1)
        is_cut = end and file.read(1) != b"\n"
        write_all(file, b"\n" * bool(is_cut) + json.dumps(row).encode() + b"\n")


def lost_rows(
    workdir: Path, record: Mapping[str, Any], config: ConfigDict, step: int, evaluated: bool = True
) -> dict[str, int] | None:
    """The rows up to `step` that are missing in metrics.jsonl; None if there are none.

    Rows are due at the intervals of `config` or, before a change of these, at the earlier ones in
    the "changes" of `record`. Rows in its "lost_rows" are known already, and not reported again.
    """
    rows = read_rows(workdir)
    # Rows of training steps have a train_loss, those of evaluations have none.
    logged = {row["step"] for row in rows if "train_loss" in row}
    scored = {row["step"] for row in rows if "train_loss" not in row}
    # An evaluation that is still to be made is not lost.
    scored |= set() if evaluated else {step}
    known = [range(x["first_step"], x["last_step"] + 1) for x in record["lost_rows"]]
    missing = [
        due
        for key, there in (("log_every_steps", logged), ("eval_every_steps", scored))
        for due in _due(key, record, config, step)
        if due not in there and not any(due in steps for steps in known)
    ]
    if not missing:
        return None
    return {"rows": len(missing), "first_step": min(missing), "last_step": max(missing)}


def _due(key: str, record: Mapping[str, Any], config: ConfigDict, step: int) -> Iterator[int]:
    """The steps up to `step` at which a row is due, by the interval `key` as it was at the time."""
    intervals = [
        (entry["step"], entry["settings"][key]["was"])
        for entry in record["changes"]
        if key in entry["settings"]
    ]
    # Each interval holds up to the step of its change, and the current one up to `step`.
    start = 0
    for end, every in [*intervals, (step, config[key])]:
        if not isinstance(every, int) or every < 1:  # the file was edited by hand
            continue
        # The multiples of `every` after `start`, up to `end`.
        yield from range(start // every * every + every, min(end, step) + 1, every)
        start = end
