"""Chains of layers, with a choice of what their gradient costs.

| backprop | kept per layer            | extra compute                          |
|----------|---------------------------|----------------------------------------|
| store    | all of f's intermediates  | none                                   |
| remat    | the streams               | one forward, less what is not needed   |
| reverse  | nothing (or a residue)    | one forward                            |

All three compute the same function of the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees, validate
from revnet_jax.core.block import Context, Layer, ReversibleLayer, Streams
from revnet_jax.core.exactness import Exactness, compare, largest
from revnet_jax.core.grid import snap

Backprop = Literal["store", "remat", "reverse"]
STRATEGIES: tuple[Backprop, ...] = get_args(Backprop)


class Section(NamedTuple):
    """Equal layers in a row, run by one `lax.scan`; or one layer, which may change shapes.

    layer: a `Block` or another reversible layer, or any `Layer` under `store` and `remat`.
    params_L: the layers' parameters, stacked: every leaf has a leading axis L. Differentiated.
    data_L: per-layer data, stacked (PRNG keys, statistics); not differentiated.
    length: L, where nothing is stacked that would tell.
    """

    layer: Layer | ReversibleLayer
    params_L: Any = ()
    data_L: Any = None
    length: int | None = None


def chain(
    layer: Layer,
    params_L: Any,
    x: Streams,
    *,
    shared: Any = None,
    data_L: Any = None,
    length: int | None = None,
    backprop: Backprop = "reverse",
    probe: Exactness | None = None,
) -> tuple[Streams, Any]:
    """Applies L equal layers in turn: `(y, aux_L)`.

    layer, params_L, data_L, length: see `Section`. Layers that share their weights have them in
      `shared`, and say how many they are by `length`.
    x: a tuple of streams. Snapped to the block's grid, where it has one. Differentiated.
    shared: side inputs that every layer sees; differentiated, cotangents summed over layers.
    backprop: `store`, `remat` or `reverse`.
    probe: `Exactness.probe()`; its cotangent is the run-time exactness check of `reverse`, at the
      price of keeping the chain's input.

    aux_L: the layers' auxiliary outputs, stacked; floating-point leaves are differentiable.

    Cost of the gradient, in evaluations of the branches: store 1 forward + 2 backward, remat and
    reverse one forward more. Memory besides parameters and their gradients: with reverse the
    streams, their cotangents and one layer's intermediates, whatever the depth, and per layer
    what its couplings cannot undo without (`Coupling`, residue).
    `reverse` has no forward-mode derivative: take `store` for a jvp. Second derivatives are right
    under all three.

    Raises ValueError or TypeError while tracing for an unknown strategy, leading axes that
    differ, a layer that changes the streams' shapes or dtypes, streams too narrow for the grid, or
    a branch that closes over a traced float (pass it through `shared`).
    """
    section = Section(layer, params_L, data_L, length)
    y, (aux_L,) = sequence((section,), x, shared=shared, backprop=backprop, probe=probe)
    return y, aux_L


def sequence(
    sections: Sequence[Section],
    x: Streams,
    *,
    shared: Any = None,
    backprop: Backprop = "reverse",
    probe: Exactness | None = None,
) -> tuple[Streams, tuple[Any, ...]]:
    """A chain of different layers, under one gradient: `(y, aux_L of each section)`.

    As `chain`, section after section. Under `reverse` nothing is kept between them either. Layers
    with a grid must have the same one.
    """
    depths = validate.check_sections(sections, x, shared, backprop, STRATEGIES)
    x = _on_grid(sections, x)
    sections = tuple(
        section._replace(data_L=lax.stop_gradient(section.data_L), length=depth)
        for section, depth in zip(sections, depths, strict=True)
    )
    if backprop == "reverse":
        return _reverse(sections, x, shared, probe)
    y, auxes, _ = _forward(sections, x, shared, remat=backprop == "remat")
    return y, auxes


def sequence_forward(
    sections: Sequence[Section], x: Streams, *, shared: Any = None
) -> tuple[Streams, tuple[Any, ...], tuple[Any, ...]]:
    """`sequence` with what `sequence_inverse` needs: `(y, auxes, residue_L of each section)`."""
    depths = validate.check_sections(sections, x, shared, "reverse", STRATEGIES)
    sections = [s._replace(length=n) for s, n in zip(sections, depths, strict=True)]
    return _forward(sections, _on_grid(sections, x), shared)


def sequence_inverse(
    sections: Sequence[Section],
    y: Streams,
    residues: Sequence[Any] | None = None,
    *,
    shared: Any = None,
) -> Streams:
    """The input of a sequence from its output; residues only where couplings leave some.

    `sequence_inverse(sections, y, residues) == x` after `y, _, residues =
    sequence_forward(sections, x)`: bit for bit while the grid's range holds, given an x on the
    grid and layers that are exact. One evaluation of each branch; memory independent of depth.
    """
    layers = validate.check_reversible(sections)
    validate.common_grid(sections)
    validate.check_streams(y)
    residues = [None] * len(sections) if residues is None else residues
    if len(residues) != len(sections):
        raise ValueError(
            f"got residues of {len(residues)} sections, expected {len(sections)}: all that "
            "`sequence_forward` returned"
        )
    steps = zip(layers, sections, residues, strict=True)
    for layer, section, residue_L in reversed(list(steps)):
        validate.check_block(section, y)

        def body(y, layer_slice, layer=layer):
            params, data, residue = layer_slice
            return layer.inverse(params, y, residue, Context(shared, data)), None

        xs = section.params_L, section.data_L, residue_L
        y, _ = _scan(body, y, xs, validate.depth(section), reverse=True)
    return y


def _on_grid(sections, x):
    return snap(validate.common_grid(sections), x)


def _scan(body, carry, xs, length, *, reverse=False):
    """`lax.scan`, except that a single layer, applied as it is, may change the carry's shapes."""
    if length != 1:
        return lax.scan(body, carry, xs, length, reverse=reverse)
    run = lambda carry, xs: body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    # A loop's edges keep the compiler from rewriting a layer together with its neighbours, which
    # are others on the way back, and from summing in another order then. Here it is a condition
    # that does so; it always holds, except for streams that are not numbers any more.
    not_a_number = lambda leaf: jnp.full(
        leaf.shape, jnp.nan if trees.is_inexact(leaf) else 0, leaf.dtype
    )
    outputs = jax.eval_shape(run, carry, xs)
    stream = jnp.ravel(jax.tree.leaves(carry)[0])
    carry, ys = lax.cond(
        jnp.all(stream[:1] <= jnp.inf),
        run,
        lambda carry, xs: jax.tree.map(not_a_number, outputs),
        carry,
        xs,
    )
    return carry, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), ys)


