"""Discrete decisions replay: on the grid a router chooses the same experts on rebuilt streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from revnet_jax.core import Context, Grid, chain, reversible_block
from tests.core import toy

DEPTH, TOKENS, WIDTH, EXPERTS = 32, 64, 16, 4
# Updates grow along the chain, as the streams of deep networks do: what rounding loses of the
# large streams at its end is much to the small ones at its beginning.
GROWTH = 1.25


def routed(params, x, context):
    """Each token goes to the expert that scores highest; auxiliary: which one that is."""
    x = (x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))).astype(jnp.bfloat16)
    scores = x @ params["router"]
    choice = jnp.argmax(scores, axis=-1)
    gate = jnp.take_along_axis(jax.nn.softmax(scores), choice[:, None], axis=-1)
    chosen = jax.nn.one_hot(choice, EXPERTS, dtype=jnp.bfloat16)
    outputs = jnp.tanh(jnp.einsum("td,edf->tef", x, params["experts"]))
    return params["size"] * gate * jnp.einsum("te,tef->tf", chosen, outputs), choice


def arguments():
    """(params_L, x): parameters in bfloat16, streams in float32."""
    rng = np.random.default_rng(0)
    weights = lambda *shape: jnp.asarray(rng.normal(size=shape) / WIDTH**0.5, jnp.bfloat16)
    params = lambda: {
        "router": weights(DEPTH, WIDTH, EXPERTS),
        "experts": weights(DEPTH, EXPERTS, WIDTH, WIDTH),
        "size": jnp.asarray(GROWTH ** np.arange(DEPTH), jnp.bfloat16),
    }
    stream = lambda: jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    return (params(), params()), (stream(), stream())


@functools.cache
def decisions(grid):
    """(choices of the forward pass, choices on the streams rebuilt from its output, that output).

    Choices are of shape [half-step, layer, token]. The second ones are made by inverting one layer
    after the other, and asking each again.
    """
    block = reversible_block(routed, routed, has_aux=True, grid=grid)

    @toy.jit
    def forward(params_L, x):
        return chain(block, params_L, x, backprop="store")

    @toy.jit
    def replay(params_L, y):
        def body(y, params):
            x = block.inverse(params, y, None, Context())
            return x, block.forward(params, x, Context())[1]

        return lax.scan(body, y, params_L, reverse=True)[1]

    params_L, x = arguments()
    y, choices_L = forward(params_L, x)
    return np.stack(choices_L), np.stack(replay(params_L, y)), y


def test_every_expert_is_chosen_often_and_streams_stay_on_the_grid():
    """Else there would be nothing to flip, or no grid to hold it."""
    choices, _, y = decisions(Grid())
    assert choices.shape == (2, DEPTH, TOKENS)
    assert np.all(np.bincount(choices.ravel()) > choices.size / EXPERTS / 2)
    assert 100 < np.max(np.abs(y)) < Grid().limit(jnp.float32)


def test_no_decision_flips_on_the_grid():
    choices, replayed, _ = decisions(Grid())
    assert np.sum(choices != replayed) == 0


def test_decisions_flip_without_the_grid():
    choices, replayed, _ = decisions(None)
    assert np.sum(choices != replayed) > 5
