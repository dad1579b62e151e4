"""Orbax's checkpoint manager, with what a run needs to be otherwise.

Which steps are kept, who waits for whom where a save fails, who decides about preemption, and what
is printed.
"""

from __future__ import annotations

import dataclasses
import errno
import logging as std_logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which asks nothing about preemption.

    Orbax asks JAX with the number of the step, in every save and in the background at its end. JAX
    remembers one number, the last, and stops the run one number later. `Stop` asks with other
    numbers (those of its questions), so that a run that is told to stop during a save would not.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False: `Stop` decides when a run stops."""
        return False


class NewestAndBest:
    """Orbax preservation policy: the newest and the best-scored steps; everything else is deleted.

    Orbax's own `BestN` keeps every step saved without metrics, sorts NaN anywhere, and reads scores
    from a file; if that file is damaged, the whole directory cannot be opened.
    """

    def __init__(self, keep_newest: int, keep_best: int, scores: dict[int, float]):
        self.keep_newest, self.keep_best, self.scores = keep_newest, keep_best, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]  # oldest first
        scored = sorted((s for s in steps if s in self.scores), key=lambda s: (self.scores[s], s))
        # Not scored[-keep_best:], which is the whole list for 0.
        kept = {*steps[-self.keep_newest :], *scored[max(0, len(scored) - self.keep_best) :]}
        return [step in kept for step in steps]


def wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier between processes, except that a process whose save failed does not wait.

    Orbax calls this while the error of a failed write propagates, but the other processes never
    reach the barrier. Waiting would hide the error until the timeout of 20 minutes.
    """
    if error := sys.exc_info()[1]:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def silence_orbax() -> None:
    """Drops orbax's log lines, dozens per save. Its failures come back as exceptions anyway."""
    logging.get_absl_logger().addFilter(_not_from_orbax)
    std_logging.getLogger("asyncio").addFilter(_not_of_orbax)
    # Once per process: a run may open checkpoints twice, and hooks would nest.
    if not isinstance(sys.unraisablehook, _WithoutAbandoned):
        sys.unraisablehook = _WithoutAbandoned(sys.unraisablehook)


@dataclasses.dataclass
class _WithoutAbandoned:
    """An `unraisablehook` that drops errors of tasks orbax abandoned, and passes on all others.

    Orbax reads and writes arrays concurrently. If several fail, it raises the first error and
    closes the event loop. Python then prints a traceback for each of the others.
    """

    hook: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)


def _not_from_orbax(record: Any) -> bool:
    return "/orbax/" not in record.pathname


def _not_of_orbax(record: Any) -> bool:
    """Drops asyncio's log lines on tasks orbax abandoned: they name its file or its database."""
    return not any(name in record.getMessage() for name in ("/orbax/", "OCDBT database"))


# How tensorstore's errors begin that say nothing about the file.
_OF_MACHINE = (
    *("DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"),
    "UNAVAILABLE",
)


def is_of_machine(error: Exception) -> bool:
    """Whether the machine or the network kept a file from being read, which may be good."""
    if isinstance(error, MemoryError | PermissionError | TimeoutError | jax.errors.JaxRuntimeError):
        return True
    code = error.errno if isinstance(error, OSError) else _wrapped_code(error)
    codes = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
    return code in codes or str(error).startswith(_OF_MACHINE)


def reason(error: Exception) -> str:
    """The operating system's message, if tensorstore wrapped one; else the error's first line."""
    code = _wrapped_code(error)
    return first_line(error) if code is None else os.strerror(code)


def _wrapped_code(error):
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
