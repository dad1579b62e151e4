"""Finds the largest batch and the deepest model that each strategy can train on this device."""

from __future__ import annotations

import statistics
from typing import Any, Literal

import jax

from revnet_jax.benchmark.models import BenchmarkModel
from revnet_jax.benchmark.steps import Entrant
from revnet_jax.devices import out_of_memory
from revnet_jax.errors import UserError
from revnet_jax.planning.largest import largest_that_fits

Axis = Literal["batch", "layers"]
# Timed turns at the size that is found: of one step on a CPU, else of several (`steps.STEPS`).
TURNS = 5
# A search stops at this many times its start: the memory of some strategies does not grow.
MOST = 2**14


def device_limit_bytes() -> int:
    """Memory that programs may use on the first device; UserError if it does not report this."""
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise UserError("this device does not report its memory: give --limit_gib=4")
    return stats["bytes_limit"]


def find_limit(
    model: BenchmarkModel,
    strategy: str,
    axis: Axis,
    *,
    layers: int,
    batch: int,
    limit_bytes: int,
    deterministic: bool = False,
    most_compiled: int = 6,
) -> dict[str, Any]:
    """A row: the largest batch, or number of layers, and the speed there.

    `exact` says whether the next larger size was compiled too and does not fit.

    Args:
      layers: where the search starts; if it is along this axis, it takes multiples of that.
      batch: the same for the batch.
      deterministic: as in `Setting`.

    The search uses the compiler's memory figures. The size it finds is then run, and reduced by an
    eighth as long as the device runs out of memory. Cost: `most_compiled` compilations, the first
    step (twice on GPUs, see `Entrant.start`) and `TURNS` turns, or a few more.
    """
    sizes: dict[str, int] = {"layers": layers, "batch": batch}
    start = sizes[axis]
    entrants: dict[int, Entrant] = {}

    def needed_bytes(n):
        with _Exhaustion() as caught:
            entrant = Entrant(strategy, model.program(strategy, **{**sizes, axis: n}))
            entrant.compile(deterministic)
            # Kept, so that the size that is found need not be compiled again.
            entrants[n] = entrant
        return None if caught.exhausted else entrants[n].step_bytes()

    search = {"limit_bytes": limit_bytes, "step": start, "most": MOST * start}
    found = largest_that_fits(needed_bytes, start, **search, most_compiled=most_compiled)
    n, failed = found.size or 0, set()
    seconds = None
    while n and seconds is None:
        if n in entrants or needed_bytes(n) is not None:
            with _Exhaustion():
                seconds = _step_seconds(entrants[n])
        if seconds is None:  # the compiler does not count what other programs hold in memory
            entrants.pop(n, None)
            failed.add(n)
            # A multiple of the start, as all sizes; 0, where nothing is left to try, ends the loop.
            n = n * 7 // 8 // start * start
    row: dict[str, Any] = {
        "model": model.name,
        "dtype": model.dtype,
        "strategy": strategy,
        "axis": axis,
        "deterministic": deterministic and jax.default_backend() == "gpu",
        **sizes,
        axis: n,
    }
    row |= {"largest": n, "exact": n + start in failed if failed else found.exact}
    row |= {"limit_bytes": limit_bytes, "unit": model.unit}
    row["step_bytes"] = entrants[n].step_bytes() if n else None
    row["examples_per_second"] = model.examples(row["batch"]) / seconds if seconds else None
    return row


class _Exhaustion:
    """Suppresses out-of-memory errors and notes them in `exhausted`; other errors propagate."""

    def __enter__(self):
        self.exhausted = False
        return self

    def __exit__(self, kind, error, trace):
        self.exhausted = isinstance(error, jax.errors.JaxRuntimeError) and out_of_memory(error)
        return self.exhausted


def _step_seconds(entrant):
    try:
        entrant.start()
        for _ in range(TURNS):
            entrant.take_turn()
    finally:
        entrant.state = entrant.batch = entrant.gradient = None  # frees the device's memory
    return statistics.median(entrant.seconds)