def _forward(sections, x, shared, *, remat=False):
    auxes, residues = [], []
    for section in sections:

        def body(x, layer_slice, layer=section.layer):
            params, data = layer_slice
            y, aux, residue = layer.forward(params, x, Context(shared, data))
            return y, (aux, residue)

        # In a loop's body nothing is merged with its recompute; outside that must be prevented.
        run = jax.checkpoint(body, prevent_cse=section.length == 1) if remat else body
        xs = section.params_L, section.data_L
        x, (aux_L, residue_L) = _scan(run, x, xs, section.length)
        auxes.append(aux_L)
        residues.append(residue_L)
    return x, tuple(auxes), tuple(residues)


def _reverse(sections, x, shared, probe):
    """One custom gradient over all sections: a gradient per layer would keep every output."""
    params, params_rest = trees.split([section.params_L for section in sections])
    shared, shared_rest = trees.split(shared)
    data = [section.data_L for section in sections]

    def joined(params, shared, not_differentiated):
        params_rest, shared_rest, data = not_differentiated
        filled = [
            section._replace(params_L=params_L, data_L=data_L)
            for section, params_L, data_L in zip(
                sections, trees.join(params, params_rest), data, strict=True
            )
        ]
        return filled, trees.join(shared, shared_rest)

    @jax.custom_vjp
    def run(params, x, shared, probe, not_differentiated):
        sections, shared = joined(params, shared, not_differentiated)
        return _forward(sections, x, shared)[:2]

    def forward(params, x, shared, probe, not_differentiated):
        sections, full_shared = joined(params, shared, not_differentiated)
        y, auxes, residues = _forward(sections, x, full_shared)
        true_x = None if probe is None else x
        return (y, auxes), (params, y, shared, not_differentiated, residues, true_x)

    def backward(kept, cotangents):
        params, y, shared, not_differentiated, residues, true_x = kept
        dy, dauxes = cotangents
        sections, shared = joined(params, shared, not_differentiated)
        swept = sweep(
            sections,
            y,
            dy,
            trees.split(dauxes)[0],
            residues,
            shared,
            track_range=true_x is not None,
        )
        dprobe = None if true_x is None else compare(swept.x, true_x, swept.max_abs)
        return swept.dparams, swept.dx, swept.dshared, dprobe, None

    run.defvjp(forward, backward)
    try:
        return run(params, x, shared, probe, (params_rest, shared_rest, data))
    except TypeError as error:  # JAX's; inside jit it is raised later, where nothing can be added
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "got forward-mode differentiation (jvp) of a chain under backprop='reverse', expected "
            "reverse mode: take 'store', which has both"
        ) from error


class Swept(NamedTuple):
    """What the backward sweep returns; dparams is a list with a tree for each section.

    max_abs: the largest |stream| met between layers, or None.
    """

    x: Streams
    dx: Streams
    dparams: Any
    dshared: Any
    max_abs: Any


def sweep(sections, y, dy, dauxes, residues, shared, *, track_range=False) -> Swept:
    """The backward sweep: rewinds layer by layer, last to first."""
    dshared = jax.tree.map(jnp.zeros_like, trees.split(shared)[0])
    max_abs = largest(y) if track_range else None
    carry, dparams = (y, dy, dshared, max_abs), []
    for section, daux_L, residue_L in reversed(list(zip(sections, dauxes, residues, strict=True))):

        def body(carry, layer_slice, layer=section.layer):
            y, dy, dshared, max_abs = carry
            params, data, daux, residue = layer_slice
            rewound = layer.rewind(params, y, dy, daux, residue, Context(shared, data))
            if track_range:
                max_abs = jnp.maximum(max_abs, largest(rewound.x))
            dshared = trees.add(dshared, rewound.dshared)
            return (rewound.x, rewound.dx, dshared, max_abs), rewound.dparams

        xs = section.params_L, section.data_L, daux_L, residue_L
        carry, dparams_L = _scan(body, carry, xs, section.length, reverse=True)
        dparams.insert(0, dparams_L)
    x, dx, dshared, max_abs = carry
    return Swept(x, dx, dparams, dshared, max_abs)
