"""Chains of layers; the strategy sets what their gradient costs in memory and compute."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.interpreters import ad

from revnet_jax.core import trees, validate
from revnet_jax.core.block import Context, Layer, ReversibleLayer, Streams
from revnet_jax.core.exactness import Exactness, compare_inputs, vary_over, varying_axes
from revnet_jax.core.frozen import freeze
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
    """Layers of one structure, run by one `lax.scan`; or one layer, which may change shapes.

    Attributes:
      layer: a `Block` or another reversible layer, or any `Layer` under `store` and `remat`.
      params_L: the layers' parameters, stacked: every leaf has a leading axis L. Differentiated.
        Leaves that are not differentiated are frozen: no gradient is computed or stacked for
        them, and `update` does not get them.
      data_L: per-layer data, stacked (PRNG keys, statistics). Not differentiated.
      length: L; needed only if params_L and data_L have no arrays, as for a layer without
        parameters.
      state_L: the optimizer's state, stacked, floating point. Used by `update` only. Where a
        parameter is frozen, the leaves of its state are None.
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
    """Applies L layers of one structure in order and returns `(y, aux_L)`.

    Args:
      layer: see `Section`.
      params_L: see `Section`. For layers that share their weights, pass the weights in `shared`
        and the number of layers in `length`.
      data_L: see `Section`.
      length: see `Section`.
      x: a tuple of streams. Snapped to the block's grid, if it has one. Differentiated.
      shared: side inputs that every layer sees. Differentiated; cotangents are summed over layers.
      backprop: `store`, `remat_dots`, `remat`, `offload` or `reverse`: see `strategies`. On a CPU
        `remat` saves nothing for a chain of one layer, which runs outside a loop: XLA's CPU
        compiler drops the barrier and computes the layer once. Compiled for an H100 it saves.
      stored_layers: number of layers, counted from the last, that use `store` instead of
        `backprop`. This spends spare memory to save compute.
      unroll: layers per loop iteration. Has an effect only for `store` and `reverse`, and without
        `update`. With unroll=L there is no loop, so nothing is copied into and out of stacks, but
        compilation takes longer and `reverse` holds its gradients twice until they are stacked.
      update: updates the parameters of each layer, in place, within the backward sweep, so that the
        gradients of all layers never exist together. A function of one layer: `(dparams, state,
        params) -> (params, state)`, trees of floats. **The cotangents of params_L and state_L are
        then their new values**: a backward pass can return nothing but cotangents. The caller uses
        them as the new parameters and state. The loss must not use params_L elsewhere, nor call the
        chain more than once, as by `vmap`, `map` or `scan` over examples: JAX would add up the new
        values of all uses. The update is not differentiated; it may close over constants, and over
        values traced outside of `jax.grad`.
      state_L: the state that `update` carries from step to step (an optimizer's moments), stacked.
      probe: `Exactness.probe()`; its cotangent is the run-time exactness check of `reverse`: the
        rebuilt input against the true one, and a checksum of what the branches returned in the
        forward pass against that of the rewind. The check keeps the chain's input in memory. One
        probe may be passed to several chains, and be used within `scan`, `vmap` and `shard_map`.

    aux_L: the layers' auxiliary outputs, stacked; floating-point leaves are differentiable.

    Cost of the gradient: under `store` a forward and a backward pass, about three forward passes of
    arithmetic. `remat`, `offload` and `reverse` add one forward pass, except for stored layers, and
    `remat_dots` a part of one. Memory with `reverse`, besides parameters
    and their gradients: the streams, their cotangents and one layer's intermediates, at any
    depth, plus each layer's residue if its couplings have one (see `Coupling`).
    `reverse`, mixtures of strategies and `update` have no forward-mode derivative: take `store` for
    a jvp.
    Second derivatives are right under all strategies, but not through `update`.

    Raises ValueError or TypeError, while tracing, for an unknown strategy, unequal leading axes, a
    layer that changes the streams' shapes or dtypes, an inverse that does not restore them,
    streams too narrow for the grid, an update that changes shapes or dtypes, or a branch, coupling
    or inverse that closes over a traced value (pass it through `shared`).
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
    """A chain of different layers with one custom gradient: `(y, aux_L of each section)`.

    Applies the sections in order; arguments as for `chain`. Under `reverse` nothing is stored
    between sections either. All layers that have a grid must have the same one.
    """
    sections = validate.checked_sections(sections)
    x, shared = validate.streams("x", x), validate.arrays("shared", shared)
    depths = validate.check_sections(sections, x, shared, backprop, STRATEGIES)
    stored_layers = validate.checked_stored_layers(stored_layers, sum(depths))
    unroll = validate.checked_unroll(unroll)
    validate.check_probe(probe)
    validate.check_states(sections, depths, update)
    if update is not None:
        unroll = 1  # without a loop, compilers hold old and new weights of all layers at once
    runs = plan_runs(depths, backprop, stored_layers)
    validate.check_invertible([sections[r.section] for r in runs if r.backprop == "reverse"])
    x = _on_grid(sections, x)
    sections = tuple(s._replace(length=n) for s, n in zip(sections, depths, strict=True))
    strategies = {run.backprop for run in runs}
    if update is None and len(strategies) == 1 and strategies != {"reverse"}:
        y, auxes, _ = _forward(sections, x, shared, *strategies, unroll)
        return y, auxes  # JAX's own derivatives, so that forward mode works too
    # Raises TypeError for pytree classes that JAX's custom gradients cannot rebuild.
    trees.split((x, [(section.state_L, section.data_L) for section in sections]))
    return _swept(runs, sections, x, shared, unroll, update, probe)


def sequence_forward(
    sections: Iterable[Section], x: Streams, *, shared: Any = None
) -> tuple[Streams, tuple[Any, ...], tuple[Any, ...]]:
    """Runs `sequence` forward, keeping residues for `sequence_inverse`.

    Returns `(y, aux_L of each section, residue_L of each section)`.
    """
    sections = validate.checked_sections(sections)
    validate.check_invertible(sections)
    x, shared = validate.streams("x", x), validate.arrays("shared", shared)
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
    """Computes the input of a sequence from its output.

    After `y, _, residues = sequence_forward(sections, x)`, `sequence_inverse(sections, y,
    residues)` is x: bit for bit if x is on the grid, the layers are exact and the streams stay
    inside the grid's range.

    Args:
      residues: needed only if a coupling leaves one.

    Cost: one evaluation of each branch; memory independent of depth.
    """
    sections = validate.checked_sections(sections)
    layers = validate.check_invertible(sections)
    y, shared = validate.streams("y", y), validate.arrays("shared", shared)
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

        length = validate.section_depth(section)

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
    """Returns `shared` such that its cotangents are first summed within a layer, as in the sweep.

    Without the barrier JAX adds the cotangent of each half-step to the sum over all layers so far.
    That is another order of summation, and rounds differently from `reverse`.
    """
    apart = lambda leaf: lax.optimization_barrier(leaf) if trees.is_inexact(leaf) else leaf
    return jax.tree.map(apart, shared)


def _joined(sections, params, shared, not_differentiated, frozen=()):
    """Returns (sections, shared) with their values, differentiated and not, joined again.

    frozen: the floating-point parameters that are missing in `params`, by section.
    """
    params_rest, shared_rest, data = not_differentiated
    params = trees.join(params, params_rest)
    filled = [
        section._replace(params_L=params_L, data_L=data_L)
        for section, params_L, data_L in zip(sections, params, data, strict=True)
    ]
    if jax.tree.leaves(frozen):
        filled = list(map(freeze, filled, frozen))
    return filled, trees.join(shared, shared_rest)


def _swept(runs, sections, x, shared, unroll, update, probe):
    """Runs all sections under one custom gradient.

    One custom gradient per section would keep the output of every section.
    """
    given, params_rest = trees.split([section.params_L for section in sections])
    states = [section.state_L for section in sections]
    shared, shared_rest = trees.split(shared)
    data = [section.data_L for section in sections]
    joined = functools.partial(_joined, sections)

    @jax.custom_vjp
    def run(params, states, x, shared, probe, not_differentiated):
        # Runs only where no gradient is taken, so it keeps nothing.
        sections, shared = joined(params, shared, not_differentiated)
        return _forward(sections, x, shared)[:2]

    def forward(*marked):
        values = jax.tree.map(lambda leaf: leaf.value, marked, is_leaf=_is_marked)
        params, states, x, shared, probe, not_differentiated = values
        # `perturbed` is False for parameters that are not differentiated: those are frozen.
        is_trained = jax.tree.map(lambda leaf: leaf.perturbed, marked[0], is_leaf=_is_marked)
        params, frozen = trees.partition(params, is_trained)
        sections, full_shared = joined(params, shared, not_differentiated, frozen)
        validate.check_update(sections, trees.partition(given, is_trained)[0], update)
        y, auxes, kepts = forward_keeping(runs, sections, x, full_shared, unroll)
        # The input is rebuilt only if the first run reverses. Otherwise keeping it would be waste.
        true_x = None if probe is None or runs[0].backprop != "reverse" else x
        return (y, auxes), (params, frozen, states, shared, not_differentiated, kepts, true_x)

    def backward(kept, cotangents):
        params, frozen, states, shared, not_differentiated, kepts, true_x = kept
        sections, shared = joined(params, shared, not_differentiated, frozen)
        cotangents = _instantiated((cotangents[0], trees.split(cotangents[1])[0]))
        with _explaining_axes():
            swept = sweep(
                runs,
                sections,
                kepts,
                cotangents,
                shared,
                [_consumer(update, *pair) for pair in zip(sections, states, strict=True)],
                unroll=unroll,
                track=true_x is not None,
            )
        dprobe = vary_over(axes, probe and _exactness(true_x, swept, kepts))
        # With an update the new values leave in the place of cotangents (see `chain`).
        dparams = swept.written if update is None else [new[0] for new in swept.written]
        dstates = states if update is None else [new[1] for new in swept.written]
        # The last argument holds data, keys and integers, which have no cotangents.
        return dparams, dstates, swept.dx, swept.dshared, dprobe, None

    # With symbolic zeros the forward pass is told which parameters are differentiated.
    run.defvjp(forward, backward, symbolic_zeros=True)
    # Within a shard_map the probe is made to vary over the devices, so that JAX sums its cotangents
    # over all of them.
    axes = varying_axes((given, x, shared, data, probe)) if probe else frozenset()
    with _explaining_forward_mode():
        rest = params_rest, shared_rest, data
        return run(given, states, x, shared, vary_over(axes, probe), rest)


def _consumer(update, section, state_L):
    """What the sweep does with the gradients of a section's layers."""
    if update is None:
        return stack_gradients(section.params_L)
    return update_in_place(section.params_L, state_L, update)


