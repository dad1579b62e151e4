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
    pick: Callable[[list[jax.Array]], list[jax.Array]] = lambda arrays: arrays,
) -> tuple[Any, Any]:
    """(elements whose update is not 0, those of them that the grid leaves as they were); int32.

    An element is left as it was if merging u gives the same as merging `coupling.idle(u)`.

    Args:
      x: a stream.
      u: its update.
      pick: takes some elements of arrays of one shape, the same of each.

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
        with_u, without, *mine = pick([with_u, without, *updates[i :: len(leaves)]])
        is_update = functools.reduce(jnp.logical_or, [leaf != 0 for leaf in mine], jnp.bool_(False))
        count += jnp.sum(is_update, dtype=jnp.int32)
        lost += jnp.sum(is_update & (with_u == without), dtype=jnp.int32)
    return count, lost


def a_few(arrays: list[jax.Array]) -> list[jax.Array]:
    """The first elements of each example, eight at most, of arrays of one shape.

    Cost: on an H100 a small kernel for each half-step, which computes no others. To look at the
    undone stream instead would take another pass over it, as the compiler then fuses less.
    """
    # One element of each axis after that of the examples, and eight of the last. An axis that is
    # split over devices (an Explicit one of the mesh) gives as many of each part.
    shape = arrays[0].shape
    most = [*shape[:1], *([1] * (len(shape) - 2)), 8][: len(shape)]
    parts = [max(each) for each in zip(*map(trees.parts, arrays), strict=True)]
    most = [n * p for n, p in zip(most, parts, strict=True)]
    return [lax.slice(leaf, [0] * len(shape), list(map(min, shape, most))) for leaf in arrays]
