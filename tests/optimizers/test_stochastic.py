"""Numbers in 16 and in 8 bits: rounded up or down as often as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.optimizers.stochastic import (
    FLOAT8,
    block_size,
    compress,
    compressed_zeros,
    expand,
    round_to_bfloat16,
    round_to_float8,
)
from tests import thorough

STEPS = 4096
STEP = jnp.int32(7)
SIGMA = 0.5 / np.sqrt(STEPS)  # of a mean of so many tosses of a coin, at most


def roundings(x, rounding=round_to_bfloat16):
    """[steps, n], as float32."""
    round_all = jax.vmap(rounding, in_axes=(None, 0))
    return jax.jit(round_all)(x, jnp.arange(STEPS, dtype=jnp.int32)).astype(jnp.float32)


@pytest.mark.parametrize("scale", [1.0, -(2.0**-100), 2.0**68])
def test_numbers_become_one_of_their_neighbours_and_are_kept_in_the_mean(scale):
    x = scale * (1 + jnp.linspace(0, 2**-7, 17))  # from one bfloat16 to the next
    got = np.asarray(roundings(x))
    gap = abs(scale) * 2**-7
    assert set(np.unique(got)) == {scale, scale * (1 + 2**-7)}
    error = np.abs(got.mean(axis=0, dtype=np.float64) - np.asarray(x)) / gap
    assert error.max() < 4 * SIGMA


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


def float8_numbers():
    """All finite ones, ascending, as float64; 0 once."""
    numbers = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


def between(numbers):
    """Eight numbers from each to the next: (they, their lower neighbours, their upper ones)."""
    x = np.linspace(numbers[:-1], numbers[1:], 8, endpoint=False)
    low, high = (np.broadcast_to(part, x.shape) for part in (numbers[:-1], numbers[1:]))
    return jnp.asarray(x.ravel(), jnp.float32), low.ravel(), high.ravel()


def test_float8_of_any_size_are_one_of_their_neighbours_and_kept_in_the_mean():
    """From -448 to 448, with all subnormal numbers."""
    x, low, high = between(float8_numbers())
    got = np.asarray(roundings(x, round_to_float8), np.float64)
    assert ((got == low) | (got == high)).all()
    error = np.abs(got.mean(axis=0) - np.asarray(x)) / (high - low)
    assert error.max() < 4 * SIGMA


def test_of_square_roots_the_mean_of_the_squares_is_kept_and_none_becomes_0():
    numbers = float8_numbers()
    x, low, high = between(numbers[numbers > 0])
    rounding = lambda x, step: round_to_float8(x, step, roots=True)
    got = np.asarray(roundings(x, rounding), np.float64)
    assert ((got == low) | (got == high)).all()
    error = np.abs((got**2).mean(axis=0) - np.asarray(x, np.float64) ** 2) / (high**2 - low**2)
    assert error.max() < 4 * SIGMA
    tiny = jnp.asarray([2.0**-10, 1e-30, 2.0**-126, 0.0], jnp.float32)
    expected = np.broadcast_to([2.0**-9] * 3 + [0.0], (STEPS, 4))
    np.testing.assert_array_equal(roundings(tiny, rounding), expected)


def test_what_float8_has_is_not_touched():
    every = np.arange(256, dtype=np.uint8).view(FLOAT8)
    kept = jax.jit(jax.vmap(round_to_float8, in_axes=(None, 0)))(
        jnp.asarray(every, jnp.float32), jnp.arange(16)
    )
    isnan = np.isnan(every.astype(np.float32))
    assert np.isnan(np.asarray(kept, np.float32)[:, isnan]).all()
    bits = lambda x: np.asarray(x)[..., ~isnan].view(np.uint8)
    np.testing.assert_array_equal(bits(kept), np.broadcast_to(bits(every), bits(kept).shape))
    infinite = round_to_float8(jnp.asarray([jnp.inf, -jnp.inf]), jnp.int32(0))
    assert np.isnan(infinite.astype(jnp.float32)).all()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((4096,), 128), ((3, 344), 86), ((2, 16), 16), ((5, 65), 65), ((131,), None), ((), None)],
)
def test_blocks_are_divisors_of_the_last_axis(shape, size):
    assert block_size(shape) == size
    if size:
        values, scales = compressed_zeros(shape)
        assert (values.shape, scales.shape) == (shape, (*shape[:-1], shape[-1] // size))
        assert not expand(values, scales).any()


def drawn(squares):
    """Blocks of very different sizes, one of them of zeros, with a wide range in each."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 256)) * np.exp2(rng.uniform(-8, 0, (16, 256)))
    x *= np.geomspace(1e-12, 1e12, 16)[:, None]
    x[3, :128] = 0
    return jnp.asarray(x**2 if squares else x, jnp.float32)


@pytest.mark.parametrize("squares", [False, True])
def test_blocks_are_kept_to_a_sixteenth_and_then_exactly(squares):
    x = drawn(squares)
    once = jax.jit(lambda x: expand(*compress(x, STEP, squares=squares), squares=squares))
    kept = np.asarray(once(x), np.float64)
    size = np.sqrt(np.abs(x)) if squares else np.abs(x)
    error = np.abs(np.sqrt(kept) - size) if squares else np.abs(kept - x)
    largest = size.reshape(16, 2, 128).max(axis=2).repeat(128, axis=1)
    assert np.all(error <= np.maximum(size / 8, largest * 2.0**-16))
    assert np.mean(error) > 0.01 * np.mean(size)  # they were rounded
    # Where the largest was rounded up to a power of two, the smallest have a gap twice as wide.
    normal = size > largest * 2.0**-12
    again = np.asarray(once(kept.astype(np.float32)))
    np.testing.assert_array_equal(again[normal], kept[normal])


@pytest.mark.parametrize("broken", [thorough(jnp.nan), jnp.inf])
def test_a_number_that_is_not_finite_is_seen_in_its_block_alone(broken):
    kept = expand(*compress(jnp.ones((2, 256)).at[0, 3].set(broken), STEP))
    assert np.isnan(kept[0, :128]).all()
    assert np.all(kept[0, 128:] == 1)
    assert np.all(kept[1] == 1)


def test_scales_are_found_by_blocks_of_one_layer():
    x = drawn(False)
    values, scales = compress(x, STEP)
    for i, row in enumerate(x):
        alone = compress(row, STEP)
        np.testing.assert_array_equal(alone[0], values[i])
        np.testing.assert_array_equal(alone[1], scales[i])
