"""Validation of a chain's arguments; each error says what was got, expected, and what to do.

Everything here runs while JAX traces, before anything is compiled. It costs one abstract
evaluation of a layer of each section, of its inverse and of its update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from revnet_jax.core import trees
from revnet_jax.core.block import Block, Context, ReversibleLayer
from revnet_jax.core.constants import is_whole
from revnet_jax.core.exactness import Exactness


def arrays(name: str, tree: Any) -> Any:
    """Converts NumPy arrays to JAX arrays (float64 to float32); raises TypeError for other leaves.

    Args:
      name: of the argument, for the error message.
    """

    def checked(path, leaf):
        # Python numbers stay as they are, so that they take the dtype of what they meet.
        if isinstance(leaf, jax.Array | Number | jax.ShapeDtypeStruct):
            return leaf
        with contextlib.suppress(TypeError):  # of a dtype that JAX has not
            if hasattr(leaf, "__array__"):
                return jnp.asarray(leaf)
        got = f"{name}{jax.tree_util.keystr(path)} of type {type(leaf).__name__}"
        got += f" and dtype {leaf.dtype}" if hasattr(leaf, "dtype") else ""
        raise TypeError(
            f"got {got}, expected an array: write constants that are not arrays into the branch"
        )

    return jax.tree_util.tree_map_with_path(checked, tree)


def streams(name: str, x: Any) -> Any:
    """Like `arrays`, of dtypes of their own: Python numbers become arrays, weak types strong."""
    # A weakly typed array would take another dtype where it meets one, but not once it is rebuilt.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, trees.dtype_of(leaf)), arrays(name, x))


def checked_sections(sections: Iterable[Any]) -> tuple[Any, ...]:
    """Returns the sections as a tuple, with JAX arrays; raises unless each is a valid `Section`.

    Their data has no gradient any more.
    """
    # A Section is a tuple itself, so that iterating over it would give its fields.
    if hasattr(sections, "layer"):
        raise TypeError("got a Section as a sequence, expected a list of them: [Section(...)]")
    # A generator can be read once only, and every check reads the sections.
    sections = tuple(sections)
    if not sections:
        raise ValueError("got no sections, expected at least one")
    for section in sections:
        if not hasattr(section, "layer"):
            got = type(section).__name__
            raise TypeError(f"got a {got} in a sequence, expected Section(layer, params_L)")
        layer = section.layer
        # A class has `forward` too, as a function that still lacks its instance.
        if isinstance(layer, type) or not callable(getattr(layer, "forward", None)):
            got = getattr(layer, "__name__", repr(layer))
            raise TypeError(
                f"got {got} as a layer, expected one with `forward`: what `reversible_block(f, g)` "
                "returns, or an Invertible or PlainLayer of functions"
            )
    stacked = ("params_L", "data_L", "state_L")
    sections = [s._replace(**{n: arrays(n, getattr(s, n)) for n in stacked}) for s in sections]
    return tuple(s._replace(data_L=lax.stop_gradient(s.data_L)) for s in sections)


def check_sections(
    sections: Sequence[Any], x: Any, shared: Any, backprop: str, known: tuple[str, ...]
) -> list[int]:
    """Returns the depth of each section; raises if a layer cannot be part of a chain."""
    if backprop not in known:
        raise ValueError(f"got backprop={backprop!r}, expected one of {', '.join(known)}")
    common_grid(sections)
    check_streams(x)
    depths = []
    for section in sections:
        check_block(section, x)
        depths.append(section_depth(section))
        # The shapes that the next section gets: a section of one layer may change them.
        x = _one_layer(section, x, shared, depths[-1], backprop == "reverse")
    return depths


def check_invertible(sections: Sequence[Any]) -> list[ReversibleLayer]:
    """Returns the layers of the sections; raises ValueError if one has no inverse."""
    for section in sections:
        if not isinstance(section.layer, ReversibleLayer):
            raise ValueError(
                f"got a {type(section.layer).__name__} to be reversed, expected a layer with an "
                "inverse: build it from half-steps (a Block), or take backprop='store' or 'remat'"
            )
    return [section.layer for section in sections]


def checked_stored_layers(stored_layers: Any, depth: int) -> int:
    """Returns it as a Python integer; raises ValueError unless it is 0 to `depth`."""
    if not is_whole(stored_layers) or not 0 <= stored_layers <= depth:
        raise ValueError(
            f"got stored_layers={stored_layers!r}, expected a whole number from 0 to {depth}, the "
            "number of layers"
        )
    return int(stored_layers)


def checked_unroll(unroll: Any) -> int:
    """Returns it as a Python integer; raises ValueError unless it is a positive integer."""
    if not is_whole(unroll) or unroll < 1:
        raise ValueError(f"got unroll={unroll!r}, expected a whole number of layers from 1")
    return int(unroll)


def check_probe(probe: Any) -> None:
    """Raises TypeError unless the probe is an `Exactness` or None."""
    if not isinstance(probe, Exactness | None):
        raise TypeError(f"got probe={probe!r}, expected Exactness.probe(), or None for no check")


def check_states(sections: Sequence[Any], depths: Sequence[int], update: Any) -> None:
    """Raises unless states are stacked floats, and given only with an update, a function."""
    if update is not None and not callable(update):
        raise TypeError(
            f"got update={update!r}, expected a function of (dparams, state, params) that "
            "returns (params, state)"
        )
    for section, depth in zip(sections, depths, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(section.state_L):
            got = f"state_L{jax.tree_util.keystr(path)} {trees.describe_array(leaf)}"
            if update is None:
                raise ValueError(f"got {got} but no `update`, expected both or neither")
            if not trees.is_inexact(leaf) or jnp.shape(leaf)[:1] != (depth,):
                raise ValueError(
                    f"got {got}, expected floats with a leading axis of {depth}, one for each "
                    "layer: a backward pass can return no others. Keep counters outside"
                )


def common_grid(sections: Sequence[Any]) -> Any:
    """Returns the grid of all layers that have one, or None; raises ValueError if grids differ."""
    # A block with grid=None counts as one with another grid.
    grids = {section.layer.grid for section in sections if hasattr(section.layer, "grid")}
    if len(grids) > 1:
        raise ValueError(
            f"got blocks with {' and '.join(map(str, grids))} in one sequence, expected one grid: "
            "streams of a finer one are not exact on a coarser"
        )
    return grids.pop() if grids else None


def check_streams(x: Any, who: str = "got") -> None:
    """Raises unless x is a tuple of trees of floats."""
    # No NamedTuple either: layers return plain tuples, and a loop's carry has to keep its type.
    if type(x) is not tuple:
        raise TypeError(
            f"{who} streams of type {type(x).__name__}, expected a plain tuple: (x1, x2)"
        )
    for leaf in jax.tree.leaves(x):
        if not trees.is_inexact(leaf):
            raise TypeError(f"{who} a stream {trees.describe_array(leaf)}, expected floating point")


def section_depth(section: Any) -> int:
    """Returns L, the common leading axis of params_L and data_L, or the section's `length`."""
    length = section.length
    if length is not None and not is_whole(length):
        raise TypeError(f"got length={length!r}, expected a whole number of layers")
    # Each depth that occurs, with the first place that has it, for the error message.
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
    return int(result)


