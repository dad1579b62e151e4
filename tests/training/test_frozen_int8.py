"""Training beside kernels in 8 bits: exactness, memory, resumption, and another run's weights."""

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.models.int8 import quantized
from revnet_jax.planning.topology import parse_topology
from revnet_jax.planning.worker import measure_step
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.runs.manifest import by_path
from revnet_jax.training.compiler import initialized
from revnet_jax.training.initial import load_weights
from revnet_jax.training.loop import train
from revnet_jax.training.program import step_program
from revnet_jax.training.restore import restore_run
from revnet_jax.training.sharding import put_batch
from revnet_jax.training.step import TrainState
from tests import slow, thorough
from tests.runs.test_checkpoint import assert_same_bits

SIZES = {
    "num_steps": 4,
    "batch_size": 4,
    "eval_batch_size": 8,
    "eval_every_steps": 4,
    "checkpoint_every_steps": 2,
    "data.context": 8,
    "data.eval_batches": 1,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.hidden": 24,
    "model.compute_dtype": "bfloat16",
    "schedule.name": "constant",
    "schedule.warmup_steps": 0,
    "schedule.learning_rate": 0.02,
}
INT8 = {"model.lora_rank": 2, "model.frozen_dtype": "int8", "optimizer.trainable": "lora"}


def config_of(**changes):
    config = language_model()
    config.update_from_flattened_dict(SIZES | INT8 | changes)
    return config


def after_two_steps(**changes):
    config = config_of(**changes)
    program = step_program(config, jax.devices()[:1])
    first = initialized(program.init, program.state)
    state = initialized(program.init, program.state)
    token_BT = np.random.default_rng(0).integers(0, 256, (4, 9)).astype(np.int32)
    batch = put_batch({"token": token_BT[:, :-1], "target": token_BT[:, 1:]}, program.mesh)
    for _ in range(2):
        state, metrics = program.step(state, batch)
    assert np.isfinite(metrics["train_loss"])
    assert metrics.get("exact_mismatches", 0) == 0
    frozen, trained = 0, 0
    for path, old in by_path(first.variables).items():
        is_same = np.array_equal(old, by_path(state.variables)[path])
        assert is_same != ("lora" in path)
        frozen, trained = frozen + is_same, trained + (not is_same)
    assert trained == 8 < frozen
    return state.variables


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        thorough({}, [{"model.backprop": "store"}]),
        slow({}, [{"model.stored_layers": 1}, {"model.backprop": "remat"}]),
        thorough({"model.integrator": "bdia"}, [{"model.backprop": "store"}]),
        slow({"optimizer.lockstep": True}, [{"model.backprop": "store"}]),
        slow({"model.feed_forward_chunks": 2}, [{"model.backprop": "store"}]),
    ],
    ids=str,
)
def test_strategies_train_the_same_bits(kind, others):
    reversed_ = after_two_steps(**kind)
    for other in others:
        assert_same_bits(after_two_steps(**kind, **other), reversed_)


@pytest.mark.parametrize("backprop", [thorough("reverse"), slow("remat"), slow("store")])
def test_a_layer_takes_one_byte_for_each_frozen_weight(backprop, tmp_path):
    """Not only in the state, but in the whole compiled step: there are no copies as floats."""
    sizes = {"batch_size": 2, "model.width": 128, "model.hidden": 512, "model.lora_rank": 1}
    sizes |= {"model.backprop": backprop, "model.kv_heads": 2}
    a_layer = 3 * 128 * 128 + 128 * 128 + 2 * 128 * 512 + 512 * 128
    found = []
    for layers in (3, 6):
        config = config_of(**sizes, **{"model.layers": layers})
        found.append(measure_step(config, parse_topology("local"), tmp_path))
    for name in ("weights_bytes", "needed_bytes"):
        growth = (found[1][name] - found[0][name]) / 3
        # Beside the kernels there are adapters and norms, and for `store` the activations.
        assert a_layer < growth < (1.9 if name == "needed_bytes" else 1.2) * a_layer


@pytest.mark.thorough
@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits(tmp_path):
    train(config_of(), tmp_path / "whole")
    train(config_of(num_steps=2, eval_every_steps=4), tmp_path / "half")
    train(config_of(), tmp_path / "half")
    whole, half = (restore_run(tmp_path / name).variables for name in ("whole", "half"))
    assert_same_bits(half, whole)
    with pytest.raises(ConfigError, match=r"config\.model\.frozen_dtype: got ''"):
        train(config_of(num_steps=6, **{"model.frozen_dtype": ""}), tmp_path / "half")


def saved(workdir, config):
    """The weights that a run of this config starts with, saved as if by a run."""
    program = step_program(config, jax.devices())
    variables = initialized(lambda: program.init().variables, program.state.variables)
    with Checkpoints(workdir / "checkpoints", best_metric=None, best_mode="max") as checkpoints:
        checkpoints.save(7, TrainState.of_variables(variables))
    return by_path(variables)


def loaded(workdir, config):
    """{path: leaf}, without the adapters if `workdir` has none."""
    program = step_program(config, jax.devices())
    step, variables = load_weights(workdir, program.state.variables, {})
    assert step == 7
    shardings = {path: spec.sharding for path, spec in by_path(program.state.variables).items()}
    for path, leaf in (found := by_path(variables)).items():
        assert leaf.sharding == shardings[path]
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_floats_of_another_run_are_quantised(param_dtype, tmp_path):
    plain = {"model.lora_rank": 0, "model.frozen_dtype": "", "optimizer.trainable": ""}
    both = {"model.param_dtype": param_dtype, "mesh.data": 1, "mesh.tensor": 2, "model.kv_heads": 2}
    floats = saved(tmp_path, config_of(**both, **plain))
    expected = dict(floats)
    for path, leaf in floats.items():
        if path.startswith("params/layers") and path.endswith("kernel"):
            assert leaf.dtype == param_dtype
            expected[path], expected[f"{path}_scale"] = jax.jit(jax.vmap(quantized))(leaf)
    assert_same_bits(loaded(tmp_path, config_of(**both)), expected)
    with pytest.raises(ConfigError, match=r"/out/kernel: got .*, 16\], expected int8\[2, 32, 16\]"):
        loaded(tmp_path, config_of(**both, **{"model.head_size": 16}))
    # Kernels are quantised from any floats, so they are no reason to refuse the others.
    other = "bfloat16" if param_dtype == "float32" else "float32"
    message = rf"^config.model.param_dtype: got {other}, expected {param_dtype}, the dtype of the"
    for changed in ({}, plain):
        with pytest.raises(ConfigError, match=message):
            loaded(tmp_path, config_of(**both | changed | {"model.param_dtype": other}))


@pytest.mark.thorough
def test_a_run_in_8_bits_is_a_source_for_others_like_it(tmp_path):
    expected = saved(tmp_path, config_of())
    assert_same_bits(loaded(tmp_path, config_of()), expected)
    message = r"layers/0/\w+/kernel: got int8\[.*, expected float32\["
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, config_of(**{"model.frozen_dtype": ""}))
    assert "\n" not in str(caught.value)
