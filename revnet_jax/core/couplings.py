"""How a half-step merges its update into a stream, and takes it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from revnet_jax.core import trees
from revnet_jax.core.grid import Grid, snap


class Coupling(NamedTuple):
    """A pair of pure functions with `unmerge(merge(x, u, grid), u, grid) == x`.

    merge(x, u, grid) -> y: stream `x` (a tree of arrays) updated by `u`, what the branch returned
      (any tree: a coupling says what it expects). Differentiated by JAX, so that no gradient is
      written by hand. With a grid, exact on it.
    unmerge(y, u, grid) -> x: undoes it. Never differentiated.
    """

    merge: Callable[[Any, Any, Grid | None], Any]
    unmerge: Callable[[Any, Any, Grid | None], Any]


def additive() -> Coupling:
    """`y = x + u`: NICE (Dinh et al. 2014, arXiv:1410.8516), RevNet (arXiv:1707.04585, eq. 6).

    `u` has the stream's structure and shapes, in any floating dtype. Exact on a grid.
    """

    def merge(x: Any, u: Any, grid: Grid | None) -> Any:
        return trees.add(x, snap(grid, _like(u, x)))

    def unmerge(y: Any, u: Any, grid: Grid | None) -> Any:
        return jax.tree.map(jnp.subtract, y, snap(grid, _like(u, y)))

    return Coupling(merge, unmerge)


def _like(u: Any, x: Any) -> Any:
    """`u` cast to the stream's dtypes; raises where its structure or shapes differ."""
    got = [trees.describe(leaf) for leaf in jax.tree.leaves(u)]
    expected = [trees.describe(leaf) for leaf in jax.tree.leaves(x)]
    same_shapes = [jnp.shape(a) for a in jax.tree.leaves(u)] == [
        jnp.shape(b) for b in jax.tree.leaves(x)
    ]
    if jax.tree.structure(u) != jax.tree.structure(x) or not same_shapes:
        raise ValueError(
            f"a branch returned {', '.join(got) or type(u).__name__}, expected the shape of the "
            f"stream it updates, {', '.join(expected)}: an additive update changes no shape"
        )
    return jax.tree.map(lambda a, b: a.astype(trees.dtype_of(b)), u, x)
