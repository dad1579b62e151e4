"""From a flax nnx module to pure functions over plain dictionaries of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class PureModule:
    """An nnx module as `init` and `apply`, with parameters and running averages as plain trees.

    make: builds the module from its random streams: `lambda rngs: nnx.Linear(3, 4, rngs=rngs)`.

    `jax.vmap(module.init)(keys)` gives every leaf a leading layer axis: the parameters of a chain.
    A module whose `apply` is a branch must keep no state but `nnx.BatchStat`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self._make = make
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graphdef, _, _ = nnx.split(module, nnx.Param, nnx.BatchStat)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """(params, stats): trainable parameters and running averages, fresh."""
        _, params, stats = nnx.split(self._make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(self, params: Any, stats: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(the module's output, its running averages after the call)."""
        module = nnx.merge(self._graphdef, params, stats)
        output = module(*args, **kwargs)
        new_stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        # Averages over past batches are a record, not a path for gradients.
        return output, jax.lax.stop_gradient(new_stats)
