"""A lock file, so that only one run at a time uses a folder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

from revnet_jax.config import ConfigError
from revnet_jax.errors import tell


@contextlib.contextmanager
def file_lock(path: Path, say: Callable[[str], None] = tell) -> Generator[None]:
    """Holds the lock file `path`, created if missing, while the context is open.

    It uses `flock`, which the kernel releases when the process ends, even if it is killed, so there
    is nothing to clean up. The file names the holder, for the error message of other processes. At
    the end it is emptied but not deleted, so that all processes lock the same file.

    Some file systems have no `flock` (NFS without its lock daemon), and some apply it within one
    host only (gcsfuse and most of FUSE). Then the name in the file decides. On the same host, a
    process that is still running keeps the lock. Whether a process on another host is still running
    cannot be known, and the run may have been moved here; so one line names that process, and this
    run goes on.

    Raises ConfigError, in one line that names host and process, if another process holds the lock.
    """
    try:
        # a+ creates the file if need be and does not empty it: the holder's name is read below.
        file = open(path, "a+")  # noqa: SIM115 - closed below, outside this `try`
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; choose a --workdir of your own"
        ) from error
    with file:
        # Locked before it is read, so that nobody else writes a name in between.
        has_flock = _flock(file, path)
        holder = _read(file)
        # With flock, a name from this host is that of a killed process. flock may not reach other
        # hosts, and may be missing: then the name is all there is to go by.
        if holder and holder["host"] != socket.gethostname():
            say(
                f"{path.parent} was last used by {_describe(holder)}, which did not say that it "
                "ended. This run goes on; if that one is still running, stop one of them: two "
                "runs in one folder spoil each other"
            )
        elif holder and not has_flock and _is_running(holder):
            raise ConfigError(f"{_in_use(path, holder)}, or delete {path} if no run goes on there")
        _write(file, path, json.dumps(_me()))
        try:
            yield
        finally:
            # Emptied while the lock is still held. An error here must not hide the run's own.
            with contextlib.suppress(ConfigError):
                _write(file, path, "")


def _flock(file: TextIO, path: Path) -> bool:
    """Locks the file; returns False if the file system cannot."""
    try:
        # LOCK_NB refuses at once. Waiting could last as long as the other run.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_in_use(path, _read(file))) from None
    except OSError:
        # The file system has no locks, like NFS without its lock daemon (ENOLCK).
        return False
    return True


def _in_use(path: Path, holder: dict[str, Any] | None) -> str:
    who = _describe(holder) if holder else "another process"
    return (
        f"{path.parent} is in use by {who}: got a second run in it, expected one. Wait for that "
        "one, stop it, or choose another --workdir"
    )


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process_id": os.getpid(),
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "start_ticks": _start_ticks(os.getpid()),
    }


def _describe(holder: dict[str, Any]) -> str:
    return "process {process_id} on host {host}, started at {started_at}".format(**holder)


def _read(file: TextIO) -> dict[str, Any] | None:
    """The holder that the file names; None if it is empty or incomplete."""
    try:
        file.seek(0)
        holder = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    # A file that was cut off by a full disk, or edited by hand, names nobody.
    if not isinstance(holder, dict) or not _me().keys() <= holder.keys():
        return None
    return holder if isinstance(holder["process_id"], int) else None


def _write(file: TextIO, path: Path, text: str) -> None:
    try:
        # In append mode text goes to the end of the file, which this makes its start.
        file.truncate(0)
        file.write(text)
        file.flush()
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; make room, or another --workdir"
        ) from error


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote its name, on this host, is still running."""
    try:
        # Signal 0 is not delivered. It only asks whether the process exists.
        os.kill(holder["process_id"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is running, and belongs to another user
    # Process ids are reused, most often in containers, where a program has the same id at every
    # start. The start time tells two processes of one id apart.
    return _start_ticks(holder["process_id"]) == holder["start_ticks"]


def _start_ticks(process_id: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is no /proc."""
    try:
        # Field 22 of proc(5). The name in parentheses (field 2) may hold spaces and parentheses.
        return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
