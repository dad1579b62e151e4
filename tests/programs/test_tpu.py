"""What the TPU compiler makes of a chain: how its memory grows with depth and with the batch."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest

from revnet_jax.core import chain, reversible_block
from revnet_jax.models.transformer.attention import scores_times_values
from revnet_jax.planning.topology import parse_topology, topology_devices

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler"),
]

LAYERS, BATCHES = (12, 24), (2, 4)
TOKENS, WIDTH, HEADS = 1024, 1024, 8
WEIGHTS = (
    {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)},
    {
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    },
)


def attention(params, x_BTD, context):
    heads = normalise(x_BTD) @ params["qkv"].astype(jnp.bfloat16)
    q, k, v = jnp.split(heads.reshape(-1, TOKENS, 3 * HEADS, WIDTH // HEADS), 3, axis=2)
    mixed = scores_times_values(q, k, v, jnp.tril(jnp.ones((TOKENS, TOKENS), bool)))
    return mixed.reshape(x_BTD.shape) @ params["out"].astype(jnp.bfloat16)


def feed_forward(params, x_BTD, context):
    hidden = jax.nn.gelu(normalise(x_BTD) @ params["up"].astype(jnp.bfloat16))
    return hidden @ params["down"].astype(jnp.bfloat16)


def normalise(x):
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return (x * scale).astype(jnp.bfloat16)


def sgd(dparams, momentum, params):
    momentum = jax.tree.map(lambda m, d: 0.9 * m + d, momentum, dparams)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=(0, 1))
def step(params_L, momentum_L, x, backprop, lockstep):
    def loss(params_L, momentum_L):
        update = {"update": sgd, "state_L": momentum_L} if lockstep else {}
        y, _ = chain(
            reversible_block(attention, feed_forward), params_L, x, backprop=backprop, **update
        )
        return jnp.mean(y[0] * y[1])

    cotangents = jax.grad(loss, argnums=(0, 1))(params_L, momentum_L)
    return cotangents if lockstep else sgd(cotangents[0], momentum_L, params_L)


@pytest.fixture
def temporary_bytes(monkeypatch):
    topology = parse_topology("v5e:1x1")
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    on_tpu = jax.sharding.SingleDeviceSharding(topology_devices(topology)[0])

    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on_tpu)

    def temporary_bytes(strategy, layers, batch):
        """At the peak, beside arguments and results: temp_size_in_bytes may count those again."""
        is_shape = lambda node: type(node) is tuple and isinstance(node[0], int)
        params_L = jax.tree.map(lambda shape: array(layers, *shape), WEIGHTS, is_leaf=is_shape)
        x = (array(batch, TOKENS, WIDTH),) * 2
        backprop, _, lockstep = strategy.partition("/")
        lowered = step.lower(params_L, params_L, x, backprop, bool(lockstep))
        memory = lowered.compile().memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results

    return temporary_bytes


@pytest.fixture
def growth(temporary_bytes):
    def grows(strategy):
        """(bytes a layer, bytes a layer and example): temporaries = ... + (a + b batch) layers."""
        found = {
            size: temporary_bytes(strategy, *size) for size in itertools.product(LAYERS, BATCHES)
        }
        (shallow, deep), (few, many) = LAYERS, BATCHES
        a_layer = {b: (found[deep, b] - found[shallow, b]) / (deep - shallow) for b in BATCHES}
        with_batch = (a_layer[many] - a_layer[few]) / (many - few)
        return a_layer[few] - with_batch * few, with_batch

    return grows


def test_reversed_activations_do_not_grow_with_depth(growth):
    weights = 4 * 12 * WIDTH**2
    streams = 2 * 4 * TOKENS * WIDTH

    _, remat = growth("remat")
    of_depth, of_both = growth("reverse/lockstep")
    print(f"{of_depth / weights:.3f} bytes a byte of weights; {of_both / remat:.3f} of remat's")

    assert remat == pytest.approx(streams, rel=0.1)  # what is measured is what is meant
    assert of_both <= 0.02 * remat
    # Of what grows with depth alone, half is a copy of the weights in bfloat16.
    assert of_depth <= 0.6 * weights


def test_intermediates_of_a_layer_are_not_padded(temporary_bytes):
    """An array whose examples lie side by side in memory takes 128 for the 2 that there are."""
    layers, examples = LAYERS[0], BATCHES[0]
    weights_in_bfloat16 = layers * 2 * 12 * WIDTH**2
    assert temporary_bytes("reverse/lockstep", layers, examples) <= 1.2 * weights_in_bfloat16
