"""A run: from a config and a folder to a trained, evaluated, resumable model."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten, settings
from revnet_jax.errors import Preempted, UserError
from revnet_jax.models import num_params
from revnet_jax.training import history
from revnet_jax.training import workdir as workdirs
from revnet_jax.training.auto import largest_stored_layers, memory_bytes, memory_settings
from revnet_jax.training.checkpoint import Checkpoints
from revnet_jax.training.compiler import jit
from revnet_jax.training.distributed import (
    Stop,
    check_agreement,
    is_first,
    of_first,
    smallest,
    wait_for_all,
)
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.initial import first_state
from revnet_jax.training.inputs import Data, build_data
from revnet_jax.training.metrics import DelayedFetch, MetricsWriter, Progress, peak_memory_bytes
from revnet_jax.training.mismatch import MismatchAlarm
from revnet_jax.training.program import StepProgram, step_program
from revnet_jax.training.resume import PER_HOST, Change
from revnet_jax.training.sharding import on_mesh, put_batch
from revnet_jax.training.step import TrainState
from revnet_jax.training.task import Model, Task
from revnet_jax.training.trace import Trace


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not finite."""


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains, or goes on with, the run in `workdir`; returns what its summary.json holds.

    Of several processes the first one alone writes and shows what the run tells; the others return
    nothing, `{}`. They train and save together.

    Everything that can be found wrong with config, data and folder is found before anything is
    compiled. A run killed at any moment and started again ends with the same metrics.

    Raises UserError (ConfigError, DataError, CheckpointError, NonFiniteError, MismatchError) with
    one clear line, and Preempted once it saved what it had when told to stop.
    """
    started = time.monotonic()
    check_agreement({k: v for k, v in flatten(config).items() if k not in PER_HOST})
    program = step_program(config, jax.devices())
    data = build_data(config, program.mesh)
    with settings("data"), contextlib.closing(data.train(0)), contextlib.closing(data.test()):
        pass  # their arguments are sound
    with settings("profile"):
        traced = Trace(workdir / "profile", **config.profile, last_step=config.num_steps)
    with claimed(workdir, config, data.record) as changes:
        return _train(config, workdir, program, data, traced, changes, started)


def _train(
    config: ConfigDict,
    workdir: Path,
    program: StepProgram,
    data: Data,
    traced: Trace,
    changes: Mapping[str, Change],
    started: float,
) -> dict[str, Any]:
    """The run, once its folder is claimed. changes: settings that were others before."""
    if config.model.stored_layers == "auto":
        program = step_program(config, jax.devices(), resolve_auto(config, workdir))
    task, mesh = program.task.of_data(data.record), program.mesh
    sums = jit(on_mesh(task.sums, mesh))
    with Stop() as stop, open_checkpoints(workdir, task) as checkpoints:
        restored = checkpoints.restore(program.state)
        start = restored[0] if restored else 0
        workdirs.check_can_go_on(workdir, config, start)
        summary = workdirs.finished_summary(workdir, start) if start == config.num_steps else None
        if of_first(summary is not None):
            return summary if summary and is_first() else {}
        state, init_from = (
            (restored[1], None) if restored else first_state(config, program, data, checkpoints)
        )
        evaluated = start > 0 and checkpoints.evaluated(start)
        if is_first():
            history.record_start(workdir, config, start, changes, say, init_from, evaluated)
        with (
            contextlib.closing(data.train(start)) as batches,
            Recorder(workdir, config, task, start, seen=state.exact_mismatches) as recorder,
            traced,
        ):
            evaluates = lambda step: step == config.num_steps or step % config.eval_every_steps == 0
            # Told to stop during an evaluation, a run makes it when it goes on.
            owed = start > 0 and evaluates(start) and not evaluated
            for step in range(start if owed else start + 1, config.num_steps + 1):
                if step > start:
                    traced.before(step)
                    state, metrics = program.step(state, put_batch(next(batches), mesh))
                    traced.after(step, metrics)
                    recorder.training(step, metrics)
                if evaluates(step) or stop.requested() or step % config.checkpoint_every_steps == 0:
                    recorder.flush()  # stops the run before anything that is wrong is saved
                    scores = {}
                    if evaluates(step):
                        parts = recorder.shown(step, data.test())
                        means = evaluate(sums, state.variables, parts, mesh, stop.requested)
                        scores = recorder.evaluation(step, means)
                    recorder.doing(step, "saving")
                    checkpoints.save(step, state, scores)
                    if stop.requested() and not (step == config.num_steps and scores):
                        checkpoints.wait()
                        raise Preempted(step)
    if not is_first():
        return {}
    speed = {f"{task.unit}_per_second": recorder.per_second}
    summary = summarize(workdir, task.network, state, speed, started)
    workdirs.write_json(workdir / "summary.json", summary)
    return summary


@contextlib.contextmanager
def claimed(
    workdir: Path, config: ConfigDict, data: Mapping[str, Any]
) -> Iterator[dict[str, Change]]:
    """Makes `workdir` this config's, and this run's alone while the context is open.

    The first process does, and holds the lock; the others check that the folder is theirs too.

    Gives the settings that are others than when the run was last started.
    """
    with contextlib.ExitStack() as held:
        changes = {}
        if is_first():
            held.enter_context(workdirs.locked(workdir))
            changes = workdirs.claim(workdir, config, data)
        wait_for_all("workdir claimed")
        if not is_first():
            if not (workdir / "config.json").exists():
                raise ConfigError(
                    f"--workdir {workdir}: got a folder without the config.json that the first "
                    "process wrote there, expected one that all processes share"
                )
            workdirs.check_same(workdir, config, data)
        yield changes


def say(line: str) -> None:
    """Shows a line, in the first process alone."""
    if is_first():
        print(line, file=sys.stderr, flush=True)


def resolve_auto(config: ConfigDict, workdir: Path) -> int:
    """The number that stored_layers=auto stands for.

    It is the same whenever this run is resumed, unless a setting changed that memory depends on.
    """
    path, found_for = workdir / "auto.json", memory_settings(config)
    known = of_first(workdirs.known_stored_layers(path, found_for))
    if known >= 0:
        return known
    # All compile the same programs for the same limit: on GPUs they share the search for kernels.
    limited = config.copy_and_resolve_references()
    if not limited.memory_limit_gib:
        limited.memory_limit_gib = smallest(memory_bytes(jax.local_devices()[0]) or 0) / 2**30
    stored_layers = largest_stored_layers(limited, jax.devices(), say)
    if is_first():
        workdirs.write_json(path, {"stored_layers": stored_layers, "found_for": found_for})
    return stored_layers


def open_checkpoints(workdir: Path, task: Task, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of a run: the newest two, and the one of best score, are kept."""
    metric, mode = task.best
    return Checkpoints(
        workdir / "checkpoints", best_metric=metric, best_mode=mode, read_only=read_only
    )


