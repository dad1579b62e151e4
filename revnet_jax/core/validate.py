"""One clear line (got, expected, what to do) for arguments that a chain cannot use.

Everything here runs while JAX traces, before anything is compiled, and costs one abstract
evaluation of a layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from revnet_jax.core import trees
from revnet_jax.core.block import Block, Context, Layer


def strategy(backprop: str, known: tuple[str, ...], layer: Layer) -> None:
    """Raises for a strategy that does not exist, or that the layer has no inverse for."""
    if backprop not in known:
        raise ValueError(f"got backprop={backprop!r}, expected one of {', '.join(known)}")
    if backprop == "reverse" and not hasattr(layer, "rewind"):
        raise ValueError(
            f"got backprop='reverse' for a {type(layer).__name__}, expected a layer with an "
            "inverse: build it from half-steps (a Block), or take 'store' or 'remat'"
        )


def chain_arguments(layer: Layer, params_L: Any, x: Any, shared: Any, data_L: Any) -> None:
    """Raises unless one layer, applied to one slice, maps the streams to streams alike."""
    if type(x) is not tuple:
        raise TypeError(f"got streams of type {type(x).__name__}, expected a plain tuple: (x1, x2)")
    for leaf in jax.tree.leaves(x):
        if not trees.is_inexact(leaf):
            raise TypeError(f"got a stream {trees.describe(leaf)}, expected floating point")
    if isinstance(layer, Block):
        _block(layer, params_L, x)
    _depth(params_L, data_L)
    _one_layer(layer, params_L, x, shared, data_L)


def _block(block, params_L, x):
    if block.grid is not None:
        block.grid.check(x)
    num_streams = 1 + max(max((s.updates, *s.reads)) for s in block.half_steps)
    if len(x) != num_streams:
        raise ValueError(f"got {len(x)} streams, expected the {num_streams} the block acts on")
    if type(params_L) is not tuple or len(params_L) != len(block.half_steps):
        got = f"{len(params_L)}" if type(params_L) is tuple else f"a {type(params_L).__name__}"
        raise ValueError(
            f"got block parameters {got}, expected a tuple of {len(block.half_steps)}: "
            "one tree for each half-step"
        )


def _depth(params_L, data_L):
    """The common leading axis L of all stacked leaves."""
    depths = {}
    for name, tree in (("params_L", params_L), ("data_L", data_L)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape = jnp.shape(leaf)
            depths.setdefault(shape[0] if shape else None, name + jax.tree_util.keystr(path))
    if None in depths:
        raise ValueError(f"{depths[None]} is a scalar, expected a leading axis of one per layer")
    if len(depths) != 1:
        got = ", ".join(f"{depth} in {path}" for depth, path in depths.items()) or "no arrays"
        raise ValueError(
            f"got leading axes {got}, expected one depth L shared by all of params_L and data_L"
        )


def _one_layer(layer, params_L, x, shared, data_L):
    params, data = jax.eval_shape(
        lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), (params_L, data_L)
    )

    def forward(params, x, shared, data):
        return layer.forward(params, x, Context(shared, data))

    args = params, x, shared, data
    program, (y, _) = jax.make_jaxpr(forward, return_shape=True)(*args)
    for i, (before, after) in enumerate(zip(x, y, strict=True)):
        got = [trees.describe(leaf) for leaf in jax.tree.leaves(after)]
        expected = [trees.describe(leaf) for leaf in jax.tree.leaves(before)]
        if got != expected or jax.tree.structure(before) != jax.tree.structure(after):
            raise ValueError(
                f"the layer maps stream {i} from {', '.join(expected)} to {', '.join(got)}, "
                "expected a chain's layers to keep shapes and dtypes"
            )
    # A custom gradient cannot see what a branch closes over.
    closed_over = [
        trees.describe(value)
        for value in program.consts
        if isinstance(value, Tracer) and trees.is_inexact(value)
    ]
    if closed_over:
        raise ValueError(
            f"a branch closes over traced values ({', '.join(closed_over)}), expected it to close "
            "over constants only: their gradient would be lost. Pass them through the chain's "
            "`shared`"
        )
