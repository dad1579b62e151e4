"""Errors that a person, rather than a programmer, can mend, and how programs end with them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

PREEMPTED_STATUS = 75  # of a program that wants to be started again: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Got, expected, what to do: the message is one line, and programs print it without a trace."""


class StorageError(UserError):
    """Something cannot be written: no room, no permission, a folder in the place of a file."""


class Preempted(Exception):
    """A run was told to stop and did, after saving a checkpoint: `step`. It can be resumed."""

    def __init__(self, step: int):
        super().__init__(f"preempted: saved step {step}; the same command goes on from there")
        self.step = step


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError into a StorageError that says what could not be written and why.

    Hold it open around nothing but the writing, to `path`.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error} ({file_system(path)}). Make room, or "
            "make it writable, and start the same command again"
        ) from error


def write_all(file: BinaryIO, content: bytes) -> None:
    """Writes to a file without a buffer, which may take less at a time: as much as has room."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def file_system(path: str | os.PathLike[str]) -> str:
    """The file system that a path, which need not exist, is on, and what is free on it."""
    if "://" in str(path):
        return "remote storage"
    place = os.path.realpath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    stats = os.statvfs(place)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    free, total = (
        f"{n * stats.f_frsize / 2**20:,.1f} MiB" for n in (stats.f_bavail, stats.f_blocks)
    )
    inodes = ", no inode" if stats.f_files and not stats.f_favail else ""
    return f"file system {place}: {free} of {total} free{inodes}"


@contextmanager
def exit_status() -> Iterator[None]:
    """Ends the program in one line on stderr and status 1 for what the user can mend.

    Errors of the operating system are of this kind: a full disk, a closed pipe. A run that was
    preempted ends with status 75: start it again.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(PREEMPTED_STATUS)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        with suppress(OSError):
            sys.stdout.flush()
        # What could not be written Python would try to write again at its end, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.filename is not None:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        to_stdout = error.errno in (errno.ENOSPC, errno.EPIPE)
        sys.exit(f"error: {'cannot write to standard output: ' if to_stdout else ''}{error}")