class Recorder:
    """Writes rows and progress, one step late, and stops the run at a step that is not finite.

    So it does, or warns, at the first step whose backward pass disagrees with its forward pass
    (`config.on_mismatch`). Processes other than the first stop too, and write nothing.

    seen: mismatches before the step `start`, which is restored.
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, task: Task, start: int, *, seen: Any = 0.0
    ):
        self._workdir = workdir
        self._num_steps, self._log_every = config.num_steps, config.log_every_steps
        self._fetch = DelayedFetch()
        self._writer = MetricsWriter(workdir, resume_step=start or None) if is_first() else None
        self._task, self._unit, units = task, task.unit, task.units(config.batch_size)
        self._progress = Progress(config.num_steps, examples_per_step=units, unit=task.unit)
        self._rates: list[float] = []
        say = self._progress.say if is_first() else lambda line: None
        self._alarm = MismatchAlarm(config.on_mismatch, float(seen), say)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.close()
        if self._writer:
            self._writer.close()

    def training(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched; records those of the step before."""
        self._record(self._fetch.exchange(step, metrics))

    def flush(self) -> None:
        """Records the metrics still held, for good; waits for the device."""
        self._record(self._fetch.flush())
        if self._writer:
            self._writer.sync()

    def shown(self, step: int, batches: Any) -> Iterator[Any]:
        """The batches of an evaluation, each shown in the progress line; closes them."""
        with contextlib.closing(batches):
            for number, batch in enumerate(batches, start=1):
                self.doing(step, f"evaluating, batch {number}")
                yield batch

    def doing(self, step: int, what: str) -> None:
        """Shows what the next step waits for."""
        if self._writer:
            self._progress.doing(step, what)

    def evaluation(self, step: int, means: Mapping[str, float] | None) -> dict[str, float]:
        """Records the scores of an evaluation and returns them; none of one that was stopped."""
        if means is None:
            return {}
        scores = self._task.scores(means)
        self._check_finite(step, scores, scores)
        if self._writer:
            self._writer.write(step, scores)
            self._writer.sync()
        return scores

    @property
    def per_second(self) -> float | None:
        """The speed, median over the intervals between logged steps; None before there are two."""
        return statistics.median(self._rates) if self._rates else None

    def _check_finite(self, step: int, values: Mapping[str, float], names: Iterable[str]) -> None:
        for name in names:
            if not math.isfinite(values[name]):
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {step}, expected a finite number. The last "
                    f"good checkpoint, if any, is in {self._workdir / 'checkpoints'}. Lower the "
                    "learning rate or warm it up (config.schedule), in another --workdir"
                )

    def _record(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        for step, values in rows:
            self._check_finite(step, values, ("train_loss", "gradient_norm", "variables_norm"))
            if self._writer and (step % self._log_every == 0 or step == self._num_steps):
                rate = self._progress.update(
                    step, loss=values["train_loss"], learning_rate=values["learning_rate"]
                )
                self._rates += [] if rate is None else [rate]
                timings = {} if rate is None else {f"{self._unit}_per_second": rate}
                self._writer.write(step, values, timings=timings)
            self._alarm.check(step, values)  # after the row, which shows what was wrong


def summarize(
    workdir: Path,
    network: Model,
    state: TrainState,
    speed: Mapping[str, float | None],
    started: float,
) -> dict[str, Any]:
    """What summary.json holds. Speed and time are of this process, and null where unknown."""
    last = workdirs.last_values(workdir)
    device = jax.devices()[0]
    return {
        "steps": int(state.step),
        "train_loss": last.get("train_loss"),  # None where its rows were lost
        **{name: value for name, value in last.items() if name.startswith("eval_")},
        "exact_mismatches": int(state.exact_mismatches) if network.probes() else None,
        "stored_layers": sum(s.stored_layers for s in network.strategies.values()),
        "num_params": num_params(state.variables),
        **speed,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_seconds": time.monotonic() - started,
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }
