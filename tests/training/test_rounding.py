"""Moments and parameters in 16 bits: rounded up or down as often as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revnet_jax.config import ConfigError, image_classification, language_model, vision_transformer
from revnet_jax.training.build import build_recipe
from revnet_jax.training.rounding import (
    apply_updates,
    in_bfloat16,
    round_to_bfloat16,
    widened,
)
from revnet_jax.training.step import accumulate, init_state, make_train_step

STEPS = 4096


def roundings(x):
    """[steps, n], as float32."""
    round_all = jax.vmap(round_to_bfloat16, in_axes=(None, 0))
    return jax.jit(round_all)(x, jnp.arange(STEPS, dtype=jnp.int32)).astype(jnp.float32)


@pytest.mark.parametrize("scale", [1.0, -(2.0**-100), 2.0**68])
def test_numbers_become_one_of_their_neighbours_and_are_kept_in_the_mean(scale):
    x = scale * (1 + jnp.linspace(0, 2**-7, 17))  # from one bfloat16 to the next
    got = np.asarray(roundings(x))
    gap = abs(scale) * 2**-7
    assert set(np.unique(got)) == {scale, scale * (1 + 2**-7)}
    # A mean of STEPS tosses of a coin has a standard deviation of 0.5 / sqrt(STEPS) at most.
    error = np.abs(got.mean(axis=0, dtype=np.float64) - np.asarray(x)) / gap
    assert error.max() < 4 * 0.5 / np.sqrt(STEPS)


def test_what_bfloat16_has_is_not_touched():
    kept = jnp.asarray([0.0, -0.0, 1.0, -2.5, 2.0**-126, jnp.inf, -jnp.inf], jnp.float32)
    np.testing.assert_array_equal(roundings(kept), jnp.broadcast_to(kept, (STEPS, kept.size)))
    assert np.isnan(roundings(jnp.asarray([jnp.nan, -jnp.nan]))).all()


def test_neighbours_and_steps_are_rounded_independently():
    ups = np.asarray(roundings(1 + jnp.linspace(0.4, 0.6, 64) * 2**-7)) > 1
    of_pairs = np.corrcoef(ups.T) - np.eye(64)
    in_time = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in ups.T]
    assert np.abs(of_pairs).max() < 5 / np.sqrt(STEPS)
    assert np.abs(in_time).max() < 5 / np.sqrt(STEPS)


def averages_of_squares(optimizer, dtype):
    """Adam's `nu` over its limit, after STEPS steps with the same gradient each."""
    params = jnp.linspace(1, 1.3, 256)
    state = optimizer.init(params)

    def step(state, _):
        _, state = optimizer.update(params, state, params)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), state, start), None

    start = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.size > 1 else leaf, state)
    with jax.numpy_dtype_promotion("standard"):
        state, _ = jax.lax.scan(step, start, None, STEPS)
    found = optax.tree.get(state, "nu").astype(jnp.float32)
    return np.asarray(jnp.mean(found / params**2))


def test_slow_averages_move():
    adam = optax.scale_by_adam(b2=0.999)
    expected = 1 - 0.999**STEPS
    assert averages_of_squares(in_bfloat16(adam), jnp.bfloat16) == pytest.approx(expected, rel=0.01)
    assert averages_of_squares(adam, jnp.bfloat16) < 0.5  # rounded to the nearest they stop


def test_layers_are_rounded_alike_stacked_or_alone():
    optimizer = in_bfloat16(optax.adamw(1e-3))
    gradient = jax.random.normal(jax.random.key(0), (3, 8, 8))
    params = jnp.ones_like(gradient)
    run = lambda params, gradient: optimizer.update(gradient, optimizer.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        together = run(params, gradient)
        alone = [run(params[i], gradient[i]) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(a, b if a.ndim == b.ndim else b[0])


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


@pytest.mark.parametrize("moments", [True, False])
def test_parameters_are_moved_by_steps_smaller_than_their_gaps(moments):
    sgd = optax.sgd(1.0)
    expected = STEPS * 2.0**-13
    rounded = in_bfloat16(sgd, moments=moments)
    assert walked(rounded) == pytest.approx(expected, rel=0.02)
    assert walked(sgd) == 0  # rounded to the nearest they stay


def test_an_update_leads_to_the_number_that_was_drawn():
    """Whatever the ratio of what was to what will be: through 0, and far below it."""
    params = jnp.asarray([1.0, -3.0, 2.0**-30, 0.0, 1e4], jnp.bfloat16)
    target = jnp.asarray([1e-6, 3.0, 1.0, -7e-9, 1e4 + 1], jnp.float32)
    optimizer = in_bfloat16(optax.sgd(1.0), moments=False)
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
