"""bfloat16 branches, 50 convolutional layers: bit-exact on the grid, and useless without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from revnet_jax.core import (
    Coupling,
    Exactness,
    Grid,
    Section,
    bdia_block,
    chain,
    leapfrog,
    reversible_block,
    sequence_inverse,
)
from revnet_jax.core.exactness import Tracked, compare_inputs
from revnet_jax.core.grid import snap
from tests.core import toy

DEPTH, CHANNELS, BATCH, SIZE = 50, 16, 8, 8


def convolve(x, kernel):
    """3x3, SAME, as nine shifted products: what a test can afford to compile and run on CPU."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def branch(params, x, context, dtype=jnp.bfloat16):
    """Batch normalisation, ReLU, convolution; computed in `dtype`."""
    x = x.astype(dtype)
    mean = jnp.mean(x, (0, 1, 2), dtype=jnp.float32, keepdims=True)
    centred = x.astype(jnp.float32) - mean
    variance = jnp.mean(centred**2, (0, 1, 2), keepdims=True)
    scale = params["scale"].reshape(1, 1, 1, -1)
    normal = (centred * jax.lax.rsqrt(variance + 1e-3) * scale).astype(dtype)
    return convolve(jax.nn.relu(normal), params["kernel"].astype(dtype)), mean


def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (DEPTH, 3, 3, CHANNELS, CHANNELS)
    fan_in = 9 * CHANNELS
    params_L = tuple(
        {
            "kernel": jax.random.normal(key, shape) * (2 / fan_in) ** 0.5,
            "scale": jnp.ones((DEPTH, CHANNELS)),
        }
        for key in keys[:2]
    )
    return params_L, tuple(jax.random.normal(k, (BATCH, SIZE, SIZE, CHANNELS)) for k in keys[2:])


@functools.cache
def gradient(backprop, grid, dtype=jnp.bfloat16, depth=DEPTH):
    f = functools.partial(branch, dtype=dtype)
    block = reversible_block(f, f, has_aux=True, grid=grid)

    def loss(params_L, x, probe):
        y, means_L = chain(block, params_L, x, backprop=backprop, probe=probe)
        outputs = jnp.mean(jnp.sin(y[0])) + jnp.mean(y[1] ** 2)
        return outputs + jnp.mean(means_L[0] ** 2)

    params_L, x = arguments()
    params_L = jax.tree.map(lambda leaf: leaf[:depth], params_L)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params_L, x, Exactness.probe())


def test_exact_on_the_grid():
    *grads, exactness = gradient("reverse", Grid())
    *true_grads, _ = gradient("store", Grid())
    assert exactness.mismatches == 0
    assert exactness.max_difference == 0
    assert toy.relative_error(grads, true_grads) < 1e-6


def test_the_inverse_is_bit_identical():
    params_L, x = arguments()
    block = reversible_block(branch, branch, has_aux=True)
    y, _ = jax.jit(lambda x: chain(block, params_L, x))(x)
    rebuilt = jax.jit(lambda y: sequence_inverse([Section(block, params_L)], y))(y)
    for got, expected in zip(rebuilt, block.grid.snap(x), strict=True):
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint32), np.asarray(expected).view(np.uint32)
        )


@pytest.mark.thorough
def test_float32_gradients_round_alike_under_all_strategies():
    """Summed in another order they would differ by about 3e-7, and training runs would part."""
    *true_grads, _ = gradient("store", Grid(), jnp.float32, 8)
    for backprop in ("remat", "reverse"):
        *grads, exactness = gradient(backprop, Grid(), jnp.float32, 8)
        assert exactness.mismatches == 0
        assert toy.relative_error(grads, true_grads) < 2e-8


def test_wrong_without_the_grid_and_the_check_says_so():
    *grads, exactness = gradient("reverse", None)
    *true_grads, _ = gradient("store", None)
    assert toy.relative_error(grads, true_grads) > 0.01
    assert exactness.mismatches > 0.9 * 2 * BATCH * SIZE * SIZE * CHANNELS
    assert exactness.max_difference > 0.01


# One probe for several rewinds: JAX adds up what it is told.
PARTS, ELEMENTS = 6, 4


def vmapped(run, x):
    return jnp.mean(jax.vmap(run)(x))


def scanned(run, x):
    return jnp.mean(jax.lax.map(run, x))


def several_chains(run, x):
    return sum(run(jax.tree.map(lambda leaf, i=i: leaf[i], x)) for i in range(PARTS))


def on_two_devices(run, x):
    mesh = Mesh(jax.devices()[:2], ("parts",))
    local = lambda x: jax.lax.pmean(vmapped(run, x), "parts")
    specs = {"in_specs": PartitionSpec("parts"), "out_specs": PartitionSpec()}
    return jax.shard_map(local, mesh=mesh, **specs)(x)


@pytest.mark.parametrize("together", [vmapped, scanned, several_chains, on_two_devices])
def test_a_probe_that_is_shared_finds_the_largest_value_and_not_their_sum(together):
    """A coupling that undoes too much; of values up to 16."""
    coupling = Coupling(lambda x, u, grid: (x + u, None), lambda y, u, _, grid: 1.25 * (y - u))
    zero = lambda params, x, context: x * params
    block = reversible_block(zero, zero, coupling=coupling)
    sizes = jnp.asarray([0.5, 1, 2, 4, 8, 16])
    x = (jnp.broadcast_to(sizes.reshape(PARTS, 1), (PARTS, ELEMENTS)),) * 2

    @toy.jit
    @jax.grad
    def check(probe):
        params_L = (jnp.zeros(1),) * 2
        return together(lambda x: jnp.sum(chain(block, params_L, x, probe=probe)[0][0]), x)

    found = check(Exactness.probe())
    assert found.mismatches == 2 * PARTS * ELEMENTS
    assert found.max_difference == 16 / 4
    assert found.max_abs == 16 + 16 / 4


