"""Time, memory and exactness of a training step under every strategy, side by side.

Strategies take turns, step by step, in one process: whatever else the machine does slows all of
them alike, and what is reported is the median of ratios within a turn.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.memory.benchmark_models import Model, Program, is_twin, parse_strategy
from revnet_jax.memory.counts import arithmetic
from revnet_jax.training.auto import program_bytes
from revnet_jax.training.compiler import jit_initialization
from revnet_jax.training.metrics import peak_memory_bytes

BASELINES = ("store", "remat", "twin")  # what ratios are of
# To compile one program of a large GPU's suite and to start it, with 16 cores: 5 to 16 were seen,
# and 76 where convolutions are tried out.
START_SECONDS = 10
# In a turn, none waiting for the one before, as in training: what counts is the device's own time.
STEPS = 4


class Setting(NamedTuple):
    """A size of a model to measure.

    strategies: see `parse_strategy`.
    seconds: how long they take turns, three times at least; 0 compiles them only.
    """

    model: Model
    layers: int
    batch: int
    strategies: tuple[str, ...]
    seconds: float

    @property
    def may_take_seconds(self) -> float:
        """How long it may take, compilation included, on a large GPU's host."""
        return self.seconds + START_SECONDS * len(self.strategies)

    def __str__(self) -> str:
        sizes = f"{self.layers} layers, batch {self.batch}"
        return f"{self.model.name} in {self.model.dtype}, {sizes}: {', '.join(self.strategies)}"


class Entrant:
    """One strategy at one size: its compiled step, its state, and what was measured so far."""

    def __init__(self, strategy: str, program: Program):
        self.strategy, self.program = strategy, program
        self.traced = program.step.trace(*jax.eval_shape(program.init))
        self.compiled: Any = None
        self.state: Any = None
        self.batch: Any = None
        self.metrics: dict[str, jax.Array] = {}
        self.gradient: Any = None  # of the first step, until it has been compared
        self.gradient_error: float | None = None
        self.compile_seconds = 0.0
        self.rss_bytes: int | None = None
        self.device_bytes: int | None = None
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def compile(self) -> None:
        started = time.perf_counter()
        self.compiled = self.traced.lower().compile()
        self.compile_seconds = time.perf_counter() - started

    def start(self) -> None:
        """A fresh state, and the first step: it is not timed, its memory and gradient are kept."""
        before, others = peak_memory_bytes() or 0, _bytes_in_use()
        self.state, self.batch = jit_initialization(self.program.init)()
        jax.block_until_ready(self.state)
        rss = _reset_peak_rss()
        self._advance()
        self.rss_bytes = None if rss is None else _memory_bytes("VmHWM") - rss
        after = peak_memory_bytes() or 0
        self.device_bytes = after - others if after > before else None
        # A copy, since the next step takes the state's place; on the device, where it is compared.
        self.gradient = jax.tree.map(jnp.copy, self.program.gradient(self.state))

    def take_turn(self) -> None:
        steps = 1 if jax.default_backend() == "cpu" else STEPS
        started, cpu_started = time.perf_counter(), time.process_time()
        self._advance(steps)
        self.seconds.append((time.perf_counter() - started) / steps)
        self.cpu_seconds.append((time.process_time() - cpu_started) / steps)

    def step_bytes(self) -> int:
        """What the step needs at once, as the compiler says."""
        return program_bytes(self.compiled.memory_analysis(), jax.default_backend())

    def _advance(self, steps=1):
        for _ in range(steps):
            self.state, self.metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, self.metrics))


def compare(setting: Setting) -> Iterator[dict[str, Any]]:
    """A row for each strategy at this size. Cost: each compiled once, then `setting.seconds`.

    Raises UserError for a strategy that there is not, or that stores more layers than there are.
    """
    model, layers, batch, strategies, seconds = setting
    for name in strategies:
        parse_strategy(name, layers)
    entrants = [Entrant(name, model.program(name, layers, batch)) for name in strategies]
    if jax.default_backend() == "gpu":
        # One after the other: XLA finds the fastest kernel for a product by trying, and keeps what
        # it found. At once, two programs may find different ones, and round in different ways.
        for entrant in entrants:
            entrant.compile()
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(Entrant.compile, entrants))
    if seconds:
        # The one that takes least comes first, since a device's peak never goes down again.
        for entrant in sorted(entrants, key=Entrant.step_bytes):
            entrant.start()
        compare_gradients(entrants)
        take_turns(entrants, seconds)
    for entrant in entrants:
        yield describe(setting, entrant, {e.strategy: e for e in entrants})


