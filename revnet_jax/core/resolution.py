"""How many updates the grid rounds to nothing.

A chain whose updates are finer than its grid is undone exactly, and stands still.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees
from revnet_jax.core.couplings import Coupling
from revnet_jax.core.grid import Grid


def count_updates(coupling: Coupling, x: Any, u: Any, grid: Grid | None) -> tuple[Any, Any]:
    """(elements whose update is not 0, those of them that the grid leaves as they were); int32.

    An element is left as it was if merging u gives the same as merging zeros.

    Args:
      x: a stream.
      u: its update.

    Returns zeros without a grid, or for an update that is neither a tree like the stream's nor
    several such trees.
    """
    leaves, u_leaves = jax.tree.leaves(x), jax.tree.leaves(u)
    if grid is None or not leaves or len(u_leaves) % len(leaves):
        return 0, 0
    zeros = jax.tree.map(jnp.zeros_like, u)
    merged = [jax.tree.leaves(coupling.merge(x, each, grid)[0]) for each in (u, zeros)]
    updates, lost = jnp.int32(0), jnp.int32(0)
    for i, (with_u, without) in enumerate(zip(*merged, strict=True)):
        nonzero = [leaf != 0 for leaf in u_leaves[i :: len(leaves)]]
        is_update = functools.reduce(jnp.logical_or, nonzero)
        updates += jnp.sum(is_update, dtype=jnp.int32)
        lost += jnp.sum(is_update & (with_u == without), dtype=jnp.int32)
    return updates, lost


def a_few(x: Any, u: Any) -> tuple[Any, Any]:
    """The first elements of each example, eight at most, of a stream and of its update.

    Couplings are elementwise. Nothing is taken where arrays differ in shape.

    Cost: on an H100 a small kernel for each half-step. To look at the undone stream instead would
    take another pass over it, as the compiler then fuses less.
    """
    shapes = {leaf.shape for leaf in jax.tree.leaves((x, u))}
    if len(shapes) != 1:
        return (), ()
    (shape,) = shapes
    # Of the axes after that of the examples the first element, of the last one eight; of an axis
    # that is split over devices (an Explicit one of the mesh) as many of each part.
    most = [*shape[:1], *([1] * (len(shape) - 2)), 8][: len(shape)]
    parts = [max(each) for each in zip(*map(trees.parts, jax.tree.leaves((x, u))), strict=True)]
    most = [n * p for n, p in zip(most, parts, strict=True)]
    take = lambda leaf: lax.slice(leaf, [0] * len(shape), list(map(min, shape, most)))
    return jax.tree.map(take, (x, u))
