"""Optimizers that keep what they know in 16 bits."""

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


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with its floats (moments) kept in bfloat16, rounded stochastically.

    It computes in float32: only what is carried from step to step is rounded. Rounded to the
    nearest, an average that moves by less than 1 / 512 of itself would not move at all, as Adam's
    of squares (b2 = 0.999). Half the memory, and half of what an update reads and writes of it.
    """

    def init(params):
        inner = optimizer.init(params)
        return RoundedState(jnp.zeros((), jnp.int32), _map_floats(_to_bfloat16, inner))

    def update(grads, state, params=None):
        count = state.count + 1
        wide = _map_floats(lambda leaf: leaf.astype(jnp.float32), state.inner)
        updates, inner = optimizer.update(grads, wide, params)
        rounded = _map_floats(lambda leaf: round_to_bfloat16(leaf, count), inner)
        return updates, RoundedState(count, rounded)

    return optax.GradientTransformation(init, update)


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
