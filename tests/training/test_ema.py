"""The moving average of the weights: what it is, where it is kept, and what uses it."""

import json
import shutil

import jax
import numpy as np
import pytest

from revnet_jax.config import language_model
from revnet_jax.planning.topology import parse_topology
from revnet_jax.planning.worker import measure_step
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.runs.manifest import by_path
from revnet_jax.training.compiler import initialized
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.generate import generate_text
from revnet_jax.training.inputs import build_data
from revnet_jax.training.loop import train
from revnet_jax.training.program import step_program
from revnet_jax.training.restore import evaluate_run, restore_run
from revnet_jax.training.sharding import on_mesh, put_batch
from tests import thorough
from tests.runs.test_checkpoint import assert_same_bits
from tests.small_run import ONE_STAGE

DECAY = 0.5  # reached at the ninth step
DECODER = {
    "batch_size": 8,
    "schedule.warmup_steps": 0,
    "eval_batch_size": 8,
    "data.context": 8,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.hidden": 16,
    "model.param_dtype": "bfloat16",
}


@pytest.fixture
def config(tiny_config):
    tiny_config.update_from_flattened_dict({**ONE_STAGE, "ema_decay": DECAY})
    return tiny_config


@pytest.fixture
def decoder():
    config = language_model()
    config.update_from_flattened_dict({**DECODER, "ema_decay": DECAY})
    return config


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def assert_naive_average(config, devices):
    program = step_program(config, devices)
    state = initialized(program.init, program.state)
    expected = wide(state.variables)
    data = build_data(config, program.mesh)
    batches = data.train(0)
    for step in range(10):
        state, _ = program.step(state, put_batch(next(batches), program.mesh))
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, decay=decay: decay * old + (1 - decay) * new,
            expected,
            wide(state.variables),
        )
    batches.close()
    for leaf in jax.tree.leaves(state.ema):
        assert leaf.dtype == np.float32
    jax.tree.map(
        lambda got, naive: np.testing.assert_allclose(got, naive, rtol=1e-5, atol=1e-6),
        wide(state.ema),
        expected,
    )
    assert_differ(state.ema, state.variables)


def assert_differ(ema, variables):
    """Some rounding of the average to the variables' dtype is not enough to tell them apart."""
    far = [
        np.max(np.abs(a - b))
        for a, b in zip(*map(jax.tree.leaves, (wide(ema), wide(variables))), strict=True)
    ]
    assert max(far) > 1e-3


@pytest.mark.parametrize(
    "settings", [thorough({"microbatches": 2}), thorough({"optimizer.lockstep": True})], ids=str
)
def test_it_is_the_naive_average_in_float64(settings, config):
    """Running averages of batch statistics are averaged too."""
    config.update_from_flattened_dict(settings)
    assert jax.tree.leaves(step_program(config, jax.devices()).state.ema.stats)
    assert_naive_average(config, jax.devices())


@pytest.mark.thorough
def test_it_is_in_float32_if_parameters_are_not(decoder):
    decoder.optimizer.lockstep = True
    # XLA cannot compile sums of bfloat16 over several devices for a CPU.
    assert_naive_average(decoder, jax.devices()[:1])


def test_it_is_split_over_devices_like_the_parameters(decoder):
    decoder.mesh.update({"data": 1, "fsdp": 2})
    state = step_program(decoder, jax.devices()).state
    places = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
    assert places(state.ema) == places(state.variables)
    assert any(axis for place in places(state.ema) for axis in place.spec)


@pytest.mark.thorough
def test_frozen_parameters_have_no_average(decoder, tmp_path):
    """An evaluation reads them from the variables, also from those of a checkpoint."""
    decoder.update_from_flattened_dict(
        {"optimizer.trainable": "qkv", "num_steps": 2, "checkpoint_every_steps": 2}
    )
    train(decoder, tmp_path)
    _, state = state_of(tmp_path, decoder)
    averaged = [path for path in by_path(state.ema) if path.startswith("params")]
    assert [path.rpartition("/")[0] for path in averaged] == ["params/layers/0/qkv"]
    restored = restore_run(tmp_path).variables
    paths = by_path(restored)
    assert paths.keys() == by_path(state.variables).keys()
    for path in paths:
        source = state.ema if path in by_path(state.ema) else state.variables
        assert_same_bits(paths[path], by_path(source)[path])
    (name,) = averaged
    assert not np.array_equal(paths[name], by_path(state.variables)[name])


