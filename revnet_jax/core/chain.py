"""Chains of layers, with a choice of what their gradient costs (see `strategies`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from revnet_jax.core import trees, validate
from revnet_jax.core.block import Context, Layer, ReversibleLayer, Streams
from revnet_jax.core.exactness import Exactness, compare, vary_over, varying_axes
from revnet_jax.core.grid import snap
from revnet_jax.core.strategies import STRATEGIES, Backprop, per_iteration, plan_runs, remembering
from revnet_jax.core.sweep import (
    Update,
    forward_keeping,
    loop,
    stack_gradients,
    sweep,
    update_in_place,
)


class Section(NamedTuple):
    """Equal layers in a row, run by one `lax.scan`; or one layer, which may change shapes.

    layer: a `Block` or another reversible layer, or any `Layer` under `store` and `remat`.
    params_L: the layers' parameters, stacked: every leaf has a leading axis L. Differentiated.
    data_L: per-layer data, stacked (PRNG keys, statistics); not differentiated.
    length: L, where nothing is stacked that would tell: 1 for a single layer without parameters.
    state_L: the optimizer's state, stacked, floating point; for `update` alone.
    """

    layer: Layer | ReversibleLayer
    params_L: Any = ()
    data_L: Any = None
    length: int | None = None
    state_L: Any = None


def chain(
    layer: Layer,
    params_L: Any,
    x: Streams,
    *,
    shared: Any = None,
    data_L: Any = None,
    length: int | None = None,
    backprop: Backprop = "reverse",
    stored_layers: int = 0,
    unroll: int = 1,
    update: Update | None = None,
    state_L: Any = None,
    probe: Exactness | None = None,
) -> tuple[Streams, Any]:
    """Applies L equal layers in turn: `(y, aux_L)`.

    layer, params_L, data_L, length: see `Section`. Layers that share their weights have them in
      `shared`, and say how many they are by `length`.
    x: a tuple of streams. Snapped to the block's grid, where it has one. Differentiated.
    shared: side inputs that every layer sees; differentiated, cotangents summed over layers.
    backprop: `store`, `remat_dots`, `remat`, `offload` or `reverse`: see `strategies`. On a CPU
      `remat` saves nothing for a chain of one layer, which is outside a loop: XLA's CPU compiler
      drops the barrier and computes the layer once. Compiled for an H100 it saves.
    stored_layers: how many layers, counted from the last, store whatever `backprop` says: memory
      that is left spent on compute that is saved.
    unroll: layers per loop iteration, where they store or reverse and nothing is updated; others
      have one. With all L there is no loop: nothing is copied into stacks and out of them.
      Compiling takes longer, and layers that reverse have their gradients twice, until stacked.
    update: updates each layer in the backward sweep, in place, so that gradients never exist
      together: `(dparams, state, params) -> (params, state)` of one layer, trees of floats.
      **The cotangents of params_L and state_L are then their new values**: whoever differentiates
      takes them as they are. params_L must have no other use. It is not differentiated; what it
      closes over has to be constant, or traced outside of `jax.grad`.
    state_L: what `update` carries from step to step (an optimizer's moments), stacked.
    probe: `Exactness.probe()`; its cotangent is the run-time exactness check of `reverse`, at the
      price of keeping the chain's input. One may serve several chains, and be used within `scan`,
      `vmap` and `shard_map`.

    aux_L: the layers' auxiliary outputs, stacked; floating-point leaves are differentiable.

    Cost of the gradient, in evaluations of the branches: store 1 forward + 2 backward, remat and
    reverse one forward more, stored layers excepted. Memory besides parameters and their
    gradients: with reverse the streams, their cotangents and one layer's intermediates, whatever
    the depth, and per layer what its couplings cannot undo without (`Coupling`, residue).
    `reverse`, mixtures and `update` have no forward-mode derivative: take `store` for a jvp. Second
    derivatives are right under all strategies (not of an update).

    Raises ValueError or TypeError while tracing for an unknown strategy, leading axes that
    differ, a layer that changes the streams' shapes or dtypes or undoes them to others, streams too
    narrow for the grid, an update that changes shapes or dtypes, or a branch, coupling or inverse
    that closes over a traced value (pass it through `shared`).
    """
    y, (aux_L,) = sequence(
        (Section(layer, params_L, data_L, length, state_L),),
        x,
        shared=shared,
        backprop=backprop,
        stored_layers=stored_layers,
        unroll=unroll,
        update=update,
        probe=probe,
    )
    return y, aux_L


def sequence(
    sections: Iterable[Section],
    x: Streams,
    *,
    shared: Any = None,
    backprop: Backprop = "reverse",
    stored_layers: int = 0,
    unroll: int = 1,
    update: Update | None = None,
    probe: Exactness | None = None,
) -> tuple[Streams, tuple[Any, ...]]:
    """A chain of different layers, under one gradient: `(y, aux_L of each section)`.

    As `chain`, section after section. Under `reverse` nothing is kept between them either. Layers
    with a grid must have the same one.
    """
    sections = validate.checked_sections(sections)
    x, shared = validate.arrays("x", x), validate.arrays("shared", shared)
    depths = validate.check_sections(sections, x, shared, backprop, STRATEGIES)
    stored_layers = validate.checked_stored_layers(stored_layers, sum(depths))
    unroll = validate.checked_unroll(unroll)
    validate.check_probe(probe)
    validate.check_update(sections, depths, update)
    if update is not None:
        unroll = 1  # outside a loop compilers hold the new weights of all layers beside the old
    runs = plan_runs(depths, backprop, stored_layers)
    validate.check_reversible([sections[r.section] for r in runs if r.backprop == "reverse"])
    x = _on_grid(sections, x)
    sections = tuple(
        section._replace(data_L=lax.stop_gradient(section.data_L), length=depth)
        for section, depth in zip(sections, depths, strict=True)
    )
    strategies = {run.backprop for run in runs}
    if update is None and len(strategies) == 1 and strategies != {"reverse"}:
        y, auxes, _ = _forward(sections, x, shared, *strategies, unroll)
        return y, auxes  # JAX's own gradient, and its jvp
    # Raises for classes that JAX's custom gradients cannot rebuild.
    trees.split((x, [(section.state_L, section.data_L) for section in sections]))
    return _swept(runs, sections, x, shared, unroll, update, probe)


def sequence_forward(
    sections: Iterable[Section], x: Streams, *, shared: Any = None
) -> tuple[Streams, tuple[Any, ...], tuple[Any, ...]]:
    """`sequence` with what `sequence_inverse` needs: `(y, auxes, residue_L of each section)`."""
    sections = validate.checked_sections(sections)
    validate.check_reversible(sections)
    x, shared = validate.arrays("x", x), validate.arrays("shared", shared)
    depths = validate.check_sections(sections, x, shared, "reverse", STRATEGIES)
    sections = [s._replace(length=n) for s, n in zip(sections, depths, strict=True)]
    return _forward(sections, _on_grid(sections, x), shared)


def sequence_inverse(
    sections: Iterable[Section],
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
    sections = validate.checked_sections(sections)
    layers = validate.check_reversible(sections)
    y, shared = validate.arrays("y", y), validate.arrays("shared", shared)
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

        length = validate.depth(section)

        def body(y, layer_slice, layer=layer):
            params, data, residue = layer_slice
            return layer.inverse(params, y, residue, Context(shared, data)), None

        y, _ = loop(body, y, (section.params_L, section.data_L, residue_L), length, reverse=True)
    return y


def _on_grid(sections, x):
    return snap(validate.common_grid(sections), x)


def _forward(sections, x, shared, backprop="reverse", unroll=1):
    auxes, residues = [], []
    for section in sections:
        forward = remembering(section.layer.forward, backprop, alone=section.length == 1)

        @jax.named_scope("forward")
        def body(x, layer_slice, forward=forward):
            params, data = layer_slice
            y, aux, residue, *_ = forward(params, x, Context(_added_by_layer(shared), data))
            return y, (aux, residue)

        x, (aux_L, residue_L) = loop(
            body,
            x,
            (section.params_L, section.data_L),
            section.length,
            unroll=per_iteration(backprop, unroll),
        )
        auxes.append(aux_L)
        residues.append(residue_L)
    return x, tuple(auxes), tuple(residues)


def _added_by_layer(shared):
    """The same, whose cotangents are added up within a layer first, as the sweep back does.

    JAX would add those of every half-step to the sum of all layers so far: another order.
    """
    apart = lambda leaf: lax.optimization_barrier(leaf) if trees.is_inexact(leaf) else leaf
    return jax.tree.map(apart, shared)


def _swept(runs, sections, x, shared, unroll, update, probe):
    """One custom gradient over all sections: a gradient per layer would keep every output."""
    params, params_rest = trees.split([section.params_L for section in sections])
    states = [section.state_L for section in sections]
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

    def consumer(section, state_L):
        if update is None:
            return stack_gradients(section.params_L)
        return update_in_place(section.params_L, state_L, update)

    @jax.custom_vjp
    def run(params, states, x, shared, probe, not_differentiated):
        sections, shared = joined(params, shared, not_differentiated)
        return _forward(sections, x, shared)[:2]

    def forward(params, states, x, shared, probe, not_differentiated):
        sections, full_shared = joined(params, shared, not_differentiated)
        y, auxes, kepts = forward_keeping(runs, sections, x, full_shared, unroll)
        true_x = None if probe is None or runs[0].backprop != "reverse" else x
        return (y, auxes), (params, states, shared, not_differentiated, kepts, true_x)

    def backward(kept, cotangents):
        params, states, shared, not_differentiated, kepts, true_x = kept
        sections, shared = joined(params, shared, not_differentiated)
        with _explaining_axes():
            swept = sweep(
                runs,
                sections,
                kepts,
                (cotangents[0], trees.split(cotangents[1])[0]),
                shared,
                [consumer(*pair) for pair in zip(sections, states, strict=True)],
                unroll=unroll,
                track_range=true_x is not None,
            )
        dprobe = probe and Exactness.probe()
        if true_x is not None:
            dprobe = compare(swept.x, true_x, swept.max_abs, (kepts.checksum, swept.checksum))
        dprobe = vary_over(axes, dprobe)
        dparams = swept.written if update is None else [new[0] for new in swept.written]
        dstates = states if update is None else [new[1] for new in swept.written]
        return dparams, dstates, swept.dx, swept.dshared, dprobe, None

    run.defvjp(forward, backward)
    # The cotangents of a probe that is the same on all devices are added up over the devices.
    axes = varying_axes((params, x, shared, data, probe)) if probe else frozenset()
    with _explaining_forward_mode():
        rest = params_rest, shared_rest, data
        return run(params, states, x, shared, vary_over(axes, probe), rest)


@contextlib.contextmanager
def _explaining_forward_mode():
    try:
        yield
    except TypeError as error:  # JAX's; inside jit it is raised later, where nothing can be added
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "got forward-mode differentiation (jvp) of a chain that reverses, mixes or updates, "
            "expected reverse mode: take backprop='store' for all layers, which has both"
        ) from error


@contextlib.contextmanager
def _explaining_axes():
    """JAX runs the backward pass of a custom gradient outside of the `vmap` that it was made in."""
    try:
        yield
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            f"got a collective in a branch over an axis that its rewind does not know "
            f"({str(error).splitlines()[0]}), expected the gradient to be taken within the "
            "`jax.vmap` that names the axis: vmap(grad(loss)), or take backprop='store' or 'remat'"
        ) from error