def _exactness(true_x, swept, kepts):
    """What the probe's cotangent says: nothing found if the chain's input was not rebuilt."""
    if true_x is None:
        return Exactness.probe()
    checksums = kepts.checksum, swept.checksum
    return compare_inputs(swept.x, true_x, swept.tracked, checksums)


def _is_marked(leaf):
    return isinstance(leaf, CustomVJPPrimal)


def _instantiated(cotangents):
    """Replaces symbolic zeros by arrays, which have the sharding of the values."""
    return jax.tree.map(
        lambda leaf: (
            ad.instantiate_zeros(ad.Zero(leaf.aval)) if isinstance(leaf, SymbolicZero) else leaf
        ),
        cotangents,
    )


@contextlib.contextmanager
def _explaining_forward_mode():
    try:
        yield
    except TypeError as error:  # JAX's own error. Inside jit it is raised later, unexplained.
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "got forward-mode differentiation (jvp) of a chain that reverses, mixes or updates, "
            "expected reverse mode: take backprop='store' for all layers, which supports both modes"
        ) from error


@contextlib.contextmanager
def _explaining_axes():
    """Explains JAX's error about an axis name that is unknown in the backward pass.

    JAX runs the backward pass of a custom gradient outside of the `vmap` around its forward pass.
    """
    try:
        yield
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise NameError(
            f"got a collective in a branch over an axis that is unknown in the backward pass "
            f"({str(error).splitlines()[0]}), expected the gradient to be taken within the "
            "`jax.vmap` that names the axis: vmap(grad(loss)), or take backprop='store' or 'remat'"
        ) from error