def compare_gradients(entrants: Sequence[Entrant]) -> None:
    """Says how far each one's is from that of `store`, if that is there; then drops them."""
    stored = [entrant.gradient for entrant in entrants if entrant.strategy == "store"]
    for entrant in entrants:
        if stored and not is_twin(entrant.strategy):  # which is another function
            entrant.gradient_error = float(relative_l2(entrant.gradient, stored[0]))
    for entrant in entrants:
        entrant.gradient = None


def take_turns(entrants: Sequence[Entrant], seconds: float, least: int = 3) -> None:
    """Steps one after the other, another one first in every turn."""
    ends, turn = time.monotonic() + seconds, 0
    while turn < least or time.monotonic() < ends:
        first = turn % len(entrants)
        for entrant in (*entrants[first:], *entrants[:first]):
            entrant.take_turn()
        turn += 1


def describe(setting: Setting, entrant: Entrant, others: dict[str, Entrant]) -> dict[str, Any]:
    """A row: milliseconds, ratios, bytes, error. What was not measured is None.

    flops: of matrix products and convolutions, counted before compilation.
    step_bytes, temporary_bytes: the compiler's figures, with and without what goes in and out.
    rss_bytes: by how much the process grew during the first step (Linux).
    device_bytes: the device's peak after it, less what the other strategies hold, where the device
      tells; None also where something before it had taken more.
    gradient_error: of the first step, relative L2 distance to that of `store`.
    time_vs_store, cpu_vs_store, ...: medians of ratios within turns; cpu is processor time, of all
      threads.
    """
    model, layers, batch = setting[:3]
    row: dict[str, Any] = {
        "model": model.name,
        "dtype": model.dtype,
        "strategy": entrant.strategy,
        "layers": layers,
        "batch": batch,
        "compile_seconds": round(entrant.compile_seconds, 2),
        "flops": arithmetic(entrant.traced.jaxpr, platform=jax.default_backend()),
        "step_bytes": entrant.step_bytes(),
        "temporary_bytes": entrant.compiled.memory_analysis().temp_size_in_bytes,
        "rss_bytes": entrant.rss_bytes,
        "device_bytes": entrant.device_bytes,
        "turns": len(entrant.seconds),
    }
    if not entrant.seconds:
        return row
    seconds = statistics.median(entrant.seconds)
    row |= {
        "step_ms": 1e3 * seconds,
        "cpu_ms": 1e3 * statistics.median(entrant.cpu_seconds),
        "examples_per_second": model.examples(batch) / seconds,
        "unit": model.unit,
    }
    for name in BASELINES:
        if name in others:
            other = others[name]
            row[f"time_vs_{name}"] = _median_ratio(entrant.seconds, other.seconds)
            row[f"cpu_vs_{name}"] = _median_ratio(entrant.cpu_seconds, other.cpu_seconds)
    if entrant.gradient_error is not None:
        row["gradient_error"] = entrant.gradient_error
    if "exact_mismatches" in entrant.metrics:
        row["mismatches"] = int(entrant.metrics["exact_mismatches"])
    return row


@jax.jit
def relative_l2(tree: Any, reference: Any) -> jax.Array:
    """|tree - reference| / |reference|, over all leaves."""
    return optax.tree.norm(optax.tree.sub(tree, reference)) / optax.tree.norm(reference)


def _median_ratio(values, others):
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def _bytes_in_use():
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use", 0)


def _reset_peak_rss():
    """Makes the kernel forget the peak; returns the present size, or None where it cannot."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what others have freed is taken again, unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _memory_bytes("VmRSS")
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None


def _memory_bytes(name):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
