"""The forward pass that keeps what each layer's strategy needs, and the backward sweep.

The backward sweep is a pure function: it goes from the last layer to the first and passes the
gradient of each to a consumer, which stacks it, or updates that layer's parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from revnet_jax.core import trees
from revnet_jax.core.block import Context, Rewound, Streams, differentiate
from revnet_jax.core.exactness import Tracked, vary_over, varying_axes
from revnet_jax.core.isolate import isolate, sharded_as
from revnet_jax.core.strategies import Kept, LayerRun, per_iteration, remembering

Update = Callable[[Any, Any, Any], tuple[Any, Any]]


class Consumer(NamedTuple):
    """Receives the gradients of a section's layers during the sweep.

    Attributes:
      start: the initial `written`, a tree of stacked arrays. The loop carries it and writes it in
        place; as scan inputs and outputs the arrays would exist twice.
      read: `written -> params_L`; valid for the layers that the sweep has not reached yet.
      write: `(written, i, params, dparams) -> written`, called after layer i.
    """

    start: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any, Any, Any], Any]


def stack_gradients(params_L: Any) -> Consumer:
    """A consumer that keeps all gradients: `written` is dparams_L."""
    zeros = jax.tree.map(jnp.zeros_like, trees.split(params_L)[0])
    write = lambda dparams_L, i, params, dparams: _put(dparams_L, i, dparams)
    return Consumer(zeros, lambda dparams_L: params_L, write)


def update_in_place(params_L: Any, state_L: Any, update: Update) -> Consumer:
    """A consumer that updates each layer at once and keeps no gradients.

    `written` is (params_L, state_L); layers that the sweep has passed hold their new values.
    """
    floats_L, rest_L = trees.split(params_L)

    @jax.named_scope("update")
    def write(written, i, params, dparams):
        # A section whose parameters are all frozen has nothing to update.
        if not jax.tree.leaves(dparams):
            return written
        state, floats = _at(written[1], i), trees.split(params)[0]
        # Isolated, so that all stacks are read before any is written. If the update were fused
        # with the writes, the CPU compiler would have to assume that one stack is read after
        # another is written, and would copy whole stacks for every layer.
        returned = isolate(update, dparams, state, floats)
        return _put(written, i, returned)

    start = jax.tree.map(_on_mesh, (floats_L, state_L))
    return Consumer(start, lambda written: trees.join(written[0], rest_L), write)


class Kepts(NamedTuple):
    """The values that the forward pass keeps for the sweep.

    Attributes:
      runs: for each run, the residues (reverse) or pullbacks of its layers, stacked.
      last_reversed: the output of the last run that reverses, or None.
      checksum: over the outputs and residuals of the branches of reversed layers.
    """

    runs: list[Any]
    last_reversed: Streams | None
    checksum: Any


def forward_keeping(
    runs: Sequence[LayerRun], sections: Sequence[Any], x: Streams, shared: Any, unroll: int
) -> tuple[Streams, tuple[Any, ...], Kepts]:
    """Runs all layers forward: (y, aux_L of each section, what the sweep needs)."""
    auxes: list[list[Any]] = [[] for _ in sections]
    kepts, last_reversed, checksum = [], None, jnp.int32(0)
    for run in runs:
        x, aux_L, kept_L, run_checksum = _forward_run(run, sections[run.section], x, shared, unroll)
        auxes[run.section].append(aux_L)
        kepts.append(kept_L)
        if run.backprop == "reverse":
            last_reversed, checksum = x, checksum + run_checksum
    return x, tuple(_joined(parts) for parts in auxes), Kepts(kepts, last_reversed, checksum)


def _forward_run(run, section, x, shared, unroll):
    remembered = remembering(section.layer.forward, run.backprop, alone=run.length == 1)

    @jax.named_scope("forward")
    def body(carry, _):
        i, x, checksum = carry
        # By index rather than as scan inputs: a run may be part of a section, and taking its part
        # out of the stacks would copy it.
        params, data = _at((section.params_L, section.data_L), i)
        context = Context(shared, data)
        # Also for reversed layers, which drop the pullback: the forward loop must run the same
        # program as the rewind, residuals included, so that both round alike.
        found, pullback = differentiate(remembered, params, x, context)
        reverses = run.backprop == "reverse"
        # The pullback without what the backward pass has anyway: the loop stacks what it returns,
        # and would copy the weights of all layers.
        kept = found.residue if reverses else Kept.of(pullback, (params, context))
        return (i + 1, found.y, checksum + found.checksum), (found.aux, kept)

    start = jnp.int32(run.start), x, jnp.int32(0)
    (_, y, checksum), (aux_L, kept_L) = loop(
        body, start, None, run.length, unroll=per_iteration(run.backprop, unroll)
    )
    return y, aux_L, kept_L, checksum


class Swept(NamedTuple):
    """The result of the backward sweep.

    Attributes:
      x: the rebuilt input of the chain; None unless the first run reverses.
      written: the final `written` of each section's consumer.
      tracked: of the streams of reversed layers, or None.
      checksum: over what the branches of reversed layers computed in the rewind.
    """

    x: Streams | None
    dx: Streams
    written: list[Any]
    dshared: Any
    tracked: Tracked | None
    checksum: Any


def sweep(
    runs: Sequence[LayerRun],
    sections: Sequence[Any],
    kepts: Kepts,
    cotangents: tuple[Streams, Sequence[Any]],
    shared: Any,
    consumers: Sequence[Consumer],
    *,
    unroll: int,
    track: bool,
) -> Swept:
    """Goes backward through the layers, last to first; rewinds those that reverse.

    Args:
      cotangents: (dy, daux_L of each section), with None at leaves that are not floating point.
    """
    dx, dauxes = cotangents
    x, checksum = None, jnp.int32(0)
    # In a `shard_map` a loop's carry must have the same type, varying axes included, throughout.
    # The streams may vary where their cotangents do not, before a layer that averages over devices.
    axes = varying_axes((dx, kepts.last_reversed))
    tracked = vary_over(axes, Tracked.nothing()) if track else None
    dshared = jax.tree.map(jnp.zeros_like, trees.split(shared)[0])
    written = [consumer.start for consumer in consumers]
    for run, kept_L in reversed(list(zip(runs, kepts.runs, strict=True))):
        # The last run that reverses starts from its output, which was kept; those before it start
        # from what has been rebuilt.
        if run.backprop == "reverse" and x is None:
            x = kepts.last_reversed
        daux_L = jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], dauxes[run.section])
        carry = x, dx, dshared, written[run.section], tracked, checksum
        x, dx, dshared, written[run.section], tracked, checksum = _sweep_run(
            run,
            sections[run.section],
            consumers[run.section],
            carry,
            daux_L,
            kept_L,
            shared,
            unroll,
        )
    return Swept(x, dx, written, dshared, tracked, checksum)


def _sweep_run(run, section, consumer, carry, daux_L, kept_L, shared, unroll):
    def layer(params, x, dy, daux, kept, context):
        if run.backprop == "reverse":
            return Rewound(*section.layer.rewind(params, x, dy, daux, kept, context))
        dparams, dx, dshared = kept.pullback((params, context))((dy, daux))
        return Rewound(x, dx, dparams, dshared)

    unroll = min(per_iteration(run.backprop, unroll), run.length)

    def body(carry, slices):
        i, (x, dx, dshared, written, tracked, checksum) = carry
        daux, kept = slices
        if run.backprop == "reverse" and (unroll > 1 or run.length == 1):
            # Layers that are not separated by loop iterations need a barrier: a compiler might
            # otherwise rebuild the streams of all layers first, and hold them all.
            x, dx = isolate(lambda x, dx: (x, dx), x, dx)
        # With an update, layer i still has its old values: it is written only below.
        params, data = _at((consumer.read(written), section.data_L), i)
        with jax.named_scope("rewind" if run.backprop == "reverse" else "backward"):
            found = layer(params, x, dx, daux, kept, Context(shared, data))
        if run.backprop == "reverse" and tracked is not None:
            # x is the output of layer i. `compare_inputs` adds the range of the chain's input.
            tracked = tracked.after(x, found.updates, found.lost_updates)
        written = consumer.write(written, i, params, found.dparams)
        dshared = trees.add(dshared, found.dshared)
        checksum = checksum + found.checksum
        return (i - 1, (found.x, found.dx, dshared, written, tracked, checksum)), None

    start = jnp.int32(run.stop - 1), carry
    (_, carry), _ = loop(body, start, (daux_L, kept_L), run.length, reverse=True, unroll=unroll)
    return carry


def loop(
    body: Callable, carry: Any, xs: Any, length: int, *, reverse: bool = False, unroll: int = 1
) -> tuple[Any, Any]:
    """`lax.scan`; for length 1 the body is called directly, and may change the carry's shapes."""
    if length != 1:
        return lax.scan(body, carry, xs, length, reverse=reverse, unroll=min(unroll, length))
    carry, ys = body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    # With a leading axis of one layer, as a scan would return it.
    return carry, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), ys)


def _at(tree_L: Any, i: Any) -> Any:
    """Layer i of a stacked tree."""
    take = lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    tree = jax.tree.map(take, tree_L)
    # Without the barrier a compiler may convert the weights of all layers before the loop, and
    # keep a second copy of them.
    if len(set(map(varying_axes, jax.tree.leaves(tree)))) > 1:
        # In jax 0.10 what leaves one barrier varies over the same axes of a `shard_map`.
        return jax.tree.map(lax.optimization_barrier, tree)
    return lax.optimization_barrier(tree)


def _put(tree_L: Any, i: Any, tree: Any) -> Any:
    def put(leaf_L, leaf):
        spec = PartitionSpec(*jax.typeof(leaf_L).sharding.spec[1:])
        return lax.dynamic_update_index_in_dim(leaf_L, sharded_as(spec, leaf), i, 0)

    return jax.tree.map(put, tree_L, tree)


def _on_mesh(leaf):
    """An array from before `jax.set_mesh`, whose type has no mesh, on that of Explicit axes."""
    mesh, sharding = jax.sharding.get_abstract_mesh(), jax.typeof(leaf).sharding
    is_explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    if not (is_explicit and sharding.mesh.empty):
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(mesh, sharding.spec))


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
