"""Compares how fast this host prepares batches with how fast its devices train on them."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.training.compiler import initialized
from revnet_jax.training.inputs import build_data
from revnet_jax.training.program import step_program
from revnet_jax.training.sharding import put_batch


def feed(config: ConfigDict, seconds: float) -> dict[str, Any]:
    """Examples (or tokens) per second of the config's pipeline alone, and of its training step.

    Measures this host and its own devices only.

    Args:
      seconds: for each of the two, with at least three batches or steps. The prefetched batches are
        taken first and not timed, so that the steady rate is measured.

    Raises UserError for settings or data that cannot be used.
    """
    program = step_program(config, jax.devices())
    task, mesh = program.task, program.mesh
    data = build_data(config, mesh)
    with contextlib.closing(data.train(0)) as batches:
        for _ in range(config.data.prefetch + 1):
            batch = next(batches)
        read, ends, started = 0, time.monotonic() + seconds, time.monotonic()
        while read < 3 or time.monotonic() < ends:
            next(batches)
            read += 1
        pipeline_seconds = (time.monotonic() - started) / read
    # The pipeline is closed by now: reading ahead would take cores from the step.
    state = initialized(program.init, program.state)
    step = program.step.lower(program.state, program.batch).compile()
    batch, steps = put_batch(batch, mesh), []
    ends = time.monotonic() + seconds
    while len(steps) < 4 or time.monotonic() < ends:
        started = time.monotonic()
        state, _ = jax.block_until_ready(step(state, batch))
        steps.append(time.monotonic() - started)
    units = task.units(config.batch_size)
    # The first step is left out, as it may still load the program.
    made, needed = units / pipeline_seconds, units / statistics.median(steps[1:])
    return {
        "unit": task.unit,
        "pipeline_per_second": made,
        "step_per_second": needed,
        "times_the_need": made / needed,
        "num_threads": config.data.num_threads,
    }
