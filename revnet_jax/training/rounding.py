"""Training in 16 and 8 bits: parameters and moments that are rounded up or down at random."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import trees
from revnet_jax.models.dtypes import is_narrowed
from revnet_jax.training.stochastic import (
    block_size,
    compress,
    compressed_zeros,
    expand,
    round_to_bfloat16,
)

MOMENTS = ("float32", "bfloat16", "float8")


class RoundedState(NamedTuple):
    """An optimizer's state between steps.

    count: updates so far, int32. inner: the state, its floats narrowed. scales: None, or for float8
    a tree like `inner`, with None for what has no scales. In trees of their own, values and scales
    have paths that end in the name of their parameter, and lie on the devices where it lies.
    """

    count: jax.Array
    inner: Any
    scales: Any = None


def rounded(
    optimizer: optax.GradientTransformation, *, moments: str
) -> optax.GradientTransformation:
    """The optimizer for bfloat16 parameters, which it rounds stochastically.

    Parameters of other dtypes are updated as the optimizer itself does.

    moments: what the floats of its state, which start at 0, are kept in, rounded likewise:
      "float32"; "bfloat16"; or "float8", which is for those of kernels and embeddings, in blocks
      (see `compress`), the others in float32. Adam's average of squares, found by the name `nu` of
      its field in optax's state, is kept as square roots.

    It computes in float32: only what is carried from step to step is rounded. Rounded to the
    nearest, what moves by less than 1 / 512 of itself (in float8, 1 / 32) would not move at all: a
    weight by a small step, Adam's average of squares (b2 = 0.999). A half, or a quarter, of the
    memory, and of what an update reads and writes of it. Updates are to be applied by
    `apply_updates`. Raises ValueError for other `moments`.
    """

    def init(params):
        state = optimizer.init(widened(params))
        return RoundedState(jnp.zeros((), jnp.int32), *_narrow(state, moments, None))

    def update(grads, state, params=None):
        count = state.count + 1
        wide = None if params is None else widened(params)
        updates, inner = optimizer.update(widened(grads), _widen(state), wide)

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
    """params + updates: added in the updates' dtype, returned in the parameters'."""
    return jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)


def widened(tree: Any) -> Any:
    """Its bfloat16 leaves in float32."""
    widen = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
    return jax.tree.map(widen, tree)


def _narrow(state: Any, moments: str, step: jax.Array | None) -> tuple[Any, Any]:
    """(the state with its floats narrowed, the scales of those that have some).

    step: None before the first, where moments are 0.
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
    """The optimizer's own state, its floats in float32."""

    def widen(path, values, scales):
        return values if scales is None else expand(values, scales, squares=_are_squares(path))

    if state.scales is None:
        return widened(state.inner)
    return jax.tree_util.tree_map_with_path(widen, state.inner, state.scales)


def _are_squares(path: Any) -> bool:
    """Whether a leaf belongs to Adam's `nu`, by the field of optax's state."""
    return any(getattr(key, "name", None) == "nu" for key in path)
