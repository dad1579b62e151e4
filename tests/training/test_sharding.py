"""A mesh of devices trains what one device does."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, image_classification, language_model
from revnet_jax.models.partition import spec_of
from revnet_jax.optimizers.rounding import MOMENTS
from revnet_jax.training.build import build_recipe, check_split
from revnet_jax.training.compiler import initialized
from revnet_jax.training.program import step_program
from revnet_jax.training.sharding import (
    local_rows,
    make_mesh,
    mesh_sizes,
    put_batch,
    shapes_on_mesh,
)
from revnet_jax.training.step import init_state
from tests import thorough

# Learning rates so small that ten steps do not amplify roundings: chaos is not to be compared.
COMMON = {"num_steps": 20, "batch_size": 16, "schedule.warmup_steps": 0, "optimizer.name": "sgd"}
TRANSFORMER = {"schedule.learning_rate": 0.01, "model.layers": 3, "model.width": 32}
FAMILIES = {
    "revnet": {
        "model.units": (2, 3),  # of each stage but the first one less is in a chain
        "model.channels": (16, 16, 32),
    },
    "vit": {**TRANSFORMER, "model.heads": 4, "model.hidden": 64, "model.patch": 2},
    "decoder": {
        **TRANSFORMER,
        "data.vocab_size": 32,
        "data.context": 16,
        "model.heads": 4,
        "model.kv_heads": 2,
        "model.hidden": 48,
    },
}
REVNET38 = {
    "model.units": (3, 3, 3),
    "model.channels": (32, 32, 64, 112),
    "data.image_shape": (16, 16, 3),
}
MESHES = [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
# float32 streams on a grid so fine that sums in another order do not round otherwise.
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
GRID_BITS = {"float32": 18, "float64": 12}
# In float32 sums in another order change the gradient of a RevNet-38 by 1e-4 to 1e-3: each ReLU is
# a decision.
REVNET_RATES = {"float32": 1e-5, "float64": 1e-3}


def differences(family, settings, cases):
    """What `sharded_steps.py` prints for cases of (strategy, in lockstep, mesh, dtype)."""
    rate = lambda dtype: {"schedule.learning_rate": REVNET_RATES[dtype]}
    written = [
        {
            "family": family,
            "settings": {
                **COMMON,
                **settings,
                **(rate(dtype) if family == "revnet" else {}),
                "model.backprop": backprop,
                "optimizer.lockstep": lockstep,
                "model.grid_bits": GRID_BITS[dtype],
            },
            "mesh": mesh,
            "dtype": dtype,
        }
        for backprop, lockstep, mesh, dtype in cases
    ]
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).with_name("sharded_steps.py"))],
        input=json.dumps(written),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases)
    return found


def check(found):
    for each in found:
        tolerance = TOLERANCES[each["dtype"]]
        assert each["fell"], each
        assert each["mismatches"] == 0, each
        assert each["losses"] < tolerance, each
        assert each["params"] < tolerance, each


@pytest.mark.parametrize("family", ["decoder", thorough("revnet"), thorough("vit")])
def test_ten_steps_on_eight_devices_are_those_on_one(family):
    check(differences(family, FAMILIES[family], [("reverse", True, MESHES[2], "float64")]))


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["decoder", "revnet", "vit"])
def test_ten_steps_in_float32_with_split_weights(family):
    check(differences(family, FAMILIES[family], [("reverse", False, MESHES[1], "float32")]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "meshes"),
    [
        (
            {"model.feed_forward_chunks": 2, "model.loss_chunk": 4, "model.tied": True},
            [{"data": 1, "tensor": 8}, {"data": 1, "fsdp": 4, "tensor": 2}],
        ),
        ({"model.experts": 4, "model.dropout": 0.1, "microbatches": 2}, [MESHES[2]]),
    ],
)
def test_weights_in_loops_and_in_experts(changes, meshes):
    settings = {**FAMILIES["decoder"], "model.heads": 8, "model.kv_heads": 8, **changes}
    cases = [("reverse", False, mesh, "float64") for mesh in meshes]
    check(differences("decoder", settings, cases))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("changes", "lockstep", "meshes"),
    [
        (
            {"model.kv_heads": 2, "model.feed_forward_chunks": 2, "model.loss_chunk": 4},
            True,
            [{"data": 1, "sequence": 8}, {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}],
        ),
        (
            {
                "model.experts": 4,
                "model.dropout": 0.1,
                "model.tied": True,
                "microbatches": 2,
                "model.window": 5,
                "model.separate_documents": True,
                "data.end_token": 3,
            },
            False,
            [{"data": 2, "sequence": 4}],
        ),
    ],
)
def test_sequences_in_parts(changes, lockstep, meshes):
    settings = {**FAMILIES["decoder"], "model.heads": 8, "model.kv_heads": 8, **changes}
    check(differences("decoder", settings, [("reverse", lockstep, m, "float64") for m in meshes]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("integrator", "lockstep", "frozen_dtype"),
    [
        ("bdia", False, ""),
        ("bdia", True, ""),
        ("bdia", False, "int8"),
        ("bdia", True, "int8"),
        ("meft", True, ""),
    ],
)
def test_frozen_kernels_and_integrators(integrator, lockstep, frozen_dtype):
    """Frozen kernels are split and gathered like others; BDIA draws a factor for each example."""
    settings = {
        **FAMILIES["decoder"],
        "model.integrator": integrator,
        "model.lora_rank": 4,
        "model.frozen_dtype": frozen_dtype,
        "model.feed_forward_chunks": 2,
        "optimizer.trainable": "lora|adapter|embed|head",
    }
    cases = [("reverse", lockstep, mesh, "float64") for mesh in MESHES[1:]]
    check(differences("decoder", settings, cases))


@pytest.mark.thorough
def test_moments_in_float8_are_rounded_as_on_one_device():
    """Even where blocks are split: axes of 32 split over 8 devices."""
    settings = {**FAMILIES["decoder"], "optimizer.state_dtype": "float8"}
    cases = [("reverse", True, MESHES[2], "float64"), ("reverse", False, MESHES[1], "float64")]
    check(differences("decoder", settings, cases))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("backprop", "lockstep"),
    [("store", False), ("remat", False), ("reverse", False), ("reverse", True)],
)
@pytest.mark.parametrize("family", ["revnet38", "vit", "decoder"])
def test_every_mesh_and_strategy(family, backprop, lockstep, dtype):
    settings = FAMILIES.get(family, REVNET38)
    cases = [(backprop, lockstep, mesh, dtype) for mesh in MESHES]
    found = differences("revnet" if family == "revnet38" else family, settings, cases)
    print(*({name: each[name] for name in ("mesh", "losses", "params")} for each in found))
    check(found)


@pytest.mark.thorough
def test_a_checkpoint_of_eight_devices_is_one_of_four_and_of_one(tmp_path):
    program = pathlib.Path(__file__).with_name("sharded_checkpoint.py")
    subprocess.run([sys.executable, str(program), str(tmp_path / "checkpoints")], check=True)


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_what_lies_where(optimizer_name):
    """Weights, and what the optimizer keeps of them, in equal parts; the rest is small."""
    config = language_model()
    config.update_from_flattened_dict(FAMILIES["decoder"])
    config.optimizer.name = optimizer_name
    mesh = make_mesh(jax.devices(), data=1, fsdp=2)
    for lockstep, state_dtype in itertools.product((False, True), MOMENTS):
        config.optimizer.update({"lockstep": lockstep, "state_dtype": state_dtype})
        task, _, optimizer = build_recipe(config)
        init = functools.partial(init_state, task.network, optimizer, 0)
        state = shapes_on_mesh(init, task.network.rules, mesh)
        leaves = jax.tree.leaves((state.variables, state.opt_state))
        whole = sum(leaf.size for leaf in leaves)
        part = sum(
            leaf.sharding.shard_shape(leaf.shape) != leaf.shape and leaf.size for leaf in leaves
        )
        assert part > 0.98 * whole


@pytest.mark.thorough
def test_weights_in_bfloat16_on_two_devices():
    """Without an option of `exact_jit` XLA's CPU compiler ends the process."""
    config = language_model()
    config.update_from_flattened_dict({**COMMON, **FAMILIES["decoder"]})
    config.model.param_dtype = "bfloat16"
    norms = []
    for devices in (jax.devices()[:1], jax.devices()):
        config.mesh.update({"data": 1, "fsdp": len(devices)})
        program = step_program(config, devices)
        state = initialized(program.init, program.state)
        tokens = np.arange(16 * 16, dtype=np.int32).reshape(16, 16) % 32
        batch = put_batch({"token": tokens, "target": tokens[::-1].copy()}, program.mesh)
        _, metrics = program.step(state, batch)
        norms.append([float(metrics[name]) for name in ("train_loss", "gradient_norm")])
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_axes_that_do_not_divide_leave_a_dimension_whole():
    mesh = make_mesh(jax.devices(), data=1, fsdp=2)
    rules = ((r"kernel$", ("fsdp", "tensor")), (r"", (None,)))
    assert spec_of(rules, "layers/kernel", (5, 6, 4), mesh) == jax.P(None, "fsdp", "tensor")
    assert spec_of(rules, "layers/kernel", (5, 3, 4), mesh) == jax.P(None, None, "tensor")
    assert spec_of(rules, "bias", (6,), mesh) == jax.P(None)
    assert spec_of(rules, "scale", (), mesh) == jax.P()
    mesh = make_mesh(jax.devices(), data=1, sequence=2)
    both = ("fsdp", "sequence")
    assert spec_of(rules, "layers/kernel", (5, 6, 4), mesh) == jax.P(None, both, "tensor")
    assert spec_of(rules, "layers/kernel", (5, 3, 4), mesh) == jax.P(None, None, "tensor")


