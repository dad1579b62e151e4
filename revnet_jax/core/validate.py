"""One clear line (got, expected, what to do) for arguments that a chain cannot use.

Everything here runs while JAX traces, before anything is compiled, and costs one abstract
evaluation of a layer for each section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from revnet_jax.core import trees
from revnet_jax.core.block import Block, Context, ReversibleLayer
from revnet_jax.core.exactness import Exactness


def check_sections(
    sections: Sequence[Any], x: Any, shared: Any, backprop: str, known: tuple[str, ...]
) -> list[int]:
    """Raises unless each layer maps streams to streams as a chain needs; returns the depths."""
    if backprop not in known:
        raise ValueError(f"got backprop={backprop!r}, expected one of {', '.join(known)}")
    if not sections:
        raise ValueError("got no sections, expected at least one")
    for section in sections:
        if not hasattr(section, "layer"):
            got = type(section).__name__
            raise TypeError(f"got a {got} in a sequence, expected Section(layer, params_L)")
    common_grid(sections)
    check_streams(x)
    depths = []
    for section in sections:
        check_block(section, x)
        depths.append(depth(section))
        x = _one_layer(section, x, shared, depths[-1])
    return depths


def check_reversible(sections: Sequence[Any]) -> list[ReversibleLayer]:
    """The layers; raises for one without an inverse."""
    for section in sections:
        if not isinstance(section.layer, ReversibleLayer):
            raise ValueError(
                f"got a {type(section.layer).__name__} to be reversed, expected a layer with an "
                "inverse: build it from half-steps (a Block), or take backprop='store' or 'remat'"
            )
    return [section.layer for section in sections]


def check_stored_layers(stored_layers: int, depth: int) -> None:
    """Raises unless that many layers can store."""
    if not isinstance(stored_layers, int) or not 0 <= stored_layers <= depth:
        raise ValueError(
            f"got stored_layers={stored_layers!r}, expected a whole number from 0 to {depth}, all "
            "layers there are"
        )


def check_unroll(unroll: int) -> None:
    """Raises unless it is a number of layers per loop iteration."""
    if not isinstance(unroll, int) or unroll < 1:
        raise ValueError(f"got unroll={unroll!r}, expected a whole number of layers from 1")


def check_probe(probe: Any) -> None:
    """Raises unless it is one to differentiate, or None."""
    if not isinstance(probe, Exactness | None):
        raise TypeError(f"got probe={probe!r}, expected Exactness.probe(), or None for no check")


def check_states(sections: Sequence[Any], depths: Sequence[int], update: Any) -> None:
    """Raises unless states are stacked floats, and only where there is an update to use them."""
    for section, depth in zip(sections, depths, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(section.state_L):
            got = f"state_L{jax.tree_util.keystr(path)} {trees.describe(leaf)}"
            if update is None:
                raise ValueError(f"got {got} but no `update`, expected both or neither")
            if not trees.is_inexact(leaf) or jnp.shape(leaf)[:1] != (depth,):
                raise ValueError(
                    f"got {got}, expected floats with a leading axis of {depth}, one for each "
                    "layer: a backward pass can return no others. Keep counters outside"
                )


def common_grid(sections: Sequence[Any]) -> Any:
    """The grid of all layers that have one, or None; raises where they differ."""
    grids = {section.layer.grid for section in sections if hasattr(section.layer, "grid")}
    if len(grids) > 1:
        raise ValueError(
            f"got blocks with {' and '.join(map(str, grids))} in one sequence, expected one grid: "
            "streams of a finer one are not exact on a coarser"
        )
    return grids.pop() if grids else None


def check_streams(x: Any, who: str = "got") -> None:
    """Raises unless x is a tuple of trees of floats."""
    if type(x) is not tuple:
        raise TypeError(
            f"{who} streams of type {type(x).__name__}, expected a plain tuple: (x1, x2)"
        )
    for leaf in jax.tree.leaves(x):
        if not trees.is_inexact(leaf):
            raise TypeError(f"{who} a stream {trees.describe(leaf)}, expected floating point")


def depth(section: Any) -> int:
    """L: the common leading axis of all that is stacked, or the section's `length`."""
    length = section.length
    if not isinstance(length, int | None):
        raise TypeError(f"got length={length!r}, expected a whole number of layers")
    depths: dict[Any, str] = {} if length is None else {length: "length"}
    for name, tree in (("params_L", section.params_L), ("data_L", section.data_L)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            shape = jnp.shape(leaf)
            depths.setdefault(shape[0] if shape else None, name + jax.tree_util.keystr(path))
    if None in depths:
        raise ValueError(f"{depths[None]} is a scalar, expected a leading axis of one per layer")
    if not depths:
        raise ValueError("got no arrays in params_L and data_L, expected `length` to say how many")
    if len(depths) != 1:
        got = ", ".join(f"{depth} in {path}" for depth, path in depths.items())
        raise ValueError(
            f"got leading axes {got}, expected one depth L shared by all of params_L and data_L: "
            "trees of the layers, stacked"
        )
    (result,) = depths
    if result < 1:
        raise ValueError(f"got a chain of {result} layers, expected at least one")
    return result


def check_block(section: Any, x: Any) -> None:
    """Raises unless a block gets as many streams and parameters as it has half-steps for."""
    block, params_L = section.layer, section.params_L
    if not isinstance(block, Block):
        return
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


def _one_layer(section, x, shared, depth):
    """Evaluates one layer abstractly, and returns what its streams become."""
    layer, stacked = section.layer, (section.params_L, section.data_L)
    params, data = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), stacked)

    def forward(params, x, shared, data):
        return layer.forward(params, x, Context(shared, data))[0]

    program, y = jax.make_jaxpr(forward, return_shape=True)(params, x, shared, data)
    check_streams(y, f"the {type(layer).__name__} returned")
    if depth > 1:
        if len(y) != len(x):
            raise ValueError(f"the layer maps {len(x)} streams to {len(y)}, expected as many")
        for i, (before, after) in enumerate(zip(x, y, strict=True)):
            got = [trees.describe(leaf) for leaf in jax.tree.leaves(after)]
            expected = [trees.describe(leaf) for leaf in jax.tree.leaves(before)]
            if got != expected or jax.tree.structure(before) != jax.tree.structure(after):
                raise ValueError(
                    f"the layer maps stream {i} from {', '.join(expected)} to {', '.join(got)}, "
                    "expected the layers of a chain to keep shapes and dtypes: put one that "
                    "changes them into a section of its own"
                )
    # A custom gradient cannot see what a branch closes over, and outlives it.
    closed_over = [trees.describe(v) for v in program.consts if isinstance(v, Tracer)]
    if closed_over:
        raise ValueError(
            f"a branch closes over traced values ({', '.join(closed_over)}), expected it to close "
            "over constants only: their gradient would be lost. Pass them through the chain's "
            "`shared`, or `data_L` where each layer has its own"
        )
    return y
