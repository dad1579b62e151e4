"""A run of several processes, one per host: how they start, stop and fail together."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax._src import distributed as jax_distributed  # the key-value store has no public API
from jax.experimental import multihost_utils

from revnet_jax.errors import Preempted, UserError

# Keys in the key-value store of the coordinator, which the first process hosts.
_FAILURES = "revnet_jax/failures/"
_SETTINGS = "revnet_jax/settings"
_PATIENCE_MS = 300_000  # the default timeout of `jax.distributed.initialize`


class LaunchError(UserError):
    """The processes of a run cannot work together with the arguments they were started with."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_seconds: int = 60,
) -> None:
    """Joins the other processes of the run; call it before anything asks JAX for its devices.

    Without the first three arguments, JAX detects a cluster by itself (Cloud TPU, Slurm, Open MPI,
    Kubernetes). Without a cluster this is the only process and nothing happens. `num_processes=1`
    alone says that this is the only process.

    Args:
      coordinator_address: host:port, where the first process (process_id 0) listens.
      num_processes: how many processes the run has.
      process_id: which of them this one is, from 0.
      heartbeat_timeout_seconds: after this time without a heartbeat a process counts as dead, and
        JAX ends the others.

    Raises:
      LaunchError: arguments are incomplete or out of range, or the environment describes a cluster
        incompletely. If a process is missing for five minutes, JAX aborts those that wait for it.
    """
    explicit: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _check(explicit, heartbeat_timeout_seconds)
    if num_processes == 1 and coordinator_address is None:
        return
    # After ten seconds, because JAX waits five minutes for a missing process before it says so.
    waiting = threading.Timer(10, logging.warning, ("waiting for the other processes of the run",))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=heartbeat_timeout_seconds)
    except ValueError as error:
        # JAX's message where it finds no cluster: "coordinator_address should be defined."
        if num_processes is None and "coordinator_address" in str(error):
            return  # no cluster
        raise LaunchError(
            f"got an incomplete cluster from the environment ({error}): give "
            "--coordinator_address, --num_processes and --process_id"
        ) from error
    finally:
        waiting.cancel()
    atexit.register(jax.distributed.shutdown)  # a barrier: waits until the others finish too
    if jax.default_backend() == "cpu":
        # On CPU, programs read back from JAX's compilation cache mix up the collectives between
        # processes: a sharded run that was started a second time computed different numbers.
        jax.config.update("jax_enable_compilation_cache", False)


def _check(explicit: dict[str, Any], heartbeat_timeout_seconds: int) -> None:
    missing = [f"--{name}" for name, value in explicit.items() if value is None]
    given = [f"--{name}={value}" for name, value in explicit.items() if value is not None]
    if missing and given and given != ["--num_processes=1"]:
        raise LaunchError(
            f"got {' and '.join(given)} without {' and '.join(missing)}, expected all three, or "
            "none where JAX finds the cluster by itself"
        )
    for name, value in (
        ("num_processes", explicit["num_processes"]),
        ("heartbeat_timeout_seconds", heartbeat_timeout_seconds),
    ):
        if value is not None and not 1 <= value < 2**31:
            raise LaunchError(f"got --{name}={value}, expected at least 1, and less than 2**31")
    if missing:
        return
    host, _, port = explicit["coordinator_address"].rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise LaunchError(
            f"got --coordinator_address={explicit['coordinator_address']}, expected host:port of "
            "the process with --process_id=0"
        )
    if not 0 <= explicit["process_id"] < explicit["num_processes"]:
        raise LaunchError(
            f"got --process_id={explicit['process_id']} of "
            f"--num_processes={explicit['num_processes']}, expected an id from 0 to one less than "
            "that"
        )


