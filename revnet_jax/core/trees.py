"""Trees in which some leaves can be differentiated (floats) and some cannot (integers, keys)."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a tracer, a ShapeDtypeStruct, a PRNG key or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is floating point (or complex), so that it has a cotangent."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def split(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into (floating-point leaves, other leaves), each with None at the rest."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = [(leaf, is_inexact(leaf)) for leaf in leaves]
    # To JAX None is a subtree without leaves, so each half is an ordinary tree of fewer arrays.
    select = lambda kind: [v if is_it == kind else None for v, is_it in pairs]
    try:
        return structure.unflatten(select(True)), structure.unflatten(select(False))
    except Exception as error:  # a pytree class of the caller may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise TypeError(
            "got a tree of a class that rejects None in place of an array "
            f"({type(error).__name__}: {reason}), expected a `tree_unflatten` that accepts "
            "anything: JAX passes placeholders too. Check values in a separate constructor"
        ) from error


def partition(tree: Any, is_first: Any) -> tuple[Any, Any]:
    """Splits a tree by a tree of bools into (those that are True, the rest), like `split`."""
    first = jax.tree.map(lambda leaf, is_it: leaf if is_it else None, tree, is_first)
    return first, jax.tree.map(lambda leaf, is_it: None if is_it else leaf, tree, is_first)


def like(tree: Any, values: Any) -> Any:
    """The values at the leaves of `tree`, with None where `tree` has None."""
    # By default None is no leaf, and JAX would refuse the two trees for their different structure.
    is_none = lambda leaf: leaf is None
    return jax.tree.map(lambda a, b: None if a is None else b, tree, values, is_leaf=is_none)


def join(floats: Any, others: Any) -> Any:
    """Joins what `split` returned."""
    # None counts as a leaf here, so that the two halves have the same structure.
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, others, is_leaf=lambda leaf: leaf is None
    )


def add(a: Any, b: Any) -> Any:
    """Leafwise sum of two trees of equal structure."""
    return jax.tree.map(jnp.add, a, b)


def pair(value: Any, who: str, expected: str) -> tuple[Any, Any]:
    """Returns `value`; raises TypeError unless it is a pair.

    Args:
      who: what returned it, for the error message.
      expected: the pair that was expected, for the error message.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"{who} returned a {type(value).__name__}, expected a pair {expected}")
    return value


def check_arrays(tree: Any, who: str) -> None:
    """Raises TypeError unless all leaves of what `who` returned are arrays or numbers."""
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, Number):
            raise TypeError(
                f"{who} returned something of type {type(leaf).__name__}, expected arrays"
            )


def describe_array(leaf: Any) -> str:
    """The dtype and shape of a leaf, as in 'float32[4,3]', for error messages."""
    return f"{dtype_of(leaf)}[{','.join(map(str, jnp.shape(leaf)))}]"


def parts(leaf: Any) -> list[int]:
    """Over how many devices each axis is split, by the array's type: 1 on meshes of Auto axes."""
    sharding = jax.typeof(leaf).sharding
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in sharding.spec]
    sizes = [math.prod(sharding.mesh.shape[name] for name in names if name) for names in axes]
    return sizes + [1] * (leaf.ndim - len(sizes))
