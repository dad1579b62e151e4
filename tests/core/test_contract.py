"""The contract: every coupling and block x every law. A new one adds a row to `ROWS`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.core import (
    STRATEGIES,
    Context,
    Exactness,
    Grid,
    Invertible,
    Section,
    affine,
    bdia_block,
    chain,
    keeping_operands,
    leapfrog,
    meft_block,
    momentum_block,
    multi_stream_block,
    reversible_block,
    sequence_forward,
    sequence_inverse,
    symplectic_block,
)
from tests import by_default
from tests.core import toy

ROWS_OF_X, WIDTH = 4, 8
STEP, GAMMA, BOUND = 0.25, 0.875, 1.5  # gamma is a multiple of 2**-12


def branch(params, *args):
    """A dense layer on the sum of what it reads, with a shared input and dropout by key."""
    *streams, context = args
    hidden = jnp.tanh(sum(streams[1:], start=streams[0]) @ params["w"]) * context.shared
    keep = jax.random.bernoulli(context.data["key"], 0.8, hidden.shape)
    return hidden * keep.astype(hidden.dtype) @ params["v"]


def pair_branch(params, x, context):
    return branch(params["scale"], x, context), branch(params["shift"], x, context)


def energy(params, x, context):
    return jnp.sum(jnp.log(jnp.cosh(x @ params["w"] * context.shared)))


def rotate(params, x, context):
    """Not half-steps: streams change places, and one changes its sign."""
    return (x[1], -x[0] + Grid(4).snap(branch(params, x[1], context)))


def unrotate(params, y, context):
    return (Grid(4).snap(branch(params, y[0], context)) - y[1], y[0])


class Row(NamedTuple):
    """make: the block on a grid; naive: the same layer written out, without one.

    params: for each half-step, the names of its matrices.
    """

    make: Callable[[Grid | None], Any]
    naive: Callable[[Any, Any, Context], Any]
    params: Any = ({"w": 0, "v": 0}, {"w": 0, "v": 0})
    num_streams: int = 2
    bits: int = 0


def naive_additive(params, x, context, c=1.0, d=1.0):
    x1 = x[0] + c * branch(params[0], x[1], context)
    return x1, x[1] + d * branch(params[1], x1, context)


def naive_affine(params, x, context):
    def update(params, x, read):
        raw, shift = pair_branch(params, read, context)
        return x * jnp.float64(BOUND) ** jnp.tanh(raw) + shift

    x1 = update(params[0], x[0], x[1])
    return x1, update(params[1], x[1], x1)


def naive_momentum(params, x, context):
    v = GAMMA * x[1] + (1 - GAMMA) * branch(params[0], x[0], context)
    return x[0] + v, v


def naive_bdia(params, x, context):
    def step(params, before, now, gamma):
        h = branch(params, now, context)
        return gamma * before + (1 - gamma) * now + (1 + gamma) * h

    x1 = step(params[0], x[0], x[1], context.data["gamma"][0])
    return x1, step(params[1], x[1], x1, context.data["gamma"][1])


def naive_meft(params, x, context):
    y1 = 0.1 * x[0] + branch(params[0], x[1], context)
    return 0.75 * x[1] + branch(params[1], y1, context), y1


def arranged_block(grid):
    """Three streams that are returned in an order which is not its own inverse."""
    block = multi_stream_block((branch,) * 3, reads="next", grid=grid)
    return dataclasses.replace(block, order=(1, 2, 0))


def naive_arranged(params, x, context):
    x1, x2, x3 = naive_next(params, x, context)
    return x2, x3, x1


def naive_symplectic(params, x, context):
    def gradient(params, x):  # of the energy, by hand
        return jnp.tanh(x @ params["w"] * context.shared) * context.shared @ params["w"].T

    q = x[0] + STEP * gradient(params[0], x[1])
    return q, x[1] - STEP * gradient(params[1], q)


def naive_others(params, x, context):
    x1 = x[0] + branch(params[0], x[1], x[2], context)
    x2 = x[1] + branch(params[1], x1, x[2], context)
    return x1, x2, x[2] + branch(params[2], x1, x2, context)


def naive_next(params, x, context):
    x1 = x[0] + branch(params[0], x[1], context)
    x2 = x[1] + branch(params[1], x[2], context)
    return x1, x2, x[2] + branch(params[2], x1, context)


DENSE = {"w": 0, "v": 0}
PAIR = {"scale": DENSE, "shift": DENSE}
ROWS = {
    "additive": Row(lambda grid: reversible_block(branch, branch, grid=grid), naive_additive),
    "leapfrog": Row(
        lambda grid: reversible_block(branch, branch, coupling=leapfrog(STEP), grid=grid),
        lambda params, x, context: naive_additive(params, x, context, 2 * STEP, 2 * STEP),
    ),
    "affine": Row(
        lambda grid: reversible_block(pair_branch, pair_branch, coupling=affine(BOUND), grid=grid),
        naive_affine,
        params=(PAIR, PAIR),
        bits=2,
    ),
    "momentum": Row(
        lambda grid: momentum_block(branch, gamma=GAMMA, grid=grid),
        naive_momentum,
        params=(DENSE, ()),
        bits=1,
    ),
    "bdia": Row(lambda grid: bdia_block(branch, branch, grid=grid), naive_bdia, bits=2),
    "bdia of 4 bits": Row(
        lambda grid: bdia_block(branch, branch, bits=4, grid=grid), naive_bdia, bits=8
    ),
    "meft": Row(
        lambda grid: meft_block(branch, branch, scales=(0.1, 0.75), grid=grid), naive_meft, bits=5
    ),
    "symplectic": Row(
        lambda grid: symplectic_block(energy, energy, step=STEP, grid=grid),
        naive_symplectic,
        params=({"w": 0}, {"w": 0}),
    ),
    "invertible": Row(lambda grid: Invertible(rotate, unrotate), rotate, params=DENSE),
    "three streams": Row(
        lambda grid: multi_stream_block((branch,) * 3, grid=grid),
        naive_others,
        params=(DENSE,) * 3,
        num_streams=3,
    ),
    "round-robin": Row(
        lambda grid: multi_stream_block((branch,) * 3, reads="next", grid=grid),
        naive_next,
        params=(DENSE,) * 3,
        num_streams=3,
    ),
    "another order": Row(arranged_block, naive_arranged, params=(DENSE,) * 3, num_streams=3),
}
every_row = pytest.mark.parametrize("name", ROWS)
# The default run takes one coupling of each kind; the thorough run takes all.
most_rows = pytest.mark.parametrize(
    "name", by_default(ROWS, "additive", "affine", "bdia", "meft", "symplectic", "another order")
)
some_rows = pytest.mark.parametrize("name", by_default(ROWS, "additive", "affine"))
one_row = pytest.mark.parametrize("name", by_default(ROWS, "additive"))


def arguments(row, depth, dtype=jnp.float32, *, typed_keys=True):
    """(params_L, x, shared, data_L)."""
    rng = np.random.default_rng(depth)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params_L = jax.tree.map(lambda _: normal(depth, WIDTH, WIDTH) / 4, row.params)
    x = tuple(Grid().snap(normal(ROWS_OF_X, WIDTH)) for _ in range(row.num_streams))
    keys = (jax.random.key if typed_keys else jax.random.PRNGKey)(7)
    gamma = rng.choice([-0.5, 0.5], size=(depth, 2, ROWS_OF_X, 1))
    data_L = {"key": jax.random.split(keys, depth), "gamma": jnp.asarray(gamma, dtype)}
    return params_L, x, 1 + normal(ROWS_OF_X, WIDTH) / 4, data_L


def chain_loss(params_L, x, shared, data_L, block, backprop, probe=None, **options):
    options |= {"shared": shared, "data_L": data_L, "backprop": backprop, "probe": probe}
    return loss(chain(block, params_L, x, **options)[0])


def naive_loss(row, depth, params_L, x, shared, data_L):
    """Without scan, grid or custom gradient."""
    for i in range(depth):
        params, data = jax.tree.map(lambda leaf, i=i: leaf[i], (params_L, data_L))
        x = row.naive(params, x, Context(shared, data))
    return loss(x)


def loss(y):
    return sum(jnp.mean(jnp.sin(stream * (i + 1))) for i, stream in enumerate(y))


def mixtures(depth):
    """Every strategy, and mixtures with the last layers stored: (backprop, stored_layers)."""
    mixed = [("reverse", m) for m in {1, depth // 2, depth} - {0}]
    return [(name, 0) for name in STRATEGIES[1:]] + mixed + [("remat", 1)]


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [1, 2, 7])
@every_row
def test_gradient_equals_store(name, depth):
    """Values and gradients of params, streams and shared inputs, in float64 to 1e-10."""
    row = ROWS[name]
    with jax.enable_x64(True):
        args = arguments(row, depth, jnp.float64, typed_keys=depth != 2)
        block = row.make(Grid())

        def all_gradients(params_L, x, shared, data_L):
            grad = jax.value_and_grad(chain_loss, argnums=(0, 1, 2))
            return {
                (backprop, m): grad(params_L, x, shared, data_L, block, backprop, stored_layers=m)
                for backprop, m in [("store", 0), *mixtures(depth)]
            }

        all_gradients = toy.jit(all_gradients)
        results = all_gradients(*args)
        all_gradients(*args)
        assert all_gradients._cache_size() == 1  # the second call did not compile again
        true_value, true_grads = results["store", 0]
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(true_grads))
        for mixture in mixtures(depth):
            value, grads = results[mixture]
            assert value == true_value
            assert jax.tree.structure(grads) == jax.tree.structure(true_grads)
            for got, expected in zip(grads, true_grads, strict=True):
                assert toy.relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("name", by_default([n for n in ROWS if n != "invertible"], "additive"))
def test_operands_that_are_kept_change_no_gradient(name):
    """But for its rounding: that of all strategies, as without; and streams are as exact."""
    row, depth = ROWS[name], 3
    with jax.enable_x64(True):
        args = arguments(row, depth, jnp.float64)
        block = row.make(Grid())

        def gradients(params_L, x, shared, data_L):
            grad = jax.grad(chain_loss, argnums=(0, 1, 2, 6))
            run = lambda block, backprop, m: grad(
                *(params_L, x, shared, data_L, block, backprop, Exactness.probe()), stored_layers=m
            )
            kept = [run(keeping_operands(block), *mix) for mix in [("store", 0), *mixtures(depth)]]
            return run(block, "reverse", 0), kept

        expected, found = toy.jit(gradients)(*args)
        for *grads, exactness in found:
            assert exactness.mismatches == 0
            for got, true in zip(grads, expected[:3], strict=True):
                assert toy.relative_error(got, true) < 1e-10


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [1, 3, 5])
@every_row
def test_update_in_the_sweep_equals_an_update_after_it(name, depth):
    """New parameters and moments; gradients of all else, in float64 to 1e-10."""
    row = ROWS[name]
    with jax.enable_x64(True):
        params_L, x, shared, data_L = arguments(row, depth, jnp.float64)
        moments_L = jax.tree.map(jnp.ones_like, params_L)
        block = row.make(Grid())

        def update(dparams, moments, params):
            moments = jax.tree.map(lambda m, d: 0.9 * m + d, moments, dparams)
            return jax.tree.map(lambda p, m: p - 0.1 * m, params, moments), moments

        def step(params_L, moments_L, x, shared):
            grad = jax.grad(chain_loss, argnums=(0, 1, 2))
            dparams_L, *rest = grad(params_L, x, shared, data_L, block, "store")
            after = (*update(dparams_L, moments_L, params_L), *rest)

            def lockstep(params_L, moments_L, x, shared, backprop, m):
                options = {"stored_layers": m, "update": update, "state_L": moments_L}
                return chain_loss(params_L, x, shared, data_L, block, backprop, **options)

            grad = jax.grad(lockstep, argnums=(0, 1, 2, 3))
            settings = [("store", 0), *mixtures(depth)]
            return after, [grad(params_L, moments_L, x, shared, *pair) for pair in settings]

        after, within = toy.jit(step)(params_L, moments_L, x, shared)
        for got in within:
            assert jax.tree.structure(got) == jax.tree.structure(after)
            for a, b in zip(got, after, strict=True):
                assert toy.relative_error(a, b) < 1e-10


@every_row
def test_gradient_equals_the_naive_program(name):
    """Written out, without scan, grid or custom gradient; batches summed inside or outside."""
    row, depth = ROWS[name], 3
    with jax.enable_x64(True):
        args = arguments(row, depth, jnp.float64)

        def both(*args):
            grad = jax.value_and_grad(chain_loss, argnums=(0, 1, 2))
            naive = jax.value_and_grad(functools.partial(naive_loss, row, depth), (0, 1, 2))
            return naive(*args), grad(*args, row.make(None), "reverse")

        (true_value, true_grads), (value, grads) = toy.jit(both)(*args)
        np.testing.assert_allclose(value, true_value, rtol=1e-12)
        assert toy.relative_error(grads, true_grads) < 1e-10


@pytest.mark.thorough
@every_row
def test_products_with_the_hessian_are_those_of_the_naive_program(name):
    """Forward over reverse, for parameters, streams and shared inputs."""
    row, depth = ROWS[name], 3
    with jax.enable_x64(True):
        *args, data_L = arguments(row, depth, jnp.float64)

        def product(loss):
            gradient = jax.grad(lambda *args: loss(*args, data_L), argnums=(0, 1, 2))
            return jax.jvp(gradient, tuple(args), tuple(jax.tree.map(jnp.cos, args)))[1]

        free = lambda *args: chain_loss(*args, row.make(None), "reverse")
        naive = functools.partial(naive_loss, row, depth)
        got, true_product = toy.jit(lambda: (product(free), product(naive)))()
        for one, true_one in zip(got, true_product, strict=True):
            assert toy.relative_error(one, true_one) < 1e-10


@pytest.mark.thorough
@pytest.mark.parametrize(("backprop", "depth"), [("reverse", 1), ("reverse", 3), ("store", 3)])
@every_row
def test_on_a_mesh_whose_axes_are_types(name, backprop, depth):
    """Explicit ones: streams are split by examples, parameters and shared inputs are not."""
    row = ROWS[name]
    params_L, x, shared, data_L = arguments(row, depth)
    gradient = toy.jit(
        jax.grad(lambda *args: chain_loss(*args, row.make(Grid()), backprop), argnums=(0, 1, 2))
    )
    expected = gradient(params_L, x, shared, data_L)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        got = gradient(params_L, split, shared, data_L)
    assert toy.relative_error(jax.device_get(got), expected) < 1e-5


@one_row
def test_vmap_and_a_gradient_of_a_sum_over_a_batch(name):
    row = ROWS[name]
    with jax.enable_x64(True):
        params_L, x, shared, data_L = arguments(row, 2, jnp.float64)
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2, leaf - 1]), x)
        block = row.make(Grid())

        def gradients(params_L, batch):
            one = lambda params_L, x: chain_loss(params_L, x, shared, data_L, block, "reverse")
            total = lambda params_L: jnp.sum(jax.vmap(one, (None, 0))(params_L, batch))
            each = jax.vmap(jax.grad(one), (None, 0))(params_L, batch)
            single = jax.grad(one)(params_L, jax.tree.map(lambda leaf: leaf[1], batch))
            return jax.grad(total)(params_L), each, single

        summed, each, single = toy.jit(gradients)(params_L, batch)
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each)
        assert toy.relative_error(summed, total) < 1e-10
        assert toy.relative_error(jax.tree.map(lambda leaf: leaf[1], each), single) < 1e-10


@pytest.mark.parametrize("depth", [1, 4])
@most_rows
def test_inverse_of_forward_and_forward_of_inverse(name, depth):
    """Bit for bit, shapes and dtypes kept."""
    row = ROWS[name]
    params_L, x, shared, data_L = arguments(row, depth)
    sections = [Section(row.make(Grid()), params_L, data_L)]

    @toy.jit
    def round_trips(x):
        y, _, residues = sequence_forward(sections, x, shared=shared)
        rebuilt_x = sequence_inverse(sections, y, residues, shared=shared)
        if row.bits:  # any residue at all makes some x; its own makes this one
            return rebuilt_x, y, sequence_forward(sections, rebuilt_x, shared=shared)[0], y
        before = sequence_inverse(sections, x, shared=shared)
        return rebuilt_x, y, sequence_forward(sections, before, shared=shared)[0], x

    rebuilt_x, y, rebuilt_y, true_y = round_trips(x)
    assert jax.tree.map(jnp.shape, y) == jax.tree.map(jnp.shape, x)
    for got, expected in zip((*rebuilt_x, *rebuilt_y), (*x, *true_y), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint32), np.asarray(expected).view(np.uint32)
        )


@one_row
def test_exact_with_bfloat16_branches_at_depth_128(name):
    row = ROWS[name]
    params_L, x, shared, data_L = arguments(row, 128)
    params_L = jax.tree.map(lambda leaf: leaf / 4, params_L)

    def in_bfloat16(f):
        def run(params, *args):
            *streams, context = args
            cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
            return f(cast(params), *cast(streams), context._replace(shared=cast(context.shared)))

        return run

    block = row.make(Grid())
    if name == "invertible":
        wrap = lambda f: (
            lambda params, x, context: f(
                jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params),
                x,
                context,
            )
        )
        block = Invertible(wrap(block.apply), wrap(block.undo))
    else:
        steps = []
        for step in block.half_steps:
            steps.append(dataclasses.replace(step, branch=in_bfloat16(step.branch)))
        block = dataclasses.replace(block, half_steps=tuple(steps))
    grad = jax.grad(chain_loss, argnums=(0, 6))
    reverse, store = (
        toy.jit(lambda *args, b=b: grad(*args, block, b, Exactness.probe()))(
            params_L, x, shared, data_L
        )
        for b in ("reverse", "store")
    )
    assert reverse[1].mismatches == 0
    assert reverse[1].max_difference == 0
    assert 0 < reverse[1].max_abs < Grid().limit(jnp.float32)
    assert toy.relative_error(reverse[0], store[0]) < 1e-6


@some_rows
def test_memory_is_flat_in_depth_but_for_the_residue(name):
    row = ROWS[name]

    def temporary_bytes(depth):
        args = jax.eval_shape(lambda: arguments(row, depth))
        grad = jax.grad(lambda *args: chain_loss(*args, row.make(Grid()), "reverse"))
        return toy.jit(grad).lower(*args).compile().memory_analysis().temp_size_in_bytes

    shallow, deep = temporary_bytes(16), temporary_bytes(80)  # residues aligned to 64 bytes
    residue = row.bits * ROWS_OF_X * WIDTH / 8 * (80 - 16)
    assert deep - shallow == pytest.approx(residue, abs=0.01 * shallow)
