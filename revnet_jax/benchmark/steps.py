"""Time, memory and exactness of a training step under every strategy, side by side.

Strategies take turns, step by step, in one process, so that other load on the machine slows all of
them alike. The reported ratios are medians over the turns of the ratio within a turn.
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

from revnet_jax.benchmark.models import BenchmarkModel, Program
from revnet_jax.devices import program_bytes
from revnet_jax.planning.variants import parse_variant
from revnet_jax.programs.counts import arithmetic
from revnet_jax.training.compiler import compiler_options, jit_initialization

BASELINES = ("store", "remat", "twin")  # strategies that the reported ratios divide by
# Compiling and starting one program of the GPU suite took 5 to 16 seconds with 16 cores, and 76
# where XLA autotunes convolutions.
START_SECONDS = 10
# Steps in a turn. They are dispatched without waiting for one another, as in training, so that the
# device's time is measured and not the host's overhead.
STEPS = 4


class Setting(NamedTuple):
    """One model at one size, and the strategies to compare on it.

    Attributes:
      strategies: see `Variant`.
      seconds: how long the strategies take turns, three turns at least; 0 only compiles them.
      deterministic: compile kernels that sum in a fixed order, see `compiler_options`. What
        remains between two gradients is then the strategy's error, but times are not those of
        training.
    """

    model: BenchmarkModel
    layers: int
    batch: int
    strategies: tuple[str, ...]
    seconds: float
    deterministic: bool = False

    @property
    def may_take_seconds(self) -> float:
        """Expected duration on the host of a large GPU, compilation included."""
        return self.seconds + START_SECONDS * len(self.strategies)

    def __str__(self) -> str:
        sizes = f"{self.layers} layers, batch {self.batch}"
        return f"{self.model.name} in {self.model.dtype}, {sizes}: {', '.join(self.strategies)}"


class Entrant:
    """One strategy at one size: its compiled step, its state, and its measurements so far."""

    def __init__(self, strategy: str, program: Program):
        self.strategy, self.program = strategy, program
        # By shapes: until `start`, no array of the model exists.
        self.traced = program.step.trace(*jax.eval_shape(program.init))
        self.compiled: Any = None
        self.state: Any = None
        self.batch: Any = None
        self.metrics: dict[str, jax.Array] = {}
        self.gradient: Any = None  # of the first step; dropped after the comparison
        self.gradient_error: float | None = None
        self.gradient_noise: float | None = None
        self.earlier_mismatches: int | None = None  # of a first step that was run twice
        self.compile_seconds = 0.0
        self.rss_bytes: int | None = None
        self.device_bytes: int | None = None
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def compile(self, deterministic: bool = False) -> None:
        started = time.perf_counter()
        options = None  # leaves those of the program's own `jit`
        if deterministic:
            options = compiler_options(jax.default_backend(), deterministic=True)
        self.compiled = self.traced.lower().compile(options)
        self.compile_seconds = time.perf_counter() - started

    def start(self) -> None:
        """Initializes the state and runs the first step, untimed; keeps its memory and gradient.

        On GPUs it does so twice, because some kernels add in any order.
        """
        # A device's peak never goes down: it tells of this program only if it rises above `before`.
        before, others = _peak_and_present_bytes()
        init = jit_initialization(self.program.init)
        self.state, self.batch = init()
        jax.block_until_ready(self.state)
        # Here, so that the peak is the step's and not that of the initialization.
        rss = _reset_peak_rss()
        self._advance()
        self.rss_bytes = None if rss is None else _memory_bytes("VmHWM") - rss
        after, _ = _peak_and_present_bytes()
        self.device_bytes = after - others if after > before else None
        # Copied because the step donates its state: the next step overwrites these buffers. The
        # copy stays on the device, where the gradients are compared.
        self.gradient = jax.tree.map(jnp.copy, self.program.gradient(self.state))
        if jax.default_backend() == "gpu":
            self.earlier_mismatches = self._mismatches()
            self.state = self.batch = None  # frees the memory of the first
            self.state, self.batch = init()
            self._advance()
            again = self.program.gradient(self.state)
            self.gradient_noise = float(relative_l2(again, self.gradient))

    def take_turn(self) -> None:
        # A CPU is the host itself: steps in a row would hide nothing.
        steps = 1 if jax.default_backend() == "cpu" else STEPS
        started, cpu_started = time.perf_counter(), time.process_time()
        self._advance(steps)
        self.seconds.append((time.perf_counter() - started) / steps)
        self.cpu_seconds.append((time.process_time() - cpu_started) / steps)

    def step_bytes(self) -> int:
        """Peak memory of the step: the compiler's figure for the compiled program."""
        return program_bytes(self.compiled.memory_analysis(), jax.default_backend())

    @property
    def mismatches(self) -> int | None:
        """Elements of rebuilt inputs that differed, in all steps; None if nothing is rebuilt."""
        now = self._mismatches()
        return None if now is None else now + (self.earlier_mismatches or 0)

    def _mismatches(self):
        found = self.metrics.get("exact_mismatches")
        return None if found is None else int(found)

    def _advance(self, steps=1):
        for _ in range(steps):
            self.state, self.metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, self.metrics))


