"""A chain of L equal layers, run by one `lax.scan`, with a choice of what its gradient costs.

| backprop | kept per layer            | extra compute                          |
|----------|---------------------------|----------------------------------------|
| store    | all of f's intermediates  | none                                   |
| remat    | the streams               | one forward, less what is not needed   |
| reverse  | nothing                   | one forward                            |

All three compute the same function of the same arguments.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees, validate
from revnet_jax.core.block import Block, Context, Layer, Streams
from revnet_jax.core.exactness import Exactness, compare, largest
from revnet_jax.core.grid import snap

Backprop = Literal["store", "remat", "reverse"]
STRATEGIES: tuple[Backprop, ...] = get_args(Backprop)


def chain(
    layer: Layer,
    params_L: Any,
    x: Streams,
    *,
    shared: Any = None,
    data_L: Any = None,
    backprop: Backprop = "reverse",
    probe: Exactness | None = None,
) -> tuple[Streams, Any]:
    """Applies L layers in turn: `(y, aux_L)`.

    layer: a `Block` (reversible), or any `Layer` under `store` and `remat`.
    params_L: the layers' parameters, stacked: every leaf has a leading axis L. Differentiated.
    x: a tuple of streams. Snapped to the block's grid, where it has one. Differentiated.
    shared: side inputs that every layer sees; differentiated, cotangents summed over layers.
    data_L: per-layer data, stacked (PRNG keys, statistics); not differentiated.
    backprop: `store`, `remat` or `reverse`.
    probe: `Exactness.probe()`; its cotangent is the run-time exactness check of `reverse`, at the
      price of keeping the chain's input.

    aux_L: the layers' auxiliary outputs, stacked; floating-point leaves are differentiable.

    Cost of the gradient, in evaluations of the branches: store 1 forward + 2 backward, remat and
    reverse one forward more. Memory besides parameters and their gradients: with reverse the
    streams, their cotangents and one layer's intermediates, whatever the depth.
    `reverse` has no forward-mode derivative: take `store` for jvp and Hessians.

    Raises ValueError or TypeError while tracing for an unknown strategy, leading axes that
    differ, a layer that changes the streams' shapes or dtypes, streams too narrow for the grid, or
    a branch that closes over a traced float (pass it through `shared`).
    """
    validate.strategy(backprop, STRATEGIES, layer)
    validate.chain_arguments(layer, params_L, x, shared, data_L)
    if isinstance(layer, Block):
        x = snap(layer.grid, x)
    data_L = lax.stop_gradient(data_L)
    if backprop == "reverse":
        return _reverse(layer, params_L, x, shared, data_L, probe)
    return _forward(layer, params_L, x, shared, data_L, remat=backprop == "remat")


def chain_inverse(
    block: Block, params_L: Any, y: Streams, *, shared: Any = None, data_L: Any = None
) -> Streams:
    """The chain's input from its output: `chain_inverse(block, p, chain(block, p, x)[0]) == x`.

    Bit for bit while the grid's range holds, given an x on the grid. One evaluation of each
    branch per layer; memory independent of depth.
    """
    validate.strategy("reverse", STRATEGIES, block)
    validate.chain_arguments(block, params_L, y, shared, data_L)

    def body(y, layer_slice):
        params, data = layer_slice
        return block.inverse(params, y, Context(shared, data)), None

    x, _ = lax.scan(body, y, (params_L, data_L), reverse=True)
    return x


def _forward(layer, params_L, x, shared, data_L, *, remat=False):
    def body(x, layer_slice):
        params, data = layer_slice
        return layer.forward(params, x, Context(shared, data))

    # prevent_cse is for code outside loops; a scan's body cannot be merged with its recompute.
    scanned = jax.checkpoint(body, prevent_cse=False) if remat else body
    return lax.scan(scanned, x, (params_L, data_L))


def _reverse(block, params_L, x, shared, data_L, probe):
    """One custom gradient over the whole chain: a gradient per layer would keep every output."""
    params_L, params_rest_L = trees.split(params_L)
    shared, shared_rest = trees.split(shared)

    @jax.custom_vjp
    def run(params_L, x, shared, probe, not_differentiated):
        params_rest_L, shared_rest, data_L = not_differentiated
        params_L, shared = trees.join(params_L, params_rest_L), trees.join(shared, shared_rest)
        return _forward(block, params_L, x, shared, data_L)

    def forward(params_L, x, shared, probe, not_differentiated):
        y, aux_L = run(params_L, x, shared, probe, not_differentiated)
        true_x = None if probe is None else x
        return (y, aux_L), (params_L, y, shared, not_differentiated, true_x)

    def backward(kept, cotangents):
        params_L, y, shared, (params_rest_L, shared_rest, data_L), true_x = kept
        dy, daux_L = cotangents
        x, dx, dparams_L, dshared, max_abs = sweep(
            block,
            trees.join(params_L, params_rest_L),
            y,
            dy,
            trees.split(daux_L)[0],
            trees.join(shared, shared_rest),
            data_L,
            track_range=true_x is not None,
        )
        dprobe = None if true_x is None else compare(x, true_x, max_abs)
        return dparams_L, dx, dshared, dprobe, None

    run.defvjp(forward, backward)
    return run(params_L, x, shared, probe, (params_rest_L, shared_rest, data_L))


def sweep(block, params_L, y, dy, daux_L, shared, data_L, *, track_range=False):
    """The backward sweep: rewinds layer by layer, last to first.

    Returns (x, dx, dparams_L, dshared, the largest |stream| met, or None).
    """

    def body(carry, layer_slice):
        y, dy, dshared, max_abs = carry
        params, data, daux = layer_slice
        if track_range:
            max_abs = jnp.maximum(max_abs, largest(y))
        rewound = block.rewind(params, y, dy, daux, Context(shared, data))
        dshared = trees.add(dshared, rewound.dshared)
        return (rewound.x, rewound.dx, dshared, max_abs), rewound.dparams

    dshared = jax.tree.map(jnp.zeros_like, trees.split(shared)[0])
    max_abs = jnp.zeros((), jnp.float32) if track_range else None
    carry, dparams_L = lax.scan(
        body, (y, dy, dshared, max_abs), (params_L, data_L, daux_L), reverse=True
    )
    x, dx, dshared, max_abs = carry
    return x, dx, dparams_L, dshared, max_abs
