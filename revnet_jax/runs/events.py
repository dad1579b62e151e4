"""TensorBoard's event files, written synchronously, so that a failed write raises at once."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

# These modules make their classes when imported, so a type checker does not find them.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from tensorboardX.proto.summary_pb2 import Summary  # ty: ignore[missing-module-member]
from tensorboardX.record_writer import masked_crc32c

from revnet_jax.errors import StorageError, write_all, writing


class EventFile:
    """One event file of scalars, in the folder of a run. Raises StorageError if a write fails.

    The writer of tensorboardX has a thread behind a queue. If that thread fails, such as on a full
    disk, the next call waits for it forever.

    Args:
      folder: created if missing. TensorBoard reads its files in the order of their names.
      purge_step: TensorBoard shows no points of this step or later from earlier files.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        now = time.time_ns()  # two starts within one second would otherwise share a file
        # TensorBoard takes every file with `tfevents` in its name. The seconds are padded, so that
        # the order of names is that of starts.
        host = f"{socket.gethostname()}.{os.getpid()}"
        self._path = folder / f"events.out.tfevents.{now // 10**9:010}.{now % 10**9:09}.{host}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a write that fails raises at once and not when a buffer is full.
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - close() closes it
        try:
            # TensorBoard expects this version as the first record of a file.
            self._write(Event(file_version="brain.Event:2"))
            # From version 2 on, START makes TensorBoard drop these points of earlier files.
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        except StorageError:
            self._file.close()
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def sync(self) -> None:
        """Calls fsync, so that the events survive a crash of the machine."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        """Appends a record of the TFRecord format: length, its checksum, content, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        # TFRecord masks its CRCs, because a CRC over data that contain plain CRCs is unreliable.
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        with writing(self._path):
            write_all(self._file, length + next(sums) + content + next(sums))
