"""The training loop: from a config and a folder to a trained, evaluated, resumable model."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten, settings
from revnet_jax.devices import memory_bytes, peak_memory_bytes
from revnet_jax.errors import Preempted, UserError, tell
from revnet_jax.models import num_params
from revnet_jax.models.task import Model, Task
from revnet_jax.runs import history
from revnet_jax.runs import workdir as workdirs
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.runs.metrics import DelayedFetch, MetricsWriter, Progress
from revnet_jax.runs.resume import PER_HOST, Change
from revnet_jax.runs.tracker import check_tracker, open_tracker
from revnet_jax.training.auto import found_for, largest_stored_layers
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.distributed import (
    Stop,
    check_agreement,
    is_first,
    smallest,
    value_of_first,
    wait_for_all,
)
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.initial import first_state
from revnet_jax.training.inputs import Data, build_data
from revnet_jax.training.mismatch import MismatchAlarm
from revnet_jax.training.program import StepProgram, step_program
from revnet_jax.training.sharding import on_mesh, put_batch
from revnet_jax.training.step import TrainState
from revnet_jax.training.trace import Trace


class NonFiniteError(UserError):
    """The loss or the gradient of a step is not finite."""


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Starts or resumes the run in `workdir`; returns the content of its summary.json.

    With several processes all of them train and save checkpoints together, but only process 0
    writes metrics and prints; the others return `{}`.

    Mistakes in config, data and folder are reported before anything is compiled. A run that is
    killed at any moment and started again ends with the same metrics.

    Raises:
      UserError: one clear line (ConfigError, DataError, CheckpointError, NonFiniteError or
        MismatchError).
      Preempted: the run was told to stop, and has saved a checkpoint.
    """
    started = time.monotonic()
    check_agreement({k: v for k, v in flatten(config).items() if k not in PER_HOST})
    # Before the data, which may take long to load: mistakes in the model are told in seconds.
    program = step_program(config, jax.devices())
    if is_first():
        # Only this process tracks, so only its host needs the tracker's package.
        check_tracker(config.tracker)
    data = build_data(config, program.mesh)
    with settings("data"), contextlib.closing(data.train(0)), contextlib.closing(data.test()):
        pass  # opening the iterators checks their arguments
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
    """Trains in a claimed folder. changes: settings that differ from those of the last start."""
    if config.model.stored_layers == -1:
        # Not earlier, because the number is kept in the folder, which is claimed by now.
        program = step_program(config, jax.devices(), resolve_auto(config, workdir))
    task, mesh = program.task.of_data(data.record), program.mesh
    sums = exact_jit(on_mesh(task.sums, mesh))
    with Stop() as stop, open_checkpoints(workdir, task) as checkpoints:
        restored = checkpoints.restore(program.state)
        start = restored[0] if restored else 0
        workdirs.check_can_go_on(workdir, config, start)
        summary = workdirs.finished_summary(workdir, start) if start == config.num_steps else None
        # Process 0 decides for all. A shared file system may show them the file at different times,
        # and those who went on to train would wait for the others for ever.
        if value_of_first(summary is not None):
            return summary if summary and is_first() else {}
        state, init_from = (
            (restored[1], None) if restored else first_state(config, program, data, checkpoints)
        )
        evaluated = start > 0 and checkpoints.evaluated(start)
        if is_first():
            history.record_start(workdir, config, start, changes, say, init_from, evaluated)
        evaluates = lambda step: step == config.num_steps or step % config.eval_every_steps == 0
        # A run that was stopped during an evaluation makes it first when it is resumed.
        owed = start > 0 and evaluates(start) and not evaluated
        seen = state.exact_mismatches
        with (
            contextlib.closing(data.train(start)) as batches,
            Recorder(workdir, config, task, start, seen=seen, owed=owed) as recorder,
            traced.from_step(start),
        ):
            for step in range(start if owed else start + 1, config.num_steps + 1):
                if step > start:
                    traced.before(step)
                    # Donates the old state: after a bad step only the checkpoint is left.
                    state, metrics = program.step(state, put_batch(next(batches), mesh))
                    traced.after(step, metrics)
                    recorder.training(step, metrics)
                # All processes evaluate this alike, so they ask `stop` equally often.
                if evaluates(step) or stop.requested() or step % config.checkpoint_every_steps == 0:
                    recorder.flush()  # raises if the loss is not finite, before the state is saved
                    scores = {}
                    if evaluates(step):
                        scores = _scores(step, recorder, data, sums, state, mesh, stop)
                    recorder.doing(step, "saving")
                    # Rows up to here are on disk: a run resumed from this save never writes them.
                    checkpoints.save(step, state, scores)
                    # A run that has made its last evaluation is finished, not preempted.
                    if stop.requested() and not (step == config.num_steps and scores):
                        # Files are written in the background, which a kill would end.
                        checkpoints.wait()
                        raise Preempted(step)
    return _summarized(workdir, task, state, recorder, started) if is_first() else {}


