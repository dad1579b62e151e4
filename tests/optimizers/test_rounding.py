"""Training with moments and parameters in 16 and 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revnet_jax.config import ConfigError, image_classification, language_model, vision_transformer
from revnet_jax.optimizers.optimizer import accumulate
from revnet_jax.optimizers.rounding import (
    MOMENTS,
    RoundedState,
    _widen,
    apply_updates,
    rounded,
    widened,
)
from revnet_jax.optimizers.stochastic import FLOAT8, round_to_bfloat16
from revnet_jax.training.build import build_recipe
from revnet_jax.training.step import init_state, make_train_step

STEPS = 4096


def averages_of_squares(optimizer, dtype=jnp.float32):
    """Adam's `nu` over its limit, after STEPS steps with the same gradient each."""
    params = {"kernel": jnp.linspace(1, 1.3, 256)}
    state = optimizer.init(params)

    def step(state, _):
        _, state = optimizer.update(params, state, params)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), state, start), None

    narrow = lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf
    start = jax.tree.map(narrow, state)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, start, None, STEPS)
    state = _widen(state) if isinstance(state, RoundedState) else widened(state)
    return np.asarray(jnp.mean(state.nu["kernel"] / params["kernel"] ** 2))


@pytest.mark.parametrize(("moments", "error"), [("bfloat16", 0.01), ("float8", 0.02)])
def test_slow_averages_move(moments, error):
    adam = optax.scale_by_adam(b2=0.999)
    expected = 1 - 0.999**STEPS
    assert averages_of_squares(rounded(adam, moments=moments)) == pytest.approx(expected, rel=error)
    assert averages_of_squares(adam, jnp.bfloat16) < 0.5  # rounded to the nearest they stop


@pytest.mark.thorough
def test_averages_of_noise_in_float8_are_near_those_in_float32():
    """Gradients are noise, for four times the averages' memory. Rounded anew in every step, as with
    scales that follow the largest of a block, they would scatter by several times themselves."""
    adam = optax.scale_by_adam(b2=0.999)
    optimizers = adam, rounded(adam, moments="float8")
    size = jnp.asarray(np.random.default_rng(0).lognormal(size=(8, 256)), jnp.float32)
    params = {"kernel": size}

    def step(states, key):
        gradient = {"kernel": size * jax.random.normal(key, size.shape)}
        pairs = zip(optimizers, states, strict=True)
        return tuple(o.update(gradient, state, params)[1] for o, state in pairs), None

    states = tuple(optimizer.init(params) for optimizer in optimizers)
    with jax.numpy_dtype_promotion("standard"):
        (true, kept), _ = jax.lax.scan(step, states, jax.random.split(jax.random.key(0), STEPS))
    ratio = _widen(kept).nu["kernel"] / true.nu["kernel"]
    assert float(jnp.mean(ratio)) == pytest.approx(1, abs=0.05)
    assert float(jnp.std(jnp.sqrt(ratio))) < 0.2  # of an update's size


