"""Training in 16 bits: parameters and moments that are rounded up or down at random."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from revnet_jax.core import trees


class RoundedState(NamedTuple):
    """count: updates so far, int32. inner: the state, its floats in bfloat16."""

    count: jax.Array
    inner: Any


def in_bfloat16(
    optimizer: optax.GradientTransformation, *, moments: bool = True
) -> optax.GradientTransformation:
    """The optimizer for bfloat16 parameters, which it rounds stochastically.

    moments: keep the floats of its state in bfloat16, too, rounded likewise; else in float32.
      Parameters of other dtypes are updated as the optimizer itself does.

    It computes in float32: only what is carried from step to step is rounded. Rounded to the
    nearest, what moves by less than 1 / 512 of itself would not move at all: a weight by a small
    step, Adam's average of squares (b2 = 0.999). Half the memory, and half of what an update reads
    and writes of it. Updates are to be applied by `apply_updates`.
    """

    def init(params):
        inner = optimizer.init(widened(params))
        inner = _map_floats(_to_bfloat16, inner) if moments else inner
        return RoundedState(jnp.zeros((), jnp.int32), inner)

    def update(grads, state, params=None):
        count = state.count + 1
        wide = None if params is None else widened(params)
        updates, inner = optimizer.update(widened(grads), widened(state.inner), wide)
        if moments:
            inner = _map_floats(lambda leaf: round_to_bfloat16(leaf, count), inner)

        def to_a_neighbour(update, param):
            if param.dtype != jnp.bfloat16:
                return update
            param = param.astype(jnp.float32)
            return round_to_bfloat16(param + update, count).astype(jnp.float32) - param

        if params is not None:
            updates = jax.tree.map(to_a_neighbour, updates, params)
        return updates, RoundedState(count, inner)

    return optax.GradientTransformation(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates: added in the updates' dtype, returned in the parameters'."""
    return jax.tree.map(lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype), params, updates)


def widened(tree: Any) -> Any:
    """Its bfloat16 leaves in float32."""
    widen = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
    return jax.tree.map(widen, tree)


def round_to_bfloat16(x: jax.Array, step: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 next to it, each the likelier the nearer it is.

    So the mean of many roundings is x (Gupta et al. 2015, arXiv:1502.02551). What decides is a hash
    of x and the step: no key is needed, and layers that are stacked, split over devices or updated
    one by one are all rounded alike.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = _hash(bits ^ _hash(step.astype(jnp.uint32))) >> 16
    # What is cut off is 16 bits: with as many random ones added, it carries as often as it should.
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _hash(bits: jax.Array) -> jax.Array:
    """uint32: every bit of the result depends on all (the finalizer of MurmurHash3, Appleby)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _to_bfloat16(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.bfloat16)


def _map_floats(function: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: function(leaf) if trees.is_inexact(leaf) else leaf, tree)