def _scores(step, recorder, data, sums, state, mesh, stop):
    """Evaluates a state and records what was found; returns it as the scores of a checkpoint."""
    parts = recorder.shown(step, data.test())
    means = evaluate(sums, state.for_evaluation, parts, mesh, stop.requested)
    return recorder.evaluation(step, means)


def _summarized(workdir, task, state, recorder, started):
    """Writes the summary of a finished run, and returns it."""
    speed = {f"{task.unit}_per_second": recorder.per_second}
    summary = summarize(workdir, task.network, state, speed, started)
    workdirs.write_json(workdir / "summary.json", summary)
    return summary


@contextlib.contextmanager
def claimed(
    workdir: Path, config: ConfigDict, data: Mapping[str, Any]
) -> Generator[dict[str, Change]]:
    """Claims `workdir` for this config, and locks it against other runs while the context is open.

    Process 0 writes config.json and holds the lock. The others check that they see the same folder
    and that it belongs to their config.

    Yields the settings that differ from those of the last start of the run.
    """
    with contextlib.ExitStack() as held:
        changes = {}
        if is_first():
            held.enter_context(workdirs.workdir_lock(workdir))
            changes = workdirs.claim(workdir, config, data)
        # After this barrier config.json is there, for all who see the same folder.
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
    """Prints a line to stderr, in process 0 only."""
    if is_first():
        tell(line)


def resolve_auto(config: ConfigDict, workdir: Path) -> int:
    """Returns the number that stored_layers=-1 stands for.

    It is found once and kept in auto.json, so that a resumed run uses the same number, unless the
    devices changed, or a setting that memory depends on.
    """
    path, conditions = workdir / "auto.json", found_for(config, jax.devices())
    known = value_of_first(workdirs.known_stored_layers(path, conditions))
    if known >= 0:
        return known
    # All processes must compile the same programs, because on GPUs they share the autotuning of
    # kernels. So they search with the same limit: the smallest of their devices' memories.
    limited = config.copy_and_resolve_references()
    if not limited.memory_limit_gib:
        limited.memory_limit_gib = smallest(memory_bytes(jax.local_devices()[0]) or 0) / 2**30
    stored_layers = largest_stored_layers(limited, jax.devices(), say)
    if is_first():
        workdirs.write_json(path, {"stored_layers": stored_layers, "found_for": conditions})
    return stored_layers


def open_checkpoints(
    workdir: Path, task: Task, *, read_only: bool = False, write_bytes: int | None = None
) -> Checkpoints:
    """Opens the checkpoints of a run, which keeps the newest two and the one of best score."""
    metric, mode = task.best
    return Checkpoints(
        workdir / "checkpoints",
        best_metric=metric,
        best_mode=mode,
        read_only=read_only,
        write_bytes=write_bytes,
    )


