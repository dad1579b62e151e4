"""What a run reports: `metrics.jsonl`, TensorBoard events, a progress line, and peak memory.

`metrics.jsonl` holds only deterministic values, one JSON object per row, so that a run that was
killed and resumed writes the same file, byte for byte, as an uninterrupted run. Timings go to
TensorBoard, to a tracker, and to the progress line.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from revnet_jax.devices import peak_memory_bytes
from revnet_jax.errors import StorageError, writing
from revnet_jax.runs.writer import RowFile, Writer

Scalar = Any  # a Python number, or a numpy or JAX array of shape ()


class MetricsWriter:
    """Writes metrics to `workdir/metrics.jsonl`, `workdir/tensorboard` and others. For process 0.

    Each call of `write` writes one row `{"step": int, name: number, ...}` in one system call, so a
    SIGKILL loses at most the row being written. Floats read back exactly. A value that is not
    finite becomes the string "nan", "inf" or "-inf", which `float` can read.

    TensorBoard gets one event file per start, which hides the later steps of earlier files.

    Raises StorageError if something cannot be written, such as on a full disk.

    Args:
      workdir: a local directory, created if missing.
      resume_step: the step of the restored checkpoint. Rows up to it are kept, later and
        incomplete ones are removed. None starts an empty file.
      owed: whether the evaluation of that step is to be made (again): its row is removed too.
      tensorboard: whether to write events too.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None,
        owed: bool = False,
        tensorboard: bool = True,
    ):
        self.path = Path(workdir) / "metrics.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = RowFile(self.path, resume_step=resume_step, owed=owed)
        self._files: list[Any] = [self._rows]  # what is synced
        self._others: list[Writer] = []  # what gets timings, too
        if tensorboard:
            from revnet_jax.runs.events import EventFile  # late: notebooks need none

            folder = self.path.parent / "tensorboard"
            try:
                # Points of the checkpoint's own step stay visible, as its rows stay in the file.
                events = EventFile(folder, purge_step=(resume_step or 0) + 1)
            except StorageError:
                # `with` closes nothing if this constructor raises.
                self._rows.close()
                raise
            self._files.append(events)
            self._others.append(events)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def add(self, writer: Writer) -> None:
        """Adds a writer that gets what TensorBoard gets, and is closed with the files."""
        self._others.append(writer)

    def write(
        self,
        step: int,
        values: Mapping[str, Scalar],
        *,
        timings: Mapping[str, Scalar] | None = None,
    ) -> None:
        """Writes one row. `timings`, which differ from run to run, are not in metrics.jsonl."""
        numbers = {name: _python_number(value) for name, value in values.items()}
        # metrics.jsonl first: it is the record to rely on if one of the others fails.
        self._rows.write(int(step), numbers)
        scalars = {name: float(x) for name, x in {**numbers, **(timings or {})}.items()}
        for writer in self._others:
            writer.write(int(step), scalars)

    def sync(self) -> None:
        """Calls fsync, so that rows and events survive a crash of the machine."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for writer in (self._rows, *self._others):
            writer.close()


def _python_number(value: Scalar) -> int | float:
    number = np.asarray(value).item()  # float32 to float is exact
    return number if isinstance(number, int | float) else float(number)


class DelayedFetch:
    """Holds the metrics of a step on the device until a later step was dispatched.

    Reading the loss of a step at once would make the host wait for the device, and then the device
    wait for the host's next dispatch::

        state, metrics = train_step(state, batch)        # asynchronous: returns at once
        for step_logged, values in fetch.exchange(step, metrics if step % 50 == 0 else None):
            writer.write(step_logged, values)

    Call `flush` at the end, and before a checkpoint is saved: a run that is killed after saving
    resumes after this step, and would never write its row.
    """

    def __init__(self) -> None:
        self._held: tuple[int, Mapping[str, jax.Array]] | None = None

    def exchange(
        self, step: int, metrics: Mapping[str, jax.Array] | None = None
    ) -> list[tuple[int, dict[str, float]]]:
        """Holds the metrics of a step just dispatched, and returns those held before."""
        # Waits for the earlier step only, while the device works on the one just dispatched.
        before = self.flush()
        if metrics is not None:
            for value in metrics.values():
                # The copy starts when the step ends, so that a later `flush` finds the values on
                # the host.
                value.copy_to_host_async()
            self._held = (step, metrics)
        return before

    def flush(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for the device and returns the metrics held, as Python numbers; [] if none."""
        held, self._held = self._held, None
        if held is None:
            return []
        step, metrics = held
        return [(step, {name: _python_number(value) for name, value in metrics.items()})]


