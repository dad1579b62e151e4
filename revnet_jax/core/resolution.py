"""How many updates the grid rounds to nothing.

A chain whose updates are finer than its grid is undone exactly, and stands still.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees
from revnet_jax.core.couplings import Coupling
from revnet_jax.core.grid import Grid


def count_updates(
    coupling: Coupling,
    x: Any,
    u: Any,
    grid: Grid | None,
    pick: Callable[[jax.Array], jax.Array] = lambda leaf: leaf,
) -> tuple[Any, Any]:
    """(elements whose update is not 0, those of them that the grid leaves as they were); int32.

    An element is left as it was if merging u gives the same as merging `coupling.idle(u)`.

    Args:
      x: a stream.
      u: its update.
      pick: takes some elements of an array, of all of which it is given the results.

    Returns zeros without a grid, or for an update that is neither a tree like the stream's nor
    several such trees.
    """
    leaves, idle = jax.tree.leaves(x), coupling.idle(u)
    pairs = zip(jax.tree.leaves(u), jax.tree.leaves(idle), strict=True)
    # What an idle update has, too, is no part of the update.
    updates = [leaf for leaf, idle_leaf in pairs if leaf is not idle_leaf]
    shapes = [leaf.shape for leaf in leaves]
    if (
        grid is None
        or not leaves
        or [leaf.shape for leaf in updates] != shapes * (len(updates) // len(leaves))
    ):
        return 0, 0
    merged = [jax.tree.leaves(coupling.merge(x, each, grid)[0]) for each in (u, idle)]
    count, lost = jnp.int32(0), jnp.int32(0)
    for i, (with_u, without) in enumerate(zip(*merged, strict=True)):
        nonzero = [pick(leaf) != 0 for leaf in updates[i :: len(leaves)]]
        is_update = functools.reduce(jnp.logical_or, nonzero, jnp.bool_(False))
        count += jnp.sum(is_update, dtype=jnp.int32)
        lost += jnp.sum(is_update & (pick(with_u) == pick(without)), dtype=jnp.int32)
    return count, lost


def a_few(leaf: jax.Array) -> jax.Array:
    """The first elements of each example of an array, eight at most.

    Cost: on an H100 a small kernel for each half-step, which computes no others. To look at the
    undone stream instead would take another pass over it, as the compiler then fuses less.
    """
    # Of the axes after that of the examples the first element, of the last one eight; of an axis
    # that is split over devices (an Explicit one of the mesh) as many of each part.
    most = [*leaf.shape[:1], *([1] * (leaf.ndim - 2)), 8][: leaf.ndim]
    most = [n * parts for n, parts in zip(most, trees.parts(leaf), strict=True)]
    return lax.slice(leaf, [0] * leaf.ndim, list(map(min, leaf.shape, most)))
