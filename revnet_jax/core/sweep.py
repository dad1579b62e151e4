"""Forward through layers, keeping what each one's strategy asks for; and the sweep back.

The backward sweep is a pure function: it goes from the last layer to the first and hands the
gradient of each to a consumer, which stacks it, or updates that layer's parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from revnet_jax.core import trees
from revnet_jax.core.block import Context, Streams, differentiate
from revnet_jax.core.exactness import largest
from revnet_jax.core.strategies import Backprop, Kept, Run, remembering

Update = Callable[[Any, Any, Any], tuple[Any, Any]]


class Consumer(NamedTuple):
    """What becomes of a section's gradients in the sweep.

    start: a tree of stacked arrays, carried through the loop and written in place: as inputs and
      outputs of the loop they would exist twice.
    read: `written -> params_L`, of the layers that the sweep has yet to come to.
    write: `(written, i, params, dparams) -> written`, after layer i.
    """

    start: Any
    read: Callable[[Any], Any]
    write: Callable[[Any, Any, Any, Any], Any]


def stack_gradients(params_L: Any) -> Consumer:
    """Keeps them all: `written` is dparams_L."""
    zeros = jax.tree.map(jnp.zeros_like, trees.split(params_L)[0])
    write = lambda dparams_L, i, params, dparams: _put(dparams_L, i, dparams)
    return Consumer(zeros, lambda dparams_L: params_L, write)


def update_in_place(params_L: Any, state_L: Any, update: Update) -> Consumer:
    """Keeps none: `written` is (params_L, state_L), new from the layer that was swept last."""
    floats_L, rest_L = trees.split(params_L)

    @jax.named_scope("update")
    def write(written, i, params, dparams):
        if not jax.tree.leaves(dparams):
            return written
        state, floats = _at(written[1], i), trees.split(params)[0]
        # Fused with the writing, reading one stack would come after writing another, for all the
        # compiler knows: on CPU it then copies whole stacks, for every layer.
        returned = apart(update, dparams, state, floats, witness=dparams)
        new = trees.pair(returned, "update", "(params, state)")
        if jax.tree.structure(new) != jax.tree.structure((floats, state)):
            raise ValueError(
                "update returned trees of another structure than the params and state it got, "
                "expected the same: has it a state, and state_L been passed?"
            )
        return _put(written, i, new)

    return Consumer((floats_L, state_L), lambda written: trees.join(written[0], rest_L), write)


def forward_keeping(
    runs: Sequence[Run], sections: Sequence[Any], x: Streams, shared: Any
) -> tuple[Streams, tuple[Any, ...], list[Any], Streams | None]:
    """(y, aux_L of each section, what each run keeps, the output of the last run that reverses)."""
    auxes: list[list[Any]] = [[] for _ in sections]
    kepts, last_reversed = [], None
    for run in runs:
        x, aux_L, kept_L = _forward_run(run, sections[run.section], x, shared)
        auxes[run.section].append(aux_L)
        kepts.append(kept_L)
        if run.backprop == "reverse":
            last_reversed = x
    return x, tuple(_joined(parts) for parts in auxes), kepts, last_reversed


def _forward_run(run, section, x, shared):
    evaluate = evaluator(run.length, run.backprop)
    remembered = remembering(section.layer.forward, run.backprop, alone=run.length == 1)

    def layer(params, x, context):
        if run.backprop == "reverse":
            y, aux, residue = section.layer.forward(params, x, context)
            return y, (aux, residue)
        y, aux, pullback = differentiate(remembered, params, x, context)
        return y, (aux, Kept.of(pullback, (params, context)))

    @jax.named_scope("forward")
    def body(carry, _):
        i, x = carry
        params, data = _at((section.params_L, section.data_L), i)
        y, found = evaluate(layer, params, x, Context(shared, data), witness=x)
        return (i + 1, y), found

    (_, y), (aux_L, kept_L) = loop(body, (jnp.int32(run.start), x), None, run.length)
    return y, aux_L, kept_L


class Swept(NamedTuple):
    """What the backward sweep returns.

    x: the rebuilt input, None unless the first run reverses. written: the consumers', by section.
    max_abs: the largest |stream| met between reversed layers, or None.
    """

    x: Streams | None
    dx: Streams
    written: list[Any]
    dshared: Any
    max_abs: Any


def sweep(
    runs: Sequence[Run],
    sections: Sequence[Any],
    kepts: Sequence[Any],
    last_reversed: Streams | None,
    cotangents: tuple[Streams, Sequence[Any]],
    shared: Any,
    consumers: Sequence[Consumer],
    *,
    track_range: bool,
) -> Swept:
    """Backward through the layers, last to first: rewinds those that reverse.

    cotangents: dy, and daux_L of each section, None at leaves that are not floating point.
    """
    dx, dauxes = cotangents
    x, max_abs = None, None
    dshared = jax.tree.map(jnp.zeros_like, trees.split(shared)[0])
    written = [consumer.start for consumer in consumers]
    for run, kept_L in reversed(list(zip(runs, kepts, strict=True))):
        if run.backprop == "reverse" and x is None:
            x, max_abs = last_reversed, largest(last_reversed) if track_range else None
        daux_L = jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], dauxes[run.section])
        carry = x, dx, dshared, written[run.section], max_abs
        x, dx, dshared, written[run.section], max_abs = _sweep_run(
            run, sections[run.section], consumers[run.section], carry, daux_L, kept_L, shared
        )
    return Swept(x, dx, written, dshared, max_abs)


def _sweep_run(run, section, consumer, carry, daux_L, kept_L, shared):
    evaluate = evaluator(run.length, run.backprop)

    def layer(params, x, dy, daux, kept, context):
        if run.backprop == "reverse":
            return tuple(section.layer.rewind(params, x, dy, daux, kept, context))
        dparams, dx, dshared = kept.pullback((params, context))((dy, daux))
        return x, dx, dparams, dshared

    def body(carry, slices):
        i, (x, dx, dshared, written, max_abs) = carry
        daux, kept = slices
        params, data = _at((consumer.read(written), section.data_L), i)
        arguments = params, x, dx, daux, kept, Context(shared, data)
        with jax.named_scope("rewind" if run.backprop == "reverse" else "backward"):
            x, dx, dparams, layer_dshared = evaluate(layer, *arguments, witness=dx)
        if max_abs is not None:
            max_abs = jnp.maximum(max_abs, largest(x))
        written = consumer.write(written, i, params, dparams)
        return (i - 1, (x, dx, trees.add(dshared, layer_dshared), written, max_abs)), None

    start = jnp.int32(run.stop - 1), carry
    (_, carry), _ = loop(body, start, (daux_L, kept_L), run.length, reverse=True)
    return carry


def loop(
    body: Callable, carry: Any, xs: Any, length: int, *, reverse: bool = False
) -> tuple[Any, Any]:
    """`lax.scan`, except that a single layer, applied as it is, may change the carry's shapes.

    What it computes is to be evaluated by `evaluator`.
    """
    if length != 1:
        return lax.scan(body, carry, xs, length, reverse=reverse)
    carry, ys = body(carry, jax.tree.map(lambda leaf: leaf[0], xs))
    return carry, jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), ys)


def evaluator(length: int, backprop: Backprop) -> Callable:
    """How a loop's body evaluates its layer."""
    # A condition would need host memory on both sides.
    return apart if length == 1 and backprop != "offload" else together