class Progress:
    """One line on stderr: step, loss, learning rate, speed, time left, memory.

    On a terminal the line is rewritten in place. Elsewhere plain lines are printed, at most one
    every `every_seconds`, and always the last. Speed is measured between calls of `update`, so the
    first call, which follows compilation, reports none.

    Args:
      examples_per_step: how many of `unit` ("examples", "tokens") a step processes.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        examples_per_step: int,
        unit: str = "examples",
        every_seconds: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps, self.examples_per_step = total_steps, examples_per_step
        self._unit = unit
        self._stream, self._clock = stream or sys.stderr, clock
        self._in_place = self._stream.isatty()
        default_seconds = 0.2 if self._in_place else 5.0
        self._every_seconds = default_seconds if every_seconds is None else every_seconds
        self._first: tuple[int, float] | None = None  # (step, seconds) of the first update
        self._previous: tuple[int, float] | None = None
        self._parts: list[str] = []  # of the last step's line, the most important first
        self._shown: list[str] = []
        self._shown_at, self._width = -math.inf, 0

    def update(self, step: int, *, loss: float, learning_rate: float) -> float | None:
        """Shows the figures of `step`; returns the speed since the last call, None if unknown."""
        now = self._clock()
        rate = None
        # Between two very short steps the clock may stand still.
        if self._previous is not None and now > self._previous[1] and step > self._previous[0]:
            rate = (step - self._previous[0]) * self.examples_per_step / (now - self._previous[1])
        self._first = self._first or (step, now)
        self._previous = (step, now)
        self._parts = self._describe(step, now, loss, learning_rate, rate)
        if now - self._shown_at >= self._every_seconds:
            self._show(self._parts)
        return rate

    def doing(self, step: int, what: str) -> None:
        """Shows in the line what the next step waits for: evaluating, saving."""
        if self._in_place or self._clock() - self._shown_at >= self._every_seconds:
            self._show([f"step {step}/{self.total_steps}", what, *self._parts[1:]])

    def say(self, line: str) -> None:
        """Prints a permanent line above the progress line."""
        erase = f"\r{' ' * self._width}\r" if self._in_place else ""
        self._put(f"{erase}{line}\n")
        self._width = 0

    def close(self) -> None:
        """Shows the line of the last step, if it is not shown yet, and ends it with a newline."""
        if self._shown != self._parts:
            self._show(self._parts)
        if self._in_place and self._width:
            self._put("\n")
            self._width = 0

    def _describe(
        self, step: int, now: float, loss: float, learning_rate: float, rate: float | None
    ) -> list[str]:
        parts = [f"step {step}/{self.total_steps}", f"loss {loss:.4f}", f"lr {learning_rate:.3g}"]
        if rate is not None:
            parts.append(f"{rate:,.0f} {self._unit}/s")
        first_step, first_time = self._first or (step, now)
        if step > first_step:
            # By the mean since the first update, which is steadier than the last interval.
            seconds = (now - first_time) / (step - first_step) * (self.total_steps - step)
            parts.append(f"{_duration(seconds)} left")
        return [*parts, _memory()]

    def _show(self, parts: list[str]) -> None:
        if self._in_place:
            columns = self._columns()
            line = _fitted(parts, columns)
            # Padded to the length of the line before, so that nothing of that is left.
            self._put(f"\r{line.ljust(min(self._width, columns))}")
            self._width = len(line)
        else:
            self._put("  ".join(parts) + "\n")
        self._shown, self._shown_at = parts, self._clock()

    def _columns(self) -> int:
        """The terminal's width less one, because some terminals wrap after the last column."""
        try:
            # Some pseudo-terminals report 0 columns.
            return (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
        except OSError:
            return 79

    def _put(self, text: str) -> None:
        # A closed terminal, or a full disk that holds the log, must not stop training.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def _fitted(parts: list[str], columns: int) -> str:
    """Joins as many parts, from the first, as fit into a line of `columns` characters."""
    # Two spaces stand between parts, and none after the last.
    ends = itertools.accumulate(len(part) + 2 for part in parts)
    fitting = sum(end - 2 <= columns for end in ends)
    return "  ".join(parts[: max(1, fitting)])[:columns]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _memory() -> str:
    device_bytes = peak_memory_bytes()
    if device_bytes is not None:
        return f"device {device_bytes / 2**30:.2f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return f"RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"
