"""Compiles training steps in separate processes, two at a time, and reports progress.

One at a time for TPUs of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revnet_jax.config import references
from revnet_jax.planning.topology import LOCAL, Topology

PROCESSES = 2  # each uses one core for minutes, and up to two GiB
DEFAULT_CACHE_DIR = Path("~/.cache/revnet_jax/compiled")


@dataclass(frozen=True)
class CompiledStep:
    """The compiler's figures for one training step, per device unless said otherwise.

    Sizes of arrays are without a TPU's padding.

    Attributes:
      limit_bytes: memory of the device, None if unknown.
      needed_bytes: peak memory, arguments and results included; None if the program did not fit
        and the compiler did not say how much it needs.
      out_of_memory: whether the compiler refused the program because it does not fit.
      argument_bytes: size of the arguments; None if out_of_memory.
      traffic: fields of `Traffic`; None if out_of_memory.
      parts: rows of `by_part`; None if out_of_memory, and for devices other than GPUs.
      flops: of all devices together.
      weights_bytes: size of the weights, running averages included.
      gradient_bytes: size of the gradients that exist at once.
      optimizer_bytes: size of the optimizer's state.
      batch_bytes: size of the batch.
      cached: whether the figures come from an earlier compilation.
    """

    num_devices: int
    device_kind: str
    limit_bytes: int | None
    needed_bytes: int | None
    out_of_memory: bool
    argument_bytes: int | None
    traffic: dict[str, Any] | None
    parts: list[dict[str, Any]] | None
    flops: int
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    compile_seconds: float
    cached: bool

    @property
    def fits(self) -> bool:
        if self.out_of_memory or self.needed_bytes is None:
            return False
        return self.limit_bytes is None or self.needed_bytes <= self.limit_bytes


@dataclass(frozen=True)
class NotCompiled:
    """Why a step could not be compiled, in one line: incompatible settings, or a crash."""

    error: str


@dataclass(frozen=True)
class Compiler:
    """Compiles steps for a topology; results of earlier compilations are read from `cache_dir`.

    Attributes:
      report: called with a line of text whenever a step is done.
    """

    topology: Topology
    cache_dir: Path
    report: Callable[[str], None]

    def refusals(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """The configs that cannot be trained, by name, and why; one process checks all of them.

        Empty if that process crashes: compiling then reports the error.
        """
        process = self._ask({"configs": {name: dict(each) for name, each in settings.items()}})
        return _answer(process).get("refusals", {})

    def steps(
        self, settings: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, CompiledStep | NotCompiled]:
        """Compiles a step for each named config. settings: by config name, then by dotted key."""
        results: dict[str, CompiledStep | NotCompiled] = {}
        # One process at a time can open a TPU.
        alone = self.topology.name == LOCAL and has_tpu()
        # Threads suffice, because they only wait for processes.
        with ThreadPoolExecutor(1 if alone else PROCESSES) as threads:
            names = {threads.submit(self._step, each): name for name, each in settings.items()}
            try:
                for future in as_completed(names):
                    name, (result, seconds) = names[future], future.result()
                    results[name] = result
                    outcome = _outcome(result)
                    self.report(f"[{len(results)}/{len(names)}] {name}: {outcome}, {seconds:.0f} s")
            except BaseException:
                # Also on Ctrl-C: what waits in line is not begun.
                threads.shutdown(cancel_futures=True)
                raise
        # In the order of the request, not of completion.
        return {name: results[name] for name in settings}

    def _step(self, settings):
        started = time.monotonic()
        process = self._ask({"config": dict(settings)})
        for line in process.stderr.splitlines():
            # Notes tell of what did not stop the worker, as a cache that cannot be written.
            if line.startswith("note: "):
                self.report(line)
        return _result(process), time.monotonic() - started

    def _ask(self, request):
        request |= {"topology": self.topology.name, "cache_dir": str(self.cache_dir)}
        # JAX's own compilation cache is off: executables for an absent device cannot be loaded.
        environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", **self.topology.environment}
        # Without filtering, the last line of stderr is the error and not a note about filtering.
        environment["JAX_TRACEBACK_FILTERING"] = "off"
        environment["PYTHONPATH"] = references.search_path()  # to import the user's own models
        return subprocess.run(
            # -P: the current folder is not searched. PYTHONPATH has this program's own search path.
            [sys.executable, "-P", "-m", "revnet_jax.planning.worker"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )


def has_tpu() -> bool:
    """Whether this machine may have a TPU, by the files of its devices."""
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _answer(process):
    """The worker's answer, a dictionary; empty if the process crashed."""
    if process.returncode:
        return {}
    # Libraries may print before or after the answer, which is a line of its own.
    for line in reversed(process.stdout.splitlines()):
        with suppress(json.JSONDecodeError):
            if isinstance(answer := json.loads(line), dict):
                return answer
    return {}


def _result(process):
    answer = _answer(process)
    if "step" in answer:
        return CompiledStep(**answer["step"])
    if "error" in answer:
        return NotCompiled(answer["error"])
    # A crash inside a compiler leaves a status, and at best a last line that says why.
    said = [line for line in process.stderr.splitlines() if line.strip()] or ["nothing said"]
    return NotCompiled(f"the compiling process ended with status {process.returncode}: {said[-1]}")


def _outcome(result):
    if isinstance(result, NotCompiled):
        return result.error
    found = "from the cache" if result.cached else "compiled"
    return f"{found}, out of memory" if result.out_of_memory else found
