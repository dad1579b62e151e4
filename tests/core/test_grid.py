import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import Grid, scale_on_grid, scaled

GRID = Grid()


def bits(x):
    return np.asarray(x).view(np.uint32)


def test_adding_and_subtracting_on_the_grid_is_exact_up_to_the_limit():
    limit = GRID.limit(jnp.float32)
    assert limit == 4096.0
    x = GRID.snap(jax.random.uniform(jax.random.key(0), (100_000,), minval=-limit, maxval=limit))
    u = GRID.snap(jax.random.normal(jax.random.key(1), (100_000,)) * 100)
    inside = np.abs(np.asarray(x, np.float64) + np.asarray(u, np.float64)) < limit
    assert inside.sum() > 90_000
    np.testing.assert_array_equal(bits((x + u) - u)[inside], bits(x)[inside])


def test_beyond_the_limit_it_degrades_to_ordinary_rounding():
    x = jnp.asarray([5000.3, 1e7, 1e20], jnp.float32)
    np.testing.assert_allclose(GRID.snap(x), x, rtol=1e-7)
    u = jnp.float32(1.0 / 3)
    np.testing.assert_allclose((x + u) - u, x, rtol=1e-6)


def test_free_floats_are_not_exact():
    x = jax.random.normal(jax.random.key(0), (1000,))
    u = jax.random.normal(jax.random.key(1), (1000,))
    assert np.any((x + u) - u != x)


def test_snap_rounds_to_the_nearest_multiple():
    x = jax.random.normal(jax.random.key(0), (1000,))
    snapped = np.asarray(GRID.snap(x), np.float64)
    np.testing.assert_array_equal(snapped * 2**12, np.round(snapped * 2**12))
    assert np.max(np.abs(snapped - np.asarray(x, np.float64))) <= 2.0**-13


def test_no_negative_zero():
    """(-0.0 + u) - u is +0.0, so a -0.0 could not be reconstructed bit for bit."""
    snapped = jax.jit(GRID.snap)(jnp.asarray([-0.0, -1e-9, 1e-9], jnp.float32))
    np.testing.assert_array_equal(bits(snapped), 0)


def test_gradient_is_straight_through_in_both_modes():
    x = jnp.asarray([0.1, -2.3], jnp.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(3.0 * GRID.snap(x)))(x), [3.0, 3.0])
    _, tangent = jax.jvp(GRID.snap, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(tangent, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_streams_are_refused(dtype):
    with pytest.raises(TypeError, match=r"got a .*16 stream, expected float32.*grid=None"):
        GRID.check((jnp.ones(3, dtype),))


@pytest.mark.parametrize("scale", [0.1, 1e-4, 0.9999, 1.0, 2**-24])
def test_the_scale_on_a_grid_is_near_the_one_asked_for(scale):
    """To the stated relative error; it is what a stream is multiplied by."""
    grid, x = Grid(), jnp.full(3, 2048.0)
    got = scale_on_grid(scale, grid)
    assert abs(got / scale - 1) <= 1.01 * 2**-12 * np.ceil(-np.log2(scale))
    y, _ = scaled(scale).merge(x, jnp.zeros(3), grid)
    np.testing.assert_allclose(y, got * x, rtol=0, atol=2 * 2.0**-grid.bits)
    assert scale_on_grid(scale, None) == scale