def is_first() -> bool:
    """Whether this is process 0, the only one that writes files and prints."""
    return jax.process_index() == 0


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raises LaunchError if the settings of this process differ from those of process 0.

    Processes that compile different programs would wait for each other forever.
    """
    if jax.process_count() == 1:
        return
    # As text, which compares alike after its way through the store (tuples become lists).
    mine = {name: json.dumps(value) for name, value in settings.items()}
    if is_first():
        _store().key_value_set(_SETTINGS, json.dumps(mine))
        return
    firsts = json.loads(_store().blocking_key_value_get(_SETTINGS, _PATIENCE_MS))
    names = sorted(
        name for name in mine.keys() | firsts.keys() if mine.get(name) != firsts.get(name)
    )
    if names:
        told = ", ".join(
            f"{name}={mine.get(name)} (the first: {firsts.get(name)})" for name in names
        )
        raise LaunchError(f"got {told}, expected the same flags in all processes")


def wait_for_all(what: str) -> None:
    """Blocks until all processes have called it (a barrier). `what` names it in error messages."""
    multihost_utils.sync_global_devices(what)


def value_of_first(value: int) -> int:
    """Returns the value that process 0 passed, in every process (a broadcast)."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def smallest(value: int) -> int:
    """Returns the smallest of the values that the processes passed (an all-gather)."""
    words = np.array([value], np.int64).view(np.uint32)  # JAX has no 64-bit types by default
    return int(multihost_utils.process_allgather(words).view(np.int64).min())


@contextlib.contextmanager
def shared_fate() -> Generator[None]:
    """Ends all processes when an error leaves this context in one of them.

    The others may be waiting for the failed process in a collective, which no exception can
    interrupt. So a thread in each process polls for failures, prints the error line and ends the
    process with status 1, as if it were killed; a killed run can be resumed.

    A process that dies silently is detected by its missing heartbeats instead: see `start`.
    """
    if jax.process_count() == 1:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    except Preempted:
        raise  # all processes stop at the same step, so none has to be told
    except BaseException as error:
        # First, or this process's own watcher would end it before its error is printed.
        over.set()
        # Exit handlers run last in, first out: this one runs before JAX's own, and never returns.
        atexit.register(_leave)
        # Without the first process there is no store. The others then miss its heartbeats.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _store().key_value_set(f"{_FAILURES}{jax.process_index()}", _line(error))
        raise
    finally:
        over.set()
        watcher.join()


def _watch(over: threading.Event) -> None:
    while not over.wait(timeout=1):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for key, line in _store().key_value_dir_get(_FAILURES):
                # The question took time, in which this process may have ended by itself.
                if over.is_set():
                    return
                who = key.rpartition("/")[2]
                print(f"error: process {who}: {line}", file=sys.stderr)
                _leave()


def _leave() -> None:
    """Ends the process without waiting for running computations.

    `shutdown` is a barrier: it returns once all processes know of the failure. A normal exit would
    wait for running work, possibly a collective that the other processes have left.
    """
    try:
        jax.distributed.shutdown()
    finally:
        # os._exit flushes nothing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _line(error: BaseException) -> str:
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name}{error}".partition("\n")[0]


def _store() -> Any:
    return jax_distributed.global_state.client


class Stop:
    """Tells a run to stop when its machine is preempted, which a SIGTERM announces.

    With several processes any of them may get the signal, and all of them stop at the same call of
    `requested`. A single process catches the signal itself while this context is open, if it is in
    the main thread, the only one where Python can install a handler.
    """

    def __init__(self):
        self._requested, self._questions = False, 0
        self._handler: Any = None

    def __enter__(self) -> Stop:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and not jax.distributed.is_initialized():  # otherwise JAX catches it
            # `signal` returns None for a handler from outside Python, and cannot set None.
            self._handler = signal.signal(signal.SIGTERM, self._note) or signal.SIG_DFL
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _note(self, *signal_and_frame: Any) -> None:
        # Only a note: a handler runs between any two bytecodes, where saving would not be safe.
        self._requested = True

    def requested(self) -> bool:
        """Returns whether to stop. Every process must call it equally often.

        Call it after every step and before every batch of an evaluation, for example. The first
        call that returns True is the same one in all processes, and all later calls return True.
        """
        if jax.distributed.is_initialized():
            # JAX counts these calls as steps, and picks one that no process has reached yet.
            sync = multihost_utils.reached_preemption_sync_point(self._questions)
            self._requested = self._requested or sync
            self._questions += 1
        return self._requested