def test_a_gradient_within_shard_map_checks_all_devices():
    """A probe that is the same on all of them is told of all."""
    zero = lambda params, x, context: x * params
    block, x = reversible_block(zero, zero), (jnp.asarray([1.0, 8.0]),) * 2

    def local(x, probe):
        loss = lambda probe: jnp.sum(chain(block, (jnp.zeros(2),) * 2, x, probe=probe)[0][0])
        return jax.grad(lambda probe: jax.lax.pmean(loss(probe), "parts"))(probe)

    mesh = Mesh(jax.devices()[:2], ("parts",))
    specs = {"in_specs": (PartitionSpec("parts"), PartitionSpec()), "out_specs": PartitionSpec()}
    found = toy.jit(jax.shard_map(local, mesh=mesh, **specs))(x, Exactness.probe())
    assert (found.mismatches, found.max_difference, found.max_abs) == (0, 0, 8)


@pytest.mark.parametrize("value", [0.0, 1e-20, 0.3, 1.0, 4095.99, 4096.0, 1e30, np.inf, np.nan])
def test_the_largest_value_is_cut_to_an_eighth(value):
    """So it is below a power of two if and only if the value is."""
    found = compare_inputs((jnp.float32(value),), (jnp.float32(0),), Tracked.nothing())
    for figure in (found.max_abs, found.max_difference):
        expected = float(figure)
        assert np.isnan(value) == np.isnan(expected)
        assert np.isnan(value) or value / 1.125 <= expected <= value
        assert (expected < 4096) == (value < 4096)


@pytest.mark.parametrize(("bits", "step"), [(12, 1e-4), (12, 1e-2), (20, 1e-4)])
@pytest.mark.parametrize("backprop", ["reverse", "store"])
def test_updates_that_round_to_nothing_are_counted(bits, step, backprop):
    """An ODE, x' = -x/2, whose steps are refined: in the end its state stands still."""
    decay = lambda params, x, context: params * x
    block = reversible_block(decay, decay, coupling=leapfrog(step), grid=Grid(bits))
    params_L, depth = (-jnp.ones(5) / 2,) * 2, 5
    x = tuple(jax.random.normal(jax.random.key(i), (3, 4, 6)) for i in range(2))

    def loss(params_L, probe):
        return jnp.sum(chain(block, params_L, x, backprop=backprop, probe=probe)[0][0])

    found = toy.jit(jax.grad(loss, argnums=1))(params_L, Exactness.probe())
    # Written out: of each example the first token.
    updates, lost, streams = 0, 0, list(snap(Grid(bits), x))
    for _ in range(depth):
        for i in (0, 1):
            update = snap(Grid(bits), 2 * step * -streams[1 - i] / 2)
            changes = (streams[1 - i] != 0)[:, 0]
            updates += int(jnp.sum(changes))
            lost += int(jnp.sum(changes & (update[:, 0] == 0)))
            streams[i] = streams[i] + update
    if backprop == "store":
        updates = lost = 0
    else:
        assert updates > 100
        assert (lost > 0.7 * updates) == (bits == 12 and step == 1e-4)
    assert (float(found.updates), float(found.lost_updates)) == (updates, lost)
    assert found.lost_share == pytest.approx(lost / max(updates, 1))


def _of_channels():
    """A coupling with a constant for each channel, which parts of streams do not fit."""
    weight = np.linspace(0.5, 1, 16, dtype=np.float32)[None]
    update = lambda u, grid: snap(grid, [weight * leaf for leaf in u])
    return Coupling(
        lambda x, u, grid: (jax.tree.map(jnp.add, x, update(u, grid)), None),
        lambda y, u, residue, grid: jax.tree.map(jnp.subtract, y, update(u, grid)),
    )


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (lambda f: reversible_block(f, f, coupling=_of_channels()), [(3, 16)]),
        (lambda f: reversible_block(f, f), [(3, 4), (3, 5)]),
        (lambda f: bdia_block(f, f, gamma=lambda _: jnp.full((2, 3, 1), 0.5)), [(3, 16)]),
        (lambda f: bdia_block(f, f, gamma=lambda _: (1.0, 1.0)), [(3, 16)]),
    ],
    ids=["by channel", "unlike arrays", "bdia", "bdia of numbers"],
)
def test_updates_of_every_coupling_are_counted(build, shapes):
    tiny = lambda params, x, context: jax.tree.map(lambda leaf: 0 * leaf + 1e-6 * params, x)
    x = tuple([jnp.zeros(shape) for shape in shapes] for _ in range(2))

    def loss(params_L, probe):
        y, _ = chain(build(tiny), params_L, x, probe=probe)
        return sum(map(jnp.sum, jax.tree.leaves(y)))

    found = jax.grad(loss, argnums=1)((jnp.ones(2),) * 2, Exactness.probe())
    # At most eight elements of each of three examples, in two layers of two half-steps.
    updates = 4 * 3 * sum(min(8, shape[-1]) for shape in shapes)
    assert (found.updates, found.lost_updates, found.mismatches) == (updates, updates, 0)


def test_without_a_grid_no_update_is_looked_at():
    block = reversible_block(*[lambda params, x, context: params * x] * 2, grid=None)
    loss = lambda probe: jnp.sum(chain(block, (jnp.ones(2),) * 2, (1.0, 1.0), probe=probe)[0][0])
    found = jax.grad(loss)(Exactness.probe())
    assert (found.updates, found.lost_share) == (0, 0)
