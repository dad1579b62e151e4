"""Training a part of the parameters: the others cost no gradient, state or product."""

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.planning.topology import parse_topology
from revnet_jax.planning.worker import measure_step
from revnet_jax.programs.counts import arithmetic
from revnet_jax.runs.manifest import by_path
from revnet_jax.training.build import build_recipe
from revnet_jax.training.step import init_state, make_train_step
from tests import thorough

FAST = {"xla_backend_optimization_level": 0}
SIZES = {
    "batch_size": 4,
    "data.vocab_size": 16,
    "data.context": 8,
    "model.layers": 3,
    "model.width": 16,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.hidden": 24,
    "model.lora_rank": 2,
    "schedule.warmup_steps": 0,
    "optimizer.trainable": "lora",
}


def config_of(**changes):
    config = language_model()
    config.update_from_flattened_dict(SIZES | changes)
    return config


def steps(config, number=2):
    """(the state before, the state after, the last metrics, FLOPs of a step)."""
    task, schedule, optimizer = build_recipe(config)
    first = state = init_state(task.network, optimizer, seed=0)
    step = jax.jit(make_train_step(task, optimizer, schedule), compiler_options=FAST)
    token_BT = np.random.default_rng(0).integers(0, 16, (4, 9)).astype(np.int32)
    batch = {"token": token_BT[:, :-1], "target": token_BT[:, 1:]}
    flops = arithmetic(step.trace(state, batch).jaxpr, platform="cpu")
    metrics = None
    for _ in range(number):
        state, metrics = step(state, batch)
    return first, state, metrics, flops


def sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        thorough({"model.frozen_dtype": "int8"}),
        thorough({"optimizer.lockstep": True}),
        thorough({"model.reversible": False, "model.backprop": "remat"}),
        thorough({"model.integrator": "bdia"}),
        thorough({"optimizer.name": "muon"}),
        thorough({"optimizer.state_dtype": "bfloat16", "model.param_dtype": "bfloat16"}),
        thorough({"microbatches": 2}),
    ],
    ids=str,
)
def test_only_what_matches_is_trained(changes):
    trainable = Trainable("lora")
    first, last, metrics, flops = steps(config_of(**changes))
    trained, frozen = trainable.divide(first.variables.params)
    after, still = trainable.divide(last.variables.params)
    assert len(jax.tree.leaves(trained)) == 8
    for old, new in zip(jax.tree.leaves(frozen), jax.tree.leaves(still), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(trained), jax.tree.leaves(after), strict=True):
        assert np.any(old != new)
    assert sizes(last.opt_state) <= 2 * sizes(trained)
    if "exact_mismatches" in metrics:
        assert metrics["exact_mismatches"] == 0
    # Kernels in 8 bits take the same products, and cannot be trained.
    of_all = changes | {"optimizer.trainable": "", "model.frozen_dtype": ""}
    *_, full = steps(config_of(**of_all), number=0)
    # A kernel takes three products in training with all parameters and two without its own
    # gradient, plus that of recomputation. Attention and adapters take as many as before.
    in_layers = by_path(frozen["layers"]).items()
    kernels = [leaf.size for path, leaf in in_layers if path.endswith("kernel")]
    saved = 2 * 4 * 8 * (sum(kernels) + first.variables.params["head"]["kernel"].size)
    if changes.get("optimizer.name") != "muon":
        assert full - flops == saved


@pytest.mark.thorough
@pytest.mark.parametrize("lockstep", [False, True])
def test_a_plan_counts_the_gradients_of_what_is_trained(lockstep, tmp_path):
    """The chain's of one layer in lockstep; nothing outside of the chain is trained."""
    config = config_of(**{"optimizer.lockstep": lockstep})
    found = measure_step(config, parse_topology("local"), tmp_path)
    task, _, _ = build_recipe(config)
    params = jax.eval_shape(task.network.init, jax.random.key(0)).params
    trained, _ = Trainable("lora").divide(params)
    layers = config.model.layers if lockstep else 1
    assert found["gradient_bytes"] == 4 * sizes(trained) // layers


@pytest.mark.thorough
def test_lockstep_is_the_ordinary_step():
    """After two steps, the second with a moment of the first."""
    _, ordinary, metrics, _ = steps(config_of())
    _, lockstep, others, _ = steps(config_of(**{"optimizer.lockstep": True}))
    for a, b in zip(*(jax.tree.leaves(s.variables) for s in (ordinary, lockstep)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], others["gradient_norm"], rtol=1e-4)


def test_a_chain_may_be_frozen_as_a_whole():
    """The head alone is trained: nothing is rewound, and lockstep has nothing to do."""
    first, last, metrics, _ = steps(config_of(**{"optimizer.trainable": "^head"}))
    head = first.variables.params["head"]["kernel"]
    assert np.any(head != last.variables.params["head"]["kernel"])
    assert np.isfinite(metrics["train_loss"])
    with pytest.raises(ConfigError, match="matches no parameter of a chain, expected False"):
        build_recipe(config_of(**{"optimizer.trainable": "^head", "optimizer.lockstep": True}))


@pytest.mark.parametrize("lockstep", [thorough(False), True])
def test_one_of_several_chains_is_trained(tiny_config, lockstep):
    """Also where the gradient of each layer is clipped. Traced, not compiled."""
    tiny_config.model.units = (2, 2)
    changes = {"trainable": "^stage1_a|head", "lockstep": lockstep, "clip": "layer"}
    tiny_config.optimizer.update({**changes, "clip_norm": 1.0})
    task, schedule, optimizer = build_recipe(tiny_config)
    assert len(task.network.stacked) > 1
    state = jax.eval_shape(lambda: init_state(task.network, optimizer, seed=0))
    step = make_train_step(task, optimizer, schedule)
    assert jax.eval_shape(step, state, task.batch_shapes(16))[0] == state


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("bias", "got trainable='bias', which matches no parameter, .* embed, head/kernel, head/s"),
        ("(", r"got trainable='\(' \(missing .*, expected a regular expression"),
    ],
)
def test_patterns_that_match_nothing(pattern, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe(config_of(**{"optimizer.trainable": pattern}))
