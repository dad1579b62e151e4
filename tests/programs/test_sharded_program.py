"""Weights split over devices: what compiled steps hold of them, and gather of them at a time."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.config import language_model
from revnet_jax.planning.topology import parse_topology, topology_devices
from revnet_jax.programs.traffic import traffic
from revnet_jax.training.program import step_program
from revnet_jax.training.sharding import make_mesh


def small_decoder(**changes):
    config = language_model()
    config.data.update({"context": 48, "vocab_size": 320})
    config.mesh.update({"data": 1, "fsdp": -1})
    config.model.update({"layers": 7, "width": 64, "heads": 4, "kv_heads": 2, "hidden": 176})
    config.model.backprop = "reverse"
    config.optimizer.update({"lockstep": True, "clip_norm": 1.0, "clip": "layer"})
    config.update_from_flattened_dict({"batch_size": 4, "eval_batch_size": 4, **changes})
    return config


def compiled_step(config, on):
    program = step_program(config, on)
    return program, program.step.lower(program.state, program.batch).compile()


def gathered(text):
    """Shapes that all-gathers of a program return, without axes of size 1."""
    found = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    arrays = [dims for result in found for dims in re.findall(r"\w+\[([\d,]+)\]", result)]
    return [tuple(n for n in map(int, dims.split(",")) if n > 1) for dims in arrays]


def check_gathers(text, program, layers):
    """The weights of one layer at a time are gathered, and the embedding and the head."""
    params = program.state.variables.params
    leaves = jax.tree.leaves(params["layers"])
    assert all(leaf.shape[0] == layers for leaf in leaves)
    largest = max(leaf.size // layers for leaf in leaves)
    outside = {leaf.size for leaf in jax.tree.leaves([params["embed"], params["head"]])}
    shapes = gathered(text)
    assert any(math.prod(shape) == largest for shape in shapes)  # else nothing was looked at
    for shape in shapes:
        assert shape[:1] != (layers,), f"all layers at once: {shape}"
        size = math.prod(shape)
        assert size <= largest or size in outside, f"more than a layer's largest: {shape}"


def argument_share(program, compiled):
    """Bytes of a device's arguments, of those of all arrays whole."""
    arrays = jax.tree.leaves((program.state, program.batch))
    whole = sum(array.size * array.dtype.itemsize for array in arrays)
    return compiled.memory_analysis().argument_size_in_bytes / whole


@pytest.fixture(scope="module")
def on_cpu():
    return compiled_step(small_decoder(), jax.devices()[:2])


def test_each_device_holds_its_part(on_cpu):
    assert argument_share(*on_cpu) == pytest.approx(1 / 2, rel=0.02)


def test_layers_are_gathered_one_at_a_time(on_cpu):
    program, compiled = on_cpu
    check_gathers(compiled.as_text(), program, layers=7)


def test_what_is_sent_is_that_of_a_layer_twice_and_of_the_embedding(on_cpu):
    program, compiled = on_cpu
    params = program.state.variables.params
    split = [leaf.size * 4 for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2]
    outside = [
        leaf.size * 4 for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and leaf.size > 1000
    ]
    sent = traffic(compiled.as_text()).ici_bytes["all-gather"]
    assert sent == pytest.approx((2 * sum(split) + sum(outside)) / 2, rel=0.05)


@pytest.mark.thorough
def test_what_a_sequence_in_parts_sends():
    """Queries, keys, values and what is read: three times, once of them as cotangents."""
    mesh = {"mesh.fsdp": 1, "mesh.sequence": 2, "model.kv_heads": 1}
    program, compiled = compiled_step(small_decoder(**mesh), jax.devices()[:2])
    text = compiled.as_text()
    tokens, head_size = 4 * 48 // 2, 16
    heads = 4 + 2 * 2 + 4  # one key-value head is repeated, for two devices
    sent = traffic(text).ici_bytes
    assert sent["all-to-all"] == 3 * 7 * tokens * heads * head_size * 4 // 2
    check_gathers(text, program, layers=7)
    assert argument_share(program, compiled) == pytest.approx(1 / 2, rel=0.02)


def test_the_check_sees_all_layers_at_once(on_cpu):
    program, _ = on_cpu
    mesh = make_mesh(jax.devices()[:2], data=1, fsdp=2)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ()))
    wide = jax.ShapeDtypeStruct((7, 64, 2, 176), jnp.float32, sharding=split)
    text = jax.jit(lambda w: w, out_shardings=whole).lower(wide).compile().as_text()
    one_layer = "%x = f32[64,2,176] all-gather(%y)\n"
    with pytest.raises(AssertionError, match="all layers at once"):
        check_gathers(one_layer + text, program, layers=7)


@pytest.fixture
def tpus(monkeypatch):
    topology = parse_topology("v5e:4x4")
    for name, value in topology.environment.items():
        monkeypatch.setenv(name, value)
    return topology_devices(topology)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
def test_parts_of_sixteen_tpus(tpus):
    """A device's arguments, gathers and temporaries, of four and of eight layers."""
    sizes = {"width": 1024, "heads": 8, "kv_heads": 4, "hidden": 2816, "compute_dtype": "bfloat16"}
    changes = {f"model.{name}": value for name, value in sizes.items()}
    changes |= {"data.context": 1024, "data.vocab_size": 4096}
    changes |= {"batch_size": 16, "eval_batch_size": 16}
    beside = {}
    for layers in (4, 8):
        config = small_decoder(**changes, **{"model.layers": layers})
        program, compiled = compiled_step(config, tpus)
        assert argument_share(program, compiled) == pytest.approx(1 / 16, rel=0.02)
        check_gathers(compiled.as_text(), program, layers)
        memory = compiled.memory_analysis()
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        beside[layers] = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results
    leaves = jax.tree.leaves(program.state.variables.params["layers"])
    shard = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 8 / 16
    growth = (beside[8] - beside[4]) / 4
    print(f"{growth / shard:.2f} bytes a byte of a layer's part; {beside[4] / 2**20:,.0f} MiB of 4")
    # 0.00 in place; 1.89 if the gradients of all layers are there together.
    assert growth <= 0.6 * shard