def apart(function: Callable, *arguments: Any, witness: Streams) -> Any:
    """`function(*arguments)`, compiled apart from what is around it.

    A loop's edges keep the compiler from rewriting a layer together with its neighbours, which are
    others on the way back, and from summing in another order then. Here it is a condition that
    does so; it always holds, except for a witness that is not a number any more.
    """
    # Traced once: two traces of a pullback are not alike.
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    not_a_number = lambda leaf: jnp.full(
        leaf.shape, jnp.nan if trees.is_inexact(leaf) else 0, leaf.dtype
    )
    stream = jnp.ravel(jax.tree.leaves(witness)[0])
    outputs = lax.cond(
        jnp.all(stream[:1] <= jnp.inf),
        jaxpr_as_fun(program),
        lambda *leaves: [not_a_number(leaf) for leaf in jax.tree.leaves(shapes)],
        *jax.tree.leaves(arguments),
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def together(function: Callable, *arguments: Any, witness: Streams) -> Any:
    """`function(*arguments)`: in a loop, whose edges keep it apart."""
    return function(*arguments)


def _at(tree_L: Any, i: Any) -> Any:
    """Layer i of everything stacked."""
    take = lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    # Else a compiler may prepare all layers' weights before the loop, and keep them beside it.
    return lax.optimization_barrier(jax.tree.map(take, tree_L))


def _put(tree_L: Any, i: Any, tree: Any) -> Any:
    put = lambda leaf_L, leaf: lax.dynamic_update_index_in_dim(leaf_L, leaf, i, 0)
    return jax.tree.map(put, tree_L, tree)


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
