"""Evaluation on the whole test split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, overload

from jax.sharding import Mesh

from revnet_jax.errors import UserError
from revnet_jax.models.task import Sums
from revnet_jax.runs.metrics import DelayedFetch
from revnet_jax.training.sharding import put_batch

Step = Callable[[Any, Any], Sums]


@overload
def evaluate(sums: Step, variables: Any, batches: Any, mesh: Mesh) -> dict[str, float]: ...
@overload
def evaluate(
    sums: Step,
    variables: Any,
    batches: Any,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> dict[str, float] | None: ...
def evaluate(
    sums: Step,
    variables: Any,
    batches: Any,
    mesh: Mesh,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Weighted means over all batches; None if told to stop before the last.

    Args:
      sums: jitted `(variables, batch) -> {"count": total weight, name: weighted sum, ...}`.
      batches: an iterator of this process's rows of each batch; it is closed at the end.
      stop: called before every batch.
    """
    # Sums are fetched one batch late. So the device does not wait for the host, and the host is
    # never so far ahead that a request to stop would wait for the whole evaluation.
    fetch, fetched = DelayedFetch(), []
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            if stop():
                return None
            fetched += fetch.exchange(number, sums(variables, put_batch(batch, mesh)))
    fetched += fetch.flush()
    # In Python's floats of 64 bits: float32 would lose digits over a large split.
    totals = {name: sum(values[name] for _, values in fetched) for name in fetched[0][1]}
    # Padding has weight 0, so the last batch counts by its real examples.
    count = totals.pop("count")
    if not count:
        raise UserError("got test batches whose weights are all 0, expected one example at least")
    return {name: total / count for name, total in totals.items()}