class Recorder:
    """Writes metrics and progress, one step late, and stops the run when a step goes wrong.

    It raises NonFiniteError if loss, gradient or variables are not finite. At the first step whose
    backward pass disagrees with its forward pass it warns or raises, by `config.on_mismatch`.
    Processes other than the first raise at the same step, but write nothing.

    Args:
      start: the step of the restored checkpoint, or 0.
      seen: mismatches up to that step.
      owed: whether that step is still to be evaluated. The run may have been killed after it wrote
        the row, before the checkpoint had the scores: the row is then written again.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        task: Task,
        start: int,
        *,
        seen: Any = 0.0,
        owed: bool = False,
    ):
        self._workdir = workdir
        self._num_steps, self._log_every = config.num_steps, config.log_every_steps
        self._fetch = DelayedFetch()
        self._task, self._unit, units = task, task.unit, task.units(config.batch_size)
        self._progress = Progress(config.num_steps, examples_per_step=units, unit=task.unit)
        self._rates: list[float] = []
        self._writer: MetricsWriter | None = None
        say = lambda line: None
        if is_first():
            say = self._progress.say
            # At step 0 (no checkpoint, or another run's weights) the file begins anew.
            self._writer = MetricsWriter(workdir, resume_step=start or None, owed=owed)
            tracker = open_tracker(config.tracker, workdir, flatten(config), start, say)
            if tracker:
                self._writer.add(tracker)
        self._alarm = MismatchAlarm(config.on_mismatch, float(seen), say)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.close()
        if self._writer:
            self._writer.close()

    def training(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step just dispatched, and records those of the step before."""
        self._record(self._fetch.exchange(step, metrics))

    def flush(self) -> None:
        """Waits for the device, and records the metrics still held so that they survive a crash."""
        self._record(self._fetch.flush())
        if self._writer:
            self._writer.sync()

    def shown(self, step: int, batches: Any) -> Iterator[Any]:
        """Yields the batches of an evaluation, shows each in the progress line, and closes them."""
        with contextlib.closing(batches):
            for number, batch in enumerate(batches, start=1):
                self.doing(step, f"evaluating, batch {number}")
                yield batch

    def doing(self, step: int, what: str) -> None:
        """Shows in the progress line what the run is busy with between steps."""
        if self._writer:
            self._progress.doing(step, what)

    def evaluation(self, step: int, means: Mapping[str, float] | None) -> dict[str, float]:
        """Records and returns the scores of an evaluation; `{}` if it was stopped (None)."""
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
        """The median speed over the intervals between logged steps; None before there are two."""
        # The median, because some intervals include an evaluation or a save.
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
            # At every step, logged or not, for the values are on the host anyway.
            self._check_finite(step, values, ("train_loss", "gradient_norm", "variables_norm"))
            if self._writer and (step % self._log_every == 0 or step == self._num_steps):
                rate = self._progress.update(
                    step, loss=values["train_loss"], learning_rate=values["learning_rate"]
                )
                self._rates += [] if rate is None else [rate]
                timings = {} if rate is None else {f"{self._unit}_per_second": rate}
                self._writer.write(step, values, timings=timings)
            self._alarm.check(step, values)  # after the row is written, which shows the mismatch


def summarize(
    workdir: Path,
    network: Model,
    state: TrainState,
    speed: Mapping[str, float | None],
    started: float,
) -> dict[str, Any]:
    """Returns the content of summary.json. Speed and time are of this start; null if unknown."""
    # From the file: a run that was killed after its last step has no values in memory.
    last = workdirs.values_at(workdir, int(state.step))
    device = jax.devices()[0]
    return {
        "steps": int(state.step),
        "train_loss": last.get("train_loss"),  # None if its rows were lost
        **{name: value for name, value in last.items() if name.startswith("eval_")},
        "exact_mismatches": int(state.exact_mismatches) if network.probes() else None,
        "stored_layers": sum(s.stored_layers for s in network.strategies.values()),
        "num_params": num_params(state.variables),
        **speed,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_seconds": time.monotonic() - started,
        "devices": f"{jax.device_count()} x {device.device_kind}",
    }
