"""Low-precision training: parameters and moments in 16 or 8 bits, with stochastic rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import trees
from revnet_jax.models.dtypes import is_narrowed
from revnet_jax.optimizers.stochastic import (
    block_size,
    compress,
    compressed_zeros,
    expand,
    round_to_bfloat16,
)

MOMENTS = ("float32", "bfloat16", "float8")


class RoundedState(NamedTuple):
    """The state of an optimizer between steps.

    Attributes:
      count: updates so far, int32.
      inner: the optimizer's own state, with its floats narrowed.
      scales: None, or for float8 a tree like `inner`, with None for leaves without scales.

    Values and scales are separate trees, so that the path of each leaf ends in the name of its
    parameter. Sharding rules go by that path, so the leaf is sharded like its parameter.
    """

    count: jax.Array
    inner: Any
    scales: Any = None


def rounded(
    optimizer: optax.GradientTransformation, *, moments: str
) -> optax.GradientTransformation:
    """Wraps an optimizer so that bfloat16 parameters and narrow moments are rounded stochastically.

    It computes in float32; only what is kept from step to step is rounded. Rounding to nearest
    would lose every change of less than 1 / 512 of a value (in float8, 1 / 32), such as a small
    step of a weight, or the change of Adam's average of squares (b2 = 0.999). Parameters of other
    dtypes are updated as by `optimizer` itself. Apply the updates with `apply_updates`.

    Args:
      moments: dtype of the floats of the optimizer's state, which must start at 0: "float32";
        "bfloat16"; or "float8", for moments of kernels and embeddings, in blocks (see `compress`),
        with the others in float32. Adam's average of squares, recognised by the field name `nu` in
        optax's state, is then kept as square roots.

    Cost: "bfloat16" takes a half, and "float8" a quarter, of the memory of the moments, and of what
    an update reads and writes of them.

    Raises ValueError for other `moments`.
    """

    def init(params):
        state = optimizer.init(widened(params))
        return RoundedState(jnp.zeros((), jnp.int32), *_narrow(state, moments, None))

    def update(updates, state, params=None):
        # Part of the hash that decides how to round, so that every step rounds in another way.
        count = state.count + 1
        wide = None if params is None else widened(params)
        updates, inner = optimizer.update(widened(updates), _widen(state), wide)

        # Returns the difference to the rounded parameter, so that `apply_updates`, which adds in
        # float32, arrives at that parameter.
        def to_a_neighbour(update, param):
            if param.dtype != jnp.bfloat16:
                return update
            param = param.astype(jnp.float32)
            return round_to_bfloat16(param + update, count).astype(jnp.float32) - param

        if params is not None:
            updates = jax.tree.map(to_a_neighbour, updates, params)
        return updates, RoundedState(count, *_narrow(inner, moments, count))

    if moments not in MOMENTS:
        raise ValueError(f"got moments={moments!r}, expected one of {', '.join(MOMENTS)}")
    return optax.GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates, added in the dtype of the updates, returned in that of the parameters."""
    return jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)


def widened(tree: Any) -> Any:
    """The tree with its bfloat16 leaves in float32."""
    widen = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
    return jax.tree.map(widen, tree)


def _narrow(state: Any, moments: str, step: jax.Array | None) -> tuple[Any, Any]:
    """Returns the state with its floats narrowed, and the scales for float8, otherwise None.

    step: None before the first step, when all moments are 0.
    """

    def narrow(path, leaf):
        if moments == "float32" or not trees.is_inexact(leaf):
            return leaf, None
        if moments == "bfloat16":
            first = step is None
            return leaf.astype(jnp.bfloat16) if first else round_to_bfloat16(leaf, step), None
        if not is_narrowed(path) or block_size(leaf.shape) is None:
            return leaf, None
        if step is None:
            return compressed_zeros(leaf.shape)
        return compress(leaf, step, squares=_are_squares(path))

    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    pairs = [narrow(path, leaf) for path, leaf in leaves]
    inner = structure.unflatten([values for values, _ in pairs])
    return inner, structure.unflatten([s for _, s in pairs]) if moments == "float8" else None


def _widen(state: RoundedState) -> Any:
    """The inverse of `_narrow`: the optimizer's own state, with its floats in float32."""

    def widen(path, values, scales):
        return values if scales is None else expand(values, scales, squares=_are_squares(path))

    if state.scales is None:
        return widened(state.inner)
    # Where a leaf has no scales their tree has None, which JAX hands over as a subtree.
    return jax.tree_util.tree_map_with_path(widen, state.inner, state.scales)


def _are_squares(path: Any) -> bool:
    """Whether a leaf belongs to Adam's average of squares, the field `nu` of optax's state."""
    return any(getattr(key, "name", None) == "nu" for key in path)
