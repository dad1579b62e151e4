"""Writers of metrics: the protocol, the file of rows, and a writer in a thread of its own.

The events of TensorBoard (`EventFile`) and trackers of experiments follow the same protocol.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from revnet_jax.errors import write_all, writing
from revnet_jax.files import write_atomically


class Writer(Protocol):
    """Takes the metrics of a run."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes some metrics of a step. A step may come twice: of training, then of evaluation."""
        ...

    def close(self) -> None:
        """Ends it. Called once, after the last `write`."""
        ...


class RowFile:
    """The file `metrics.jsonl`: a row `{"step": int, name: number, ...}` for each `write`.

    Args:
      path: in a folder that exists.
      resume_step: complete rows up to this step are kept, others removed; None keeps none.
      owed: whether the row of that step's evaluation is removed too.

    Raises StorageError if something cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int | None, owed: bool = False):
        self._path = path
        with writing(path):
            _trim(path, resume_step, owed)
            # Unbuffered: once `write` returns, the row survives a kill of the process.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - close() closes it

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row in one system call. What is not finite becomes "nan", "inf" or "-inf"."""
        row = {"step": step, **{name: _json_value(x) for name, x in values.items()}}
        with writing(self._path):
            # allow_nan=False would raise here rather than write NaN, which is not JSON.
            write_all(self._file, json.dumps(row, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Calls fsync, so that the rows survive a crash of the machine."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _json_value(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _trim(path: Path, resume_step: int | None, owed: bool) -> None:
    """Removes all but complete rows up to `resume_step`, atomically. Kept bytes do not change."""
    old = path.read_bytes() if path.exists() else b""
    kept = b""
    if resume_step is not None:
        lines = old.splitlines(keepends=True)
        # A row of training has this name, one of an evaluation has not.
        again = lambda line: owed and _step_of(line) == resume_step and b'"train_loss"' not in line
        kept = b"".join(x for x in lines if _step_of(x) <= resume_step and not again(x))
    if kept != old:
        write_atomically(path, kept)


def _step_of(line: bytes) -> float:
    """The step of a row, or infinity if the line is not a complete row."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    # OverflowError: a step of Infinity. RecursionError: deeply nested brackets.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


class BackgroundWriter:
    """Passes rows on to a writer in a thread, where it can neither stop nor delay the run.

    The writer is opened, called and closed in that thread. After its first error, or when it falls
    far behind, one line says so, and it gets no more rows.

    Args:
      name: of the writer, for that line.
      open_writer: returns the writer.
      say: takes that line; called from the thread that calls `write` and `close`.
      most_waiting: rows that may wait for the writer.
      patience_seconds: how long `close` waits for it.
    """

    def __init__(
        self,
        name: str,
        open_writer: Callable[[], Writer],
        say: Callable[[str], None],
        *,
        most_waiting: int = 10_000,
        patience_seconds: float = 20.0,
    ):
        self._name, self._say, self._patience_seconds = name, say, patience_seconds
        # Bounded, because the rows that wait for a tracker that hangs are in memory.
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(most_waiting)
        self._error = ""  # set by the thread, at its end
        self._given_up = False
        # A daemon, because a thread that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._pass_on, args=(open_writer,), daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands a row to the thread; returns at once."""
        # A copy, because other writers get the same dictionary.
        self._put((step, dict(values)))

    def close(self) -> None:
        """Waits for the rows that are left, but not for ever."""
        # Comes after all waiting rows, and ends the thread's loop.
        self._put(None)
        if self._given_up:
            return
        self._thread.join(self._patience_seconds)
        if self._error:
            self._give_up(self._error)
        elif self._thread.is_alive():
            self._give_up(f"it has not ended within {self._patience_seconds:g} seconds")

    def _put(self, row: tuple[int, Mapping[str, float]] | None) -> None:
        if self._given_up:
            return
        if self._error:
            return self._give_up(self._error)
        try:
            # Never waits: a full queue is the end of the tracker, not of the run.
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"it is {self._rows.maxsize:,} rows behind")

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self._say(f"warning: {self._name} gets no more metrics, and the run goes on: {why}")

    def _pass_on(self, open_writer: Callable[[], Writer]) -> None:
        try:
            writer = open_writer()
            try:
                while (row := self._rows.get()) is not None:
                    writer.write(*row)
            except BaseException:
                with contextlib.suppress(BaseException):  # the first error is the one to tell
                    writer.close()
                raise
            writer.close()
        except BaseException as error:  # SystemExit too, by which some packages give up
            what = " ".join(str(error).split())[:300]
            # A single assignment, so no lock: the other thread only reads it.
            self._error = f"{type(error).__name__}: {what}"