def compare_strategies(setting: Setting) -> Iterator[dict[str, Any]]:
    """Yields a row for each strategy. Cost: one compilation each, then `setting.seconds`.

    Raises UserError for an unknown strategy, or one that stores more layers than the model has.
    """
    model, layers, batch = setting.model, setting.layers, setting.batch
    for name in setting.strategies:
        parse_variant(name, layers)
    # All names are known by now: a mistake should not wait for models to be traced.
    entrants = [Entrant(name, model.program(name, layers, batch)) for name in setting.strategies]
    # On GPUs one after the other: XLA's autotuner times the kernels for a matrix product and caches
    # the fastest. Programs tuned in parallel may pick different kernels, which round differently.
    # And of three decoders with cuDNN's attention that were compiled in parallel, one failed when
    # it ran (jax 0.11.2: "IndexError: raw_hash_map::at").
    with ThreadPoolExecutor(1 if jax.default_backend() == "gpu" else os.cpu_count()) as pool:
        list(pool.map(lambda entrant: entrant.compile(setting.deterministic), entrants))
    if setting.seconds:
        # Start with the smallest program, because the peak that a device reports never goes down.
        for entrant in sorted(entrants, key=Entrant.step_bytes):
            entrant.start()
        compare_gradients(entrants)
        take_turns(entrants, setting.seconds)
    for entrant in entrants:
        yield describe_entrant(setting, entrant, {e.strategy: e for e in entrants})


def compare_gradients(entrants: Sequence[Entrant]) -> None:
    """Sets each entrant's gradient error against `store`, if it takes part; drops the gradients."""
    stored = [entrant.gradient for entrant in entrants if entrant.strategy == "store"]
    for entrant in entrants:
        # The twin computes a different function.
        if stored and not parse_variant(entrant.strategy).is_twin:
            entrant.gradient_error = float(relative_l2(entrant.gradient, stored[0]))
    for entrant in entrants:
        entrant.gradient = None


def take_turns(entrants: Sequence[Entrant], seconds: float, least: int = 3) -> None:
    """Lets every entrant take its turn, in rounds; each round starts with the next entrant.

    Args:
      seconds: how long to go on.
      least: the smallest number of rounds.
    """
    ends, turn = time.monotonic() + seconds, 0
    while turn < least or time.monotonic() < ends:
        # In a fixed order the first strategy of a round would always be the same.
        first = turn % len(entrants)
        for entrant in (*entrants[first:], *entrants[:first]):
            entrant.take_turn()
        turn += 1


def describe_entrant(
    setting: Setting, entrant: Entrant, others: dict[str, Entrant]
) -> dict[str, Any]:
    """A row of results: milliseconds, ratios, bytes, gradient error. Unmeasured ones are None.

    - flops: of matrix products and convolutions, counted before compilation.
    - step_bytes, temporary_bytes: the compiler's figures, with and without arguments and results.
    - rss_bytes: growth of the process's resident memory during the first step (Linux).
    - device_bytes: the device's peak after the first step, less what the other strategies hold.
      None if the device does not report it, or if an earlier program had a higher peak.
    - deterministic: whether kernels were asked for that sum in a fixed order.
    - gradient_error: relative L2 distance of the first step's gradient to that of `store`.
    - gradient_noise: relative L2 distance between the gradients of two such steps (GPUs only).
    - time_vs_store, cpu_vs_store, ...: medians of the ratios within turns; cpu is the processor
      time of all threads.
    """
    row: dict[str, Any] = {
        "model": setting.model.name,
        "dtype": setting.model.dtype,
        "strategy": entrant.strategy,
        "layers": setting.layers,
        "batch": setting.batch,
        "deterministic": setting.deterministic and jax.default_backend() == "gpu",
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
        "examples_per_second": setting.model.examples(setting.batch) / seconds,
        "unit": setting.model.unit,
    }
    for name in BASELINES:
        if name in others:
            other = others[name]
            row[f"time_vs_{name}"] = _median_ratio(entrant.seconds, other.seconds)
            row[f"cpu_vs_{name}"] = _median_ratio(entrant.cpu_seconds, other.cpu_seconds)
    if entrant.gradient_error is not None:
        row["gradient_error"] = entrant.gradient_error
    if entrant.gradient_noise is not None:
        row["gradient_noise"] = entrant.gradient_noise
    if entrant.mismatches is not None:
        row["mismatches"] = entrant.mismatches
    return row


@jax.jit
def relative_l2(tree: Any, reference: Any) -> jax.Array:
    """|tree - reference| / |reference|, over all leaves."""
    return optax.tree.norm(optax.tree.sub(tree, reference)) / optax.tree.norm(reference)


def _median_ratio(values, others):
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def _peak_and_present_bytes():
    """Memory of the device that steps run on, the first; zeros if it does not report it (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 0), stats.get("bytes_in_use", 0)


def _reset_peak_rss():
    """Resets the kernel's peak of resident memory; returns the present size, None if it cannot."""
    gc.collect()
    try:
        # Give freed memory back to the kernel: reusing it would not show as growth.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            # 5 resets the peak, VmHWM, to the present size (Linux, Documentation/filesystems/proc).
            file.write("5")
        return _memory_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None


def _memory_bytes(name):
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(f"{name}:"))
    # The kernel writes kB and means 1,024 bytes.
    return 1024 * int(line.split()[1])
