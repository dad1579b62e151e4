"""What compilers make of a language model's step: nothing of T x T or T x V, nothing per layer."""

import importlib.util
import itertools
import re

import jax
import pytest

from revnet_jax.config import language_model
from revnet_jax.planning.topology import parse_topology, topology_devices
from revnet_jax.training.program import step_program

CONTEXT, VOCAB = 1536, 5120  # sizes that nothing else has


def compiled_step(on, **changes):
    config = language_model()
    config.data.update({"context": CONTEXT, "vocab_size": VOCAB})
    config.model.update({"width": 512, "heads": 4, "kv_heads": 2, "hidden": 1408})
    config.model.loss_chunk = 512
    config.optimizer.lockstep = True
    config.update_from_flattened_dict({"batch_size": 2, "model.layers": 2, **changes})
    program = step_program(config, on)
    return program.step.lower(program.state, program.batch).compile()


def shapes(compiled):
    """The shapes of all arrays in the program."""
    found = re.findall(r"\b(?:f32|bf16|f16|s32|pred|u32)\[([\d,]+)\]", compiled.as_text())
    return {tuple(map(int, text.split(","))) for text in found}


def check_shapes(compiled):
    for shape in shapes(compiled):
        assert shape.count(CONTEXT) < 2, f"scores of all tokens: {shape}"
        assert not {CONTEXT, VOCAB} <= set(shape), f"logits of all tokens: {shape}"
        assert not {2 * CONTEXT, VOCAB} <= set(shape), f"logits of all tokens: {shape}"


@pytest.mark.thorough
def test_neither_all_scores_nor_all_logits_exist():
    check_shapes(compiled_step(jax.devices()[:1]))


@pytest.mark.thorough
def test_the_check_sees_them():
    """Where a chunk is all of them."""
    with pytest.raises(AssertionError, match="logits of all tokens"):
        check_shapes(compiled_step(jax.devices()[:1], **{"model.loss_chunk": 2 * CONTEXT}))


@pytest.fixture
def tpu(monkeypatch):
    topology = parse_topology("v5e:1x1")
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    return topology_devices(topology)[:1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
def test_activations_do_not_grow_with_depth_on_a_tpu(tpu):
    """Second differences: what grows with depth and batch, against the streams of a layer."""

    def needed(backprop, layers, batch):
        compiled = compiled_step(
            tpu,
            **{
                "model.backprop": backprop,
                "model.layers": layers,
                "batch_size": batch,
                "model.compute_dtype": "bfloat16",
            },
        )
        check_shapes(compiled)
        memory = compiled.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results

    def growth(backprop):
        sizes = itertools.product((8, 16), (4, 8))
        found = {size: needed(backprop, *size) for size in sizes}
        deeper = {b: found[16, b] - found[8, b] for b in (4, 8)}
        return (deeper[8] - deeper[4]) / (8 * 4)

    streams = 2 * 4 * CONTEXT * 512
    remat, reverse = growth("remat"), growth("reverse")
    print(f"bytes a layer and sequence: remat {remat:,.0f}, reverse {reverse:,.0f}")
    assert remat == pytest.approx(streams, rel=0.1)
    assert reverse <= 0.02 * remat
