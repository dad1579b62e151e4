"""Evaluation on the whole test split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from revnet_jax.training.sharding import put_batch


def evaluate(
    sums: Callable[[Any, Any], dict[str, jax.Array]], variables: Any, batches: Any, mesh: Mesh
) -> dict[str, float]:
    """Means over all that has weight in the batches.

    sums: `(variables, batch) -> {"count": weights, name: what they weigh, ...}`, jitted.
    batches: an iterator of this process's parts, which is closed.
    """
    with contextlib.closing(batches):
        found = [sums(variables, put_batch(batch, mesh)) for batch in batches]
    totals = {name: sum_of(name, found) for name in found[0]}
    count = totals.pop("count")
    return {name: total / count for name, total in totals.items()}


def sum_of(name: str, found: list[dict[str, jax.Array]]) -> float:
    """Of one entry, over all batches."""
    return sum(float(each[name]) for each in found)
