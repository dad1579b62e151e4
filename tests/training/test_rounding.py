"""Moments in 16 bits: rounded up or down as often as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revnet_jax.training.rounding import in_bfloat16, round_to_bfloat16

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
