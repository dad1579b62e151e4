"""Evaluation on the whole test split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from revnet_jax.data import Dataset, eval_batches
from revnet_jax.models import Variables
from revnet_jax.training.sharding import put_batch


def evaluate(
    eval_step: Callable[[Variables, Any], dict[str, jax.Array]],
    variables: Variables,
    dataset: Dataset,
    *,
    batch_size: int,
    mesh: Mesh,
    num_threads: int,
    prefetch: int,
) -> dict[str, float]:
    """`eval_loss` (nats) and `eval_accuracy` (0 to 1): means over all test examples.

    eval_step: `make_eval_step`'s, jitted.
    batch_size: a multiple of the number of devices.
    num_threads, prefetch: of the input pipeline.
    """
    batches = eval_batches(
        dataset,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=num_threads,
        prefetch=prefetch,
    )
    with contextlib.closing(batches):
        sums = [eval_step(variables, put_batch(batch, mesh)) for batch in batches]
    totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    return {
        "eval_loss": totals["loss"] / totals["count"],
        "eval_accuracy": totals["correct"] / totals["count"],
    }
