"""Trackers of experiments, which get the metrics of a run beside its own files.

`config.tracker` is "wandb", "trackio", or MODULE:FUNCTION of the user's own.
"""

from __future__ import annotations

import importlib
import inspect
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from revnet_jax.config import ConfigError, references
from revnet_jax.errors import UserError
from revnet_jax.runs.workdir import read_json, write_json
from revnet_jax.runs.writer import BackgroundWriter, Writer

PROJECT = "revnet_jax"  # unless the environment names another


class TrackedRun(NamedTuple):
    """What a tracker may ask about a run; arguments of a user's own function, by these names.

    Attributes:
      workdir: its folder.
      settings: of its config, by dotted key.
      run_id: stays the same when the run is resumed.
      step: of the checkpoint that it starts from, or 0. Metrics of later steps may come again.
    """

    workdir: Path
    settings: Mapping[str, Any]
    run_id: str
    step: int


def check_tracker(name: str, *, imported: bool = True) -> None:
    """Imports the package or module of a tracker. Raises ConfigError if it cannot be used.

    imported: False to check the name of a package alone, which another machine may have.
    """
    if not name:
        return
    if references.is_reference(name):
        _check_signature(name, references.load_reference("tracker", name))
        return
    if name not in TRACKERS:
        raise ConfigError(
            f"config.tracker: got {name!r}, expected nothing, {', '.join(TRACKERS)}, or "
            "MODULE:FUNCTION of your own"
        )
    if not imported:
        return
    try:
        # Imported before anything is compiled: in the tracker's thread, a failure only warns.
        importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"config.tracker: got {name!r}, which cannot be imported ({error}), expected that "
            f"package: pip install {name}"
        ) from error


def _check_signature(name: str, function: Callable[..., Any]) -> None:
    kinds = inspect.Parameter
    for argument, parameter in inspect.signature(function).parameters.items():
        is_needed = parameter.default is kinds.empty
        # *args and **kwargs have no default either, but need no argument.
        is_needed &= parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        if is_needed and argument not in TrackedRun._fields:
            raise ConfigError(
                f"config.tracker: got {name} with a parameter {argument}, expected some of "
                f"{', '.join(TrackedRun._fields)}"
            )


def open_tracker(
    name: str,
    workdir: Path,
    settings: Mapping[str, Any],
    step: int,
    say: Callable[[str], None],
) -> Writer | None:
    """Opens the tracker of a run in the background; None if `name` is empty. Only for process 0.

    A tracker that cannot be opened is a line of `say`, and no error: see `BackgroundWriter`.

    Args:
      settings: of the config, by dotted key.
      step: of the checkpoint that the run starts from, or 0.

    Raises UserError if the run's id cannot be read from tracker.json, or written there.
    """
    if not name:
        return None
    # The id is made here, not in the thread, because a folder that cannot be written is an error.
    run = TrackedRun(workdir, settings, _run_id(workdir), step)
    open_writer = lambda: _of_reference(name, run) if ":" in name else TRACKERS[name](run)
    return BackgroundWriter(f"config.tracker {name}", open_writer, say)


def _run_id(workdir: Path) -> str:
    """The id of a run for trackers, the same at every start."""
    path = workdir / "tracker.json"
    if not path.exists():
        # Before its first use, so that a run killed at any moment goes on under the same id.
        write_json(path, {"run_id": uuid.uuid4().hex[:12]})
    found = read_json(path).get("run_id")
    if not isinstance(found, str):
        raise UserError(
            f"{path}: got no run_id, expected what the run wrote there; delete it, and the tracker "
            "begins a new run"
        )
    return found


def _of_reference(name: str, run: TrackedRun) -> Writer:
    writer = references.call_reference("tracker", name, {}, given={}, optional=run._asdict())
    references.check_members("tracker", name, writer, ("write", "close"), "a Writer")
    return writer


class _Logged:
    """A run object of wandb or trackio as a `Writer`."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(run: TrackedRun) -> Writer:
    return _Logged(
        importlib.import_module("wandb").init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            # With resume="allow", wandb goes on with the run of this id, or begins it.
            id=run.run_id,
            name=run.workdir.name,
            dir=str(run.workdir),
            config=dict(run.settings),
            resume="allow",
        )
    )


def _trackio(run: TrackedRun) -> Writer:
    return _Logged(
        importlib.import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.workdir.name}-{run.run_id}",  # a run is resumed by its name
            config=dict(run.settings),
            resume="allow",
        )
    )


TRACKERS: dict[str, Callable[[TrackedRun], Writer]] = {"wandb": _wandb, "trackio": _trackio}