def check_block(section: Any, x: Any) -> None:
    """Raises unless the streams and parameters fit the half-steps of a block in number and type."""
    block, params_L = section.layer, section.params_L
    if not isinstance(block, Block):
        return
    if block.grid is not None:
        block.grid.check(x)
    if len(x) != block.num_streams:
        raise ValueError(
            f"got {len(x)} streams, expected the {block.num_streams} the block acts on"
        )
    if type(params_L) is not tuple or len(params_L) != len(block.half_steps):
        got = f"{len(params_L)}" if type(params_L) is tuple else f"a {type(params_L).__name__}"
        raise ValueError(
            f"got block parameters {got}, expected a tuple of {len(block.half_steps)}: "
            "one tree for each half-step"
        )


def check_update(sections: Sequence[Any], given: Sequence[Any], update: Any) -> None:
    """Raises unless the update keeps the structure, shapes and dtypes of parameters and states.

    Args:
      sections: with the parameters that are updated, as the custom gradient sees them.
      given: those parameters as the caller of the chain passed them.
    """
    if update is None:
        return
    floats = [trees.split(section.params_L)[0] for section in sections]
    traces = [leaf._trace for leaf in jax.tree.leaves(given) if isinstance(leaf, Tracer)]
    still_there = list(map(_outside_of_gradient, traces))
    for section, floats_L in zip(sections, floats, strict=True):
        if not jax.tree.leaves(floats_L):
            continue
        program = _one_update(floats_L, section.state_L, update)
        # The update runs in the backward pass, at the level where `jax.grad` is called. A value
        # traced outside of that, as by one `jax.jit` of the whole step, still exists there. A value
        # traced within, by a `jit`, `vmap` or `scan`, does not.
        lost = [
            value
            for value in _traced(program)
            if any(all(value._trace is not trace for trace in there) for there in still_there)
        ]
        if lost:
            raise ValueError(
                f"update closes over traced values ({_described(lost)}) that are gone when it "
                "runs, in the backward pass, expected constants, or what is traced outside of "
                "`jax.grad`: pass a learning rate in the state (state_L, one for each layer), or "
                "jit the whole step"
            )


def _outside_of_gradient(trace):
    """The traces outside of the innermost `jax.grad` around `trace`, or around `trace` itself.

    `_trace` and `parent_trace` are private attributes of JAX; there is no public way to ask.
    """
    outwards = []
    while trace is not None:
        outwards.append(trace)
        trace = getattr(trace, "parent_trace", None)
    differentiates = [type(each).__name__ in ("JVPTrace", "LinearizeTrace") for each in outwards]
    return outwards[1 + (differentiates.index(True) if any(differentiates) else 0) :]


def _one_update(floats_L, state_L, update):
    """Traces one layer's update; raises ValueError if its results cannot replace the old values."""
    got = params, state = jax.eval_shape(_first, (floats_L, state_L))

    def run(dparams, state, params):
        new = trees.pair(update(dparams, state, params), "update", "(params, state)")
        trees.check_arrays(new, "update")
        return new

    program, new = jax.make_jaxpr(run, return_shape=True)(params, state, params)
    if jax.tree.structure(new) != jax.tree.structure(got):
        raise ValueError(
            "update returned trees of another structure than the params and state it got, "
            "expected the same: pass its state as state_L"
        )
    for (path, leaf), before in zip(
        jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(got), strict=True
    ):
        if trees.describe_array(leaf) != trees.describe_array(before):
            # The results are a pair, so each path begins with the index into it.
            where = ("params", "state")[path[0].idx] + jax.tree_util.keystr(path[1:])
            raise ValueError(
                f"update returned {where} {trees.describe_array(leaf)}, expected "
                f"{trees.describe_array(before)}: new values take the place of the old, and keep "
                "their shapes and dtypes"
            )
    return program


def _one_layer(section, x, shared, depth, reverses):
    """Evaluates one layer abstractly, checks it, and returns its output streams.

    reverses: whether to check its inverse too, if it has one.
    """
    layer = section.layer
    layers_L = section.params_L, section.data_L
    reverses = reverses and isinstance(layer, ReversibleLayer)

    def forward(layers_L, x, shared):
        params, data = _first(layers_L)
        if reverses and isinstance(layer, Block):
            return _there_and_back(layer, params, x, Context(shared, data))
        y, _, residue, *_ = layer.forward(params, x, Context(shared, data))
        return y, residue if reverses else None

    def inverse(layers_L, y, residue, shared):
        params, data = _first(layers_L)
        return layer.inverse(params, y, residue, Context(shared, data))

    name = type(layer).__name__
    # Traced rather than evaluated by shape alone, to see what the layer closes over.
    program, (y, residue) = jax.make_jaxpr(forward, return_shape=True)(layers_L, x, shared)
    check_streams(y, f"the {name} returned")
    # A loop's carry has to keep its shapes. One layer runs without a loop.
    if depth > 1:
        _check_kept(x, y)
    _check_closed_over(program)
    if reverses and isinstance(layer, Block):
        _check_undone("a coupling's unmerge", *residue)
    elif reverses:
        program, rebuilt = jax.make_jaxpr(inverse, return_shape=True)(layers_L, y, residue, shared)
        check_streams(rebuilt, f"the inverse of the {name} returned")
        _check_undone(f"the inverse of the {name}", x, rebuilt)
        _check_closed_over(program)
    return y


def _there_and_back(block, params, x, context):
    """Applies and undoes each half-step, evaluating each branch once.

    Returns (y, (the updated stream before each half-step, the same after undoing it)).
    """
    streams, before, rebuilt = list(x), [], []
    for step, step_params in zip(block.half_steps, params, strict=True):
        u, _, streams, _ = step.evaluate(step_params, streams, context)
        before.append(streams[step.updates])
        y, residue = step.merge(before[-1], u, block.grid)
        rebuilt.append(step.coupling.unmerge(y, u, residue, block.grid))
        streams[step.updates] = y
    return block.arranged(streams), (tuple(before), tuple(rebuilt))


def _check_kept(x, y):
    if len(y) != len(x):
        raise ValueError(f"the layer maps {len(x)} streams to {len(y)}, expected the same number")
    for i, (before, after) in enumerate(zip(x, y, strict=True)):
        if not _alike(before, after):
            raise ValueError(
                f"the layer maps stream {i} from {_described(before)} to {_described(after)}, "
                "expected the layers of a chain to keep shapes and dtypes: put one that "
                "changes them into a section of its own"
            )


def _check_undone(who, x, rebuilt):
    if not _alike(x, rebuilt):
        raise ValueError(
            f"{who} returned {_described(rebuilt)}, expected what it undoes, {_described(x)}"
        )


def _check_closed_over(program):
    """Raises ValueError if the program closes over traced values.

    A custom gradient does not see closed-over values, and runs after their trace has ended.
    """
    closed_over = _traced(program)
    if closed_over:
        raise ValueError(
            f"a branch closes over traced values ({_described(closed_over)}), or a coupling or an "
            "inverse does, expected constants only: their gradient would be lost. Pass them "
            "through the chain's `shared`, or `data_L` where each layer has its own"
        )


def _traced(program):
    return [value for value in program.consts if isinstance(value, Tracer)]


def _first(tree_L):
    """One layer's slice of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[0], tree_L)


def _alike(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and _described(a) == _described(b)


def _described(tree):
    return ", ".join(map(trees.describe_array, jax.tree.leaves(tree))) or "nothing"