def test_a_run_without_it_has_nothing_of_it(config):
    config.ema_decay = 0.0
    program = step_program(config, jax.devices())
    parts = {path.split("/")[0] for path in by_path(program.state)}
    assert parts == {"step", "variables", "opt_state", "key", "exact_mismatches"}
    assert program.state.for_evaluation is program.state.variables
    # The step has one argument and one result for each of its parts, as before there was one.
    lowered = program.step.lower(program.state, program.batch)
    state, metrics = lowered.out_info
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    assert set(metrics) == {
        "train_loss",
        "train_accuracy",
        "learning_rate",
        "gradient_norm",
        "exact_mismatches",
        "exact_max_difference",
        "grid_range_used",
        "grid_updates_lost",
        "variables_norm",
    }


def state_of(workdir, config):
    program = step_program(config, jax.devices())
    options = {"best_metric": None, "best_mode": "max", "read_only": True}
    with Checkpoints(workdir / "checkpoints", **options) as checkpoints:
        return program, checkpoints.restore(program.state)[1]


@pytest.mark.thorough
def test_it_is_evaluated_and_survives_a_restart(config, tmp_path):
    config.ema_decay = 0.9
    whole, part = tmp_path / "whole", tmp_path / "part"
    summary = train(config, whole)
    program, state = state_of(whole, config)
    assert_differ(state.ema, state.variables)
    # What is evaluated is the average, by the run and from its folder.
    sums = jax.jit(on_mesh(program.task.sums, program.mesh))
    loss = lambda variables: evaluate(
        sums, variables, build_data(config, program.mesh).test(), program.mesh
    )["loss"]
    assert summary["eval_loss"] == pytest.approx(loss(state.ema), rel=1e-5)
    assert summary["eval_loss"] != pytest.approx(loss(state.variables), rel=1e-4)
    assert evaluate_run(whole)["eval_loss"] == summary["eval_loss"]
    assert_same_bits(restore_run(whole).variables, state.ema)
    # From step 10, to the same bits.
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "12")
    (part / "summary.json").unlink()
    assert train(config, part)["eval_loss"] == summary["eval_loss"]
    assert_same_bits(state_of(part, config)[1], state)
    # Another run starts from the weights, not from their average.
    config.update({"init_from": str(whole), "num_steps": 1, "eval_every_steps": 1})
    train(config, tmp_path / "next")
    shutil.rmtree(tmp_path / "next" / "checkpoints" / "1")
    first = state_of(tmp_path / "next", config)[1]
    assert_same_bits(first.variables, state.variables)
    assert_same_bits(first.ema, state.variables)


@pytest.mark.thorough
def test_text_is_generated_with_it(run_program, monkeypatch, tmp_path):
    """In float32, although the parameters are in bfloat16."""
    flags = [f"--config.{name}={value}" for name, value in DECODER.items()]
    flags += [f"--config.ema_decay={DECAY}", "--config.num_steps=5", "--config.data.eval_batches=3"]
    flags += [f"--workdir={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.delenv("XLA_FLAGS")  # one device, for the same reason as above
        status, out, err = run_program("train", "--config=configs/lm_bytes.py", *flags)
    assert status == 0, err
    run = restore_run(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.variables)} == {np.dtype(np.float32)}
    evaluated = evaluate_run(tmp_path)["eval_loss"]
    assert evaluated == pytest.approx(json.loads(out)["eval_loss"], rel=1e-5)
    assert "".join(generate_text(tmp_path, "ab", num_tokens=5))


@pytest.mark.thorough
def test_a_plan_counts_it(config, tmp_path):
    """As weights: four bytes for each trained parameter and each running average."""
    sizes = []
    for decay in (0.0, DECAY):
        config.ema_decay = decay
        sizes.append(measure_step(config, parse_topology("local"), tmp_path))
    without, with_it = sizes
    num_bytes = with_it["weights_bytes"] - without["weights_bytes"]
    state = step_program(config, jax.devices()).state
    assert num_bytes == sum(4 * leaf.size for leaf in jax.tree.leaves(state.variables))
    assert with_it["needed_bytes"] >= without["needed_bytes"] + num_bytes
