"""Errors that the user can fix, and the exit status of programs that meet them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import BinaryIO

PREEMPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start the program again


class UserError(Exception):
    """An error that the user can fix. Programs print it as one line, without a traceback.

    The message says what was got, what was expected and what to do.
    """


class StorageError(UserError):
    """A file cannot be written: no space, no permission, or a folder has its name."""


class Preempted(Exception):
    """A run was told to stop, and stopped after saving a checkpoint of `step`.

    This is not an error: the same command resumes the run.
    """

    def __init__(self, step: int):
        super().__init__(f"preempted: saved step {step}; the same command goes on from there")
        self.step = step


@contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None]:
    """Turns an OSError into a StorageError that says what could not be written and why.

    Put nothing but writes to `path` inside the context, because every OSError is turned.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error} ({file_system(path)}). Make room, or "
            "make it writable, and start the same command again"
        ) from error


def tell(line: object) -> None:
    """Prints a line to stderr; if that cannot be written, as on a full disk, nothing stops."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def write_all(file: BinaryIO, content: bytes) -> None:
    """Writes all of `content` to an unbuffered file, whose `write` may take only part of it."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def file_system(path: str | os.PathLike[str]) -> str:
    """Describes, for a message, the file system of `path` and its free space.

    Args:
      path: need not exist.
    """
    if "://" in str(path):
        return "remote storage"
    place = os.path.realpath(path)
    # A file that cannot be written is often not there yet. Its folder tells the file system.
    while not os.path.exists(place):
        place = os.path.dirname(place)
    stats = os.statvfs(place)
    while not os.path.ismount(place):
        place = os.path.dirname(place)
    # f_bavail, not f_bfree, which counts blocks that are kept for root.
    free, total = (
        f"{n * stats.f_frsize / 2**20:,.1f} MiB" for n in (stats.f_bavail, stats.f_blocks)
    )
    # Small files can use up all inodes while blocks are free. f_files is 0 where a file system has
    # no fixed number of them.
    inodes = ", no inode" if stats.f_files and not stats.f_favail else ""
    return f"file system {place}: {free} of {total} free{inodes}"


@contextmanager
def exit_status() -> Generator[None]:
    """Ends the program with one line on stderr and status 1 after an error the user can fix.

    This includes errors of the operating system, such as a full disk or a closed pipe. A
    preempted run ends with status 75, which means that it should be started again.
    """
    try:
        yield
        # Output that cannot be written fails here and not at exit, after this context.
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Preempted as stop:
        # sys.exit with a text would print it, but exit with status 1.
        try:
            print(stop, file=sys.stderr, flush=True)
        except OSError:
            _discard(2)
        sys.exit(PREEMPTED_STATUS)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except OSError as error:
        with suppress(OSError):
            sys.stdout.flush()
        _discard(1)
        if error.filename is not None:
            sys.exit(f"error: {error.filename}: {error.strerror}")
        # An error without a file's name came from an open stream. A full disk or a closed pipe is
        # then most likely that of stdout.
        to_stdout = error.errno in (errno.ENOSPC, errno.EPIPE)
        sys.exit(f"error: {'cannot write to standard output: ' if to_stdout else ''}{error}")


def _discard(descriptor: int) -> None:
    """Sends what is written to a file descriptor to nowhere.

    At exit Python flushes stdout and stderr again. That would fail again, print a traceback and
    change the exit status.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