def test_meshes():
    two, one = jax.devices(), {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert dict(make_mesh(two).shape) == one | {"data": 2}
    assert dict(make_mesh(two, data=1, tensor=-1).shape) == one | {"tensor": 2}
    assert mesh_sizes(16, data=-1, fsdp=4, slices=2) == (4, 4, 1, 1)
    assert mesh_sizes(16, data=-1, fsdp=2, sequence=4) == (2, 2, 4, 1)
    with pytest.raises(ConfigError, match=r"mesh.data: got 1 for 2 slices, expected a multiple"):
        mesh_sizes(16, data=1, fsdp=-1, slices=2)
    assert local_rows(make_mesh(two), 4).tolist() == [0, 1, 2, 3]
    for sizes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 4}, {"data": 0}, {"data": 1}):
        with pytest.raises(
            ConfigError, match=r"config.mesh: got data=.* expected sizes whose product"
        ):
            make_mesh(two, **sizes)
    config = image_classification()
    config.batch_size = 3
    with pytest.raises(ConfigError, match=r"config.batch_size: got 3, expected a multiple of 2"):
        check_split(config, make_mesh(two))
    check_split(config, make_mesh(two[:1]))
    config.update({"batch_size": 6, "microbatches": 2})
    with pytest.raises(ConfigError, match=r"got 6, expected a multiple of 4: .* of 2 microbatches"):
        check_split(config, make_mesh(two))
    config = language_model()
    config.model.update({"experts": 4, "hidden": 49})
    with pytest.raises(ConfigError, match=r"config.model.hidden: got 49, expected a multiple of"):
        check_split(config, make_mesh(two, data=1, tensor=2))
    config.model.update({"kv_heads": 1, "hidden": 48})
    with pytest.raises(ConfigError, match=r"config.model.kv_heads: got 1, expected a multiple of"):
        check_split(config, make_mesh(two, data=1, tensor=2))
    check_split(config, make_mesh(two, data=1, sequence=2))  # where key-value heads are repeated
    for name, value in (("data.context", 127), ("model.heads", 3)):
        config = language_model()
        config.update_from_flattened_dict({name: value})
        with pytest.raises(ConfigError, match=f"config.{name}: got {value}, expected a multiple"):
            check_split(config, make_mesh(two, data=1, sequence=2))
    with pytest.raises(
        ConfigError, match=r"mesh.sequence: got 2 for images, expected 1: it splits"
    ):
        check_split(image_classification(), make_mesh(two, data=1, sequence=2))
