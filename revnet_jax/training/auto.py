"""stored_layers=-1: finds, by compiling, how many layers fit into memory when stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten
from revnet_jax.devices import memory_bytes, out_of_memory, program_bytes
from revnet_jax.families import build_task
from revnet_jax.runs.resume import COST
from revnet_jax.training.program import step_program


def largest_stored_layers(
    config: ConfigDict, devices: Sequence[jax.Device], report: Callable[[str], None]
) -> int:
    """Returns the largest m such that a training step with `stored_layers=m` fits into memory.

    Args:
      report: takes a line for each program tried.

    Cost: compiles about log2(layers) + 2 training steps, and runs none (binary search).

    Raises ConfigError if not even m = 0 fits, or if the device does not report its memory.
    """
    # 0 stands for all the memory that the device reports.
    limit = int(config.memory_limit_gib * 2**30) or memory_bytes(devices[0])
    if limit is None:
        raise ConfigError(
            "config.model.stored_layers: got -1 on a device that does not report its "
            "memory, expected config.memory_limit_gib to say how much there is"
        )

    def fits(stored_layers):
        needed = needed_bytes(config, devices, stored_layers)
        size = "more than there is" if needed is None else f"{needed / 2**30:.3f} GiB"
        report(f"stored_layers={stored_layers} needs {size} of {limit / 2**30:.3f} GiB")
        return needed is not None and needed <= limit

    if not fits(0):
        raise ConfigError(
            f"config.model.stored_layers: got -1, but a step does not fit into "
            f"{limit / 2**30:.3f} GiB even with 0 stored layers: take a smaller batch"
        )
    low, high = 0, build_task(config, 0).network.most_stored_layers
    # Storing everything may fit; then there is nothing to search.
    if high == 0 or fits(high):
        return high
    # Bisection: `low` layers fit and `high` do not. More stored layers need more memory.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def found_for(config: ConfigDict, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """What may change when a run is resumed and affects how many layers fit: settings, devices."""
    settings = {key: value for key, value in flatten(config).items() if key in COST}
    return {**settings, "devices": f"{len(devices)} x {devices[0].device_kind}"}


def needed_bytes(
    config: ConfigDict, devices: Sequence[jax.Device], stored_layers: int
) -> int | None:
    """Bytes per device of the step with its state and results; None if it is too big to compile."""
    program = step_program(config, devices, stored_layers)
    try:
        compiled = program.step.lower(program.state, program.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler of a TPU knows its memory, and refuses a program that does not fit.
        if not out_of_memory(error):
            raise
        return None
    return program_bytes(compiled.memory_analysis(), devices[0].platform)
