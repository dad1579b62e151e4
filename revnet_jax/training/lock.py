"""One run at a time in a folder: a file that its process holds locked."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from revnet_jax.config import ConfigError


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None] = _to_stderr) -> Iterator[None]:
    """Holds the lock file `path`, created if missing, while the context is open.

    The lock is `flock`'s, which the kernel releases when the process ends, however it ends: a
    process that was killed leaves nothing to clean up. The file names the holder, for the message
    to others. It is emptied in the end and not deleted, so that all who come lock the same file.

    Some file systems have no `flock` (NFS without its lock daemon), and some keep it to one host
    (gcsfuse and most of FUSE). Then the holder's name decides. On the same host, a process that is
    still running keeps the lock. Whether a process of another host is still running cannot be
    known: one line says whose it was, and the run goes on, for it may be one that was moved here.

    Raises ConfigError, in one line that names host and process, if another process holds it.
    """
    try:
        file = open(path, "a+")  # noqa: SIM115 - closed below, where failing to open is no longer meant
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; choose a --workdir of your own"
        ) from error
    with file:
        has_flock = _flock(file, path)
        holder = _read(file)
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
            with contextlib.suppress(ConfigError):
                _write(file, path, "")


def _flock(file: TextIO, path: Path) -> bool:
    """Locks the file; False where the file system cannot."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_in_use(path, _read(file))) from None
    except OSError:
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
    """The holder that the file names; None if it names none, or not yet in full."""
    try:
        file.seek(0)
        holder = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(holder, dict) or not _me().keys() <= holder.keys():
        return None
    return holder if isinstance(holder["process_id"], int) else None


def _write(file: TextIO, path: Path, text: str) -> None:
    try:
        file.truncate(0)
        file.write(text)
        file.flush()
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error}; make room, or another --workdir"
        ) from error


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the process, of this host, is the one that wrote its name, and runs."""
    try:
        os.kill(holder["process_id"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user's
    # Numbers are used again, soonest in containers, where a run has the same one at every start.
    return _start_ticks(holder["process_id"]) == holder["start_ticks"]


def _start_ticks(process_id: int) -> int | None:
    """When a process started, in ticks since this machine did; None where Linux is not asked."""
    try:
        # After the program's name, in parentheses, which may hold anything: field 22 of proc(5).
        return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
