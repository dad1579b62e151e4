"""What the TPU compiler makes of a chain: how its memory grows with depth and with the batch."""

import importlib.util
import itertools

import jax
import pytest

from revnet_jax.memory.benchmark_models import Transformer
from revnet_jax.memory.topology import devices, parse_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler"),
]

LAYERS, BATCHES = (12, 24), (2, 4)
MODEL = Transformer(width=1024, tokens=1024, head_size=128, dtype="bfloat16")


@pytest.fixture
def growth(monkeypatch):
    topology = parse_topology("v5e:1x1")
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    on_tpu = jax.sharding.SingleDeviceSharding(devices(topology)[0])

    def temporary_bytes(strategy, layers, batch):
        """At the peak, beside arguments and results: temp_size_in_bytes may count those again."""
        program = MODEL.program(strategy, layers, batch)
        state, x = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_tpu),
            jax.eval_shape(program.init),
        )
        step = jax.jit(program.step.__wrapped__, donate_argnums=0)
        memory = step.lower(state, x).compile().memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results

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
    layer = jax.eval_shape(MODEL.init_layer, jax.random.key(0))
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(layer))
    streams = 2 * 4 * MODEL.tokens * MODEL.width

    _, remat = growth("remat")
    of_depth, of_both = growth("reverse/lockstep")

    assert remat == pytest.approx(streams, rel=0.01)
    assert of_both <= 0.02 * remat
    # Of what grows with depth alone, half is a copy of the weights in bfloat16.
    assert of_depth <= 0.6 * weights
