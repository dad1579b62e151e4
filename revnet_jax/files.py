"""Writes files so that no reader and no crash ever sees a part of one."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def write_atomically(path: Any, content: str | bytes) -> None:
    """Replaces a file: whoever reads it finds the whole old file or the whole new one.

    Args:
      path: a `pathlib.Path`, or an `epath.Path` of remote storage.

    Raises OSError (see `revnet_jax.errors.writing`), or what remote storage raises.
    """
    # The name has the process id, because two processes may write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            # Remote storage has no file descriptor to sync.
            if "://" not in str(path):
                file.flush()
                os.fsync(file.fileno())  # or a crash may leave an empty file of the new name
        # Within one folder a rename is atomic.
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            partial.unlink()
        raise