@pytest.mark.thorough
@pytest.mark.parametrize("moments", ["bfloat16", "float8"])
def test_layers_are_rounded_alike_stacked_or_alone(moments):
    optimizer = rounded(optax.adamw(1e-3), moments=moments)
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 32))}
    params = jax.tree.map(jnp.ones_like, gradient)
    run = lambda params, gradient: optimizer.update(gradient, optimizer.init(params), params)
    layer = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    with jax.numpy_dtype_promotion("standard"):
        together = run(params, gradient)
        alone = [run(layer(params, i), layer(gradient, i)) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(a, b if a.ndim == b.ndim else b[0])


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_what_is_kept_in_float8(name):
    """Kernels, with a scale for every 128 numbers, under the path of their parameter."""
    params = {"layers": ({name: jnp.ones((2, 4, 256))},), "head": {"kernel": jnp.ones((4, 10))}}
    state = rounded(optax.scale_by_adam(), moments="float8").init(params)
    kinds = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.dtype, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    for moment in ("mu", "nu"):
        kept, shape = kinds[f"inner/{moment}/layers/0/{name}"]
        assert (kept, shape) == (FLOAT8 if name == "kernel" else jnp.float32, (2, 4, 256))
        scales = kinds.get(f"scales/{moment}/layers/0/{name}")
        assert scales == ((jnp.bfloat16, (2, 4, 2)) if name == "kernel" else None)
        assert kinds[f"inner/{moment}/head/kernel"] == (jnp.float32, (4, 10))  # too short a block


def walked(optimizer):
    """How far 1,024 parameters from 1 to 2 came, in the mean, by STEPS steps of about 2**-13."""
    start = jnp.linspace(1, 2, 1024).astype(jnp.bfloat16)
    params = {"kernel": start}
    gradient = {"kernel": 2.0**-13 * jnp.linspace(0.5, 1.5, 1024)}  # so that all are rounded apart

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        return (apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, STEPS)
    assert params["kernel"].dtype == jnp.bfloat16
    return float(jnp.mean(start.astype(jnp.float32) - params["kernel"].astype(jnp.float32)))


@pytest.mark.parametrize("moments", MOMENTS)
def test_parameters_are_moved_by_steps_smaller_than_their_gaps(moments):
    sgd = optax.sgd(1.0)
    expected = STEPS * 2.0**-13
    rounding = rounded(sgd, moments=moments)
    assert walked(rounding) == pytest.approx(expected, rel=0.02)
    assert walked(sgd) == 0  # rounded to the nearest they stay


def test_an_update_leads_to_the_number_that_was_drawn():
    """Whatever the ratio of what was to what will be: through 0, and far below it."""
    params = jnp.asarray([1.0, -3.0, 2.0**-30, 0.0, 1e4], jnp.bfloat16)
    target = jnp.asarray([1e-6, 3.0, 1.0, -7e-9, 1e4 + 1], jnp.float32)
    optimizer = rounded(optax.sgd(1.0), moments="float32")
    gradient = params.astype(jnp.float32) - target
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    moved = params.astype(jnp.float32) - gradient
    drawn = round_to_bfloat16(moved, jnp.int32(1))
    np.testing.assert_array_equal(apply_updates(params, updates), drawn)


def small_configs():
    sizes = {"model.layers": 2, "model.width": 16, "model.heads": 2}
    decoder, vit, revnet = language_model(), vision_transformer(), image_classification()
    decoder.update_from_flattened_dict({**sizes, "model.kv_heads": 1, "data.context": 8})
    vit.update_from_flattened_dict({**sizes, "model.hidden": 16, "model.patch": 4})
    revnet.model.update({"units": (2, 1), "channels": (4, 4, 8)})
    return decoder, vit, revnet


@pytest.mark.thorough
@pytest.mark.parametrize("lockstep", [False, True])
def test_kernels_of_every_family_are_kept_and_trained_in_bfloat16(lockstep):
    for config in small_configs():
        config.batch_size = 4
        config.model.param_dtype = "bfloat16"
        config.schedule.warmup_steps = 0
        config.optimizer.update({"lockstep": lockstep, "clip": "layer", "clip_norm": 1.0})
        task, schedule, optimizer = build_recipe(config)
        state = init_state(task.network, optimizer, 0)
        kept = jax.tree_util.tree_leaves_with_path(state.variables.params)
        for path, leaf in kept:
            name = jax.tree_util.keystr(path[-1:], simple=True)
            narrow = name.endswith("kernel") or name == "embed"
            assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), name
        batch = {
            name: jnp.ones(shape.shape, shape.dtype) for name, shape in task.batch_shapes(4).items()
        }
        step = jax.jit(make_train_step(task, optimizer, schedule))
        new_state, metrics = step(state, batch)
        kinds = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        assert kinds(new_state) == kinds(state)
        assert metrics["exact_mismatches"] == 0
        moved = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)), state.variables.params, new_state.variables.params
        )
        assert any(jax.tree.leaves(moved))


def test_gradients_of_many_microbatches_are_added_up_in_float32():
    """512 of 1 and one of 512: in bfloat16 the sum would stop at 256."""
    params = jnp.ones((), jnp.bfloat16)
    gradient = lambda params, stats, batch, key: (
        (jnp.zeros(()), (stats, ())),
        (batch[0].astype(jnp.bfloat16), None),
    )
    _, (mean, _) = accumulate(gradient, params, (), jnp.ones(512), jax.random.key(0), 512)
    assert mean.dtype == jnp.float32
    assert mean == 1
    assert widened(params).dtype == jnp.float32


def test_unknown_param_dtype():
    config = language_model()
    config.model.param_dtype = "int8"
    with pytest.raises(ConfigError, match="got param_dtype='int8', expected one of float32, bf"):
        build_recipe(config)
