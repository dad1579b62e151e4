"""A branch is one program wherever it is evaluated: what follows, and what it must not cost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from revnet_jax.core import (
    Coupling,
    Exactness,
    Grid,
    affine,
    chain,
    multi_stream_block,
    reversible_block,
    snap,
)
from revnet_jax.core.isolate import call_witnessed, isolate
from tests import thorough
from tests.core import toy

WIDTH, ROWS = 8, 4
# Layers and what else a chain is told: runs of one layer, alone or in a mixture, and of several.
RUNS = [(4, {}), (1, {}), (4, {"stored_layers": 1}), (4, {"stored_layers": 3})]
RUNS += [(1, {"backprop": "store"}), (1, {"backprop": "remat"})]


def branch(params, x, context):
    return jnp.tanh(x @ params)


BLOCK = reversible_block(branch, branch)
IDENTITY = jax.make_jaxpr(lambda x: x)(jnp.ones((2, 2)))


def params_L(layers):
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, (layers, WIDTH, WIDTH)) / 3 for key in keys)


def loss(params_L, x, **settings):
    y, _ = chain(BLOCK, params_L, x, **settings)
    return jnp.mean(y[0] ** 2) + jnp.mean(y[1])


@pytest.mark.parametrize(("layers", "settings"), RUNS)
def test_examples_stay_independent(layers, settings):
    """One that is not a number, and masked out of the loss, spoils no other's gradient."""
    x = (jnp.ones((ROWS, WIDTH)).at[0].set(jnp.nan), jnp.ones((ROWS, WIDTH)))
    is_valid = jnp.arange(ROWS) > 0

    @toy.jit
    @jax.grad
    def gradient(x):
        y, _ = chain(BLOCK, params_L(layers), x, **settings)
        return jnp.sum(jnp.where(is_valid, jnp.sum(y[1], axis=1), 0.0))

    for dx in gradient(x):
        np.testing.assert_array_equal(np.isfinite(dx).all(axis=1), is_valid)


@pytest.mark.parametrize(("layers", "settings"), [*RUNS[:2], *(thorough(*run) for run in RUNS[2:])])
def test_on_meshes_whose_axes_are_types(layers, settings):
    """Explicit ones, as `jax.make_mesh` makes them, and those of `shard_map`."""
    x, params = (jnp.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH),) * 2, params_L(layers)
    gradient = jax.grad(lambda params, x: loss(params, x, **settings))
    true_gradient = toy.jit(gradient)(params, x)

    explicit = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        split = jax.device_put(x, NamedSharding(explicit, PartitionSpec("data")))
        got = toy.jit(gradient)(params, split)
    assert toy.relative_error(got, true_gradient) < 1e-5

    def local(params, x):
        mean = lambda params: jax.lax.pmean(loss(params, x, **settings), "data")
        return jax.grad(mean)(params)

    specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
    manual = Mesh(jax.devices()[:2], ("data",))
    got = toy.jit(jax.shard_map(local, mesh=manual, **specs))(params, x)
    assert toy.relative_error(got, true_gradient) < 1e-5


EXPLICIT = {"axis_types": (jax.sharding.AxisType.Explicit,)}


def test_a_cotangent_is_split_as_its_argument():
    """On a mesh of Explicit axes, where JAX splits that of a factor of an array that is split."""
    mesh = jax.make_mesh((2,), ("data",), **EXPLICIT)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((ROWS, WIDTH)), NamedSharding(mesh, PartitionSpec("data")))

        @jax.jit
        def of_factor(x, factor):
            product, pullback = jax.vjp(lambda f: isolate(lambda x, f: x * f, x, f), factor)
            return pullback(product)[0]

        found = of_factor(x, jnp.full((ROWS, WIDTH), 2.0))
    assert found.sharding.spec in (PartitionSpec(), PartitionSpec(None, None))
    np.testing.assert_array_equal(found, 2)


@pytest.mark.parametrize("split", [(None, "data"), (None, None, "data")])
def test_streams_that_are_split_along_other_axes(split):
    """With a residue, whose bits are packed by rows; and a few elements are counted of each."""
    pair = lambda params, x, context: (jnp.tanh(x * params), x * params)
    block = reversible_block(pair, pair, coupling=affine())

    @toy.jit
    @jax.grad
    def gradient(params, x):
        y, _ = chain(block, params, x)
        return jnp.mean(y[0] ** 2) + jnp.mean(y[1])

    params = (jnp.linspace(0.5, 1.5, 3), jnp.linspace(-1, 1, 3))
    x = (jnp.linspace(-1, 1, 2 * 4 * WIDTH).reshape(2, 4, WIDTH),) * 2
    expected = gradient(params, x)
    mesh = jax.make_mesh((2,), ("data",), **EXPLICIT)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*split)))
        found = gradient(params, x)
    assert toy.relative_error(found, expected) < 1e-5


def test_an_update_of_parameters_from_before_the_mesh():
    """Their types have no mesh, and the updated ones that of the gradient."""
    x = (jnp.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH),) * 2

    @toy.jit
    @jax.grad
    def updated(params, x):
        update = lambda dparams, state, params: (jax.tree.map(_descend, params, dparams), state)
        return loss(params, x, update=update, state_L=())

    params = params_L(2)
    expected = updated(params, x)
    mesh = jax.make_mesh((2,), ("data",), **EXPLICIT)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = updated(params, split)
    assert toy.relative_error(found, expected) < 1e-5


def _descend(param, dparam):
    return param - 0.1 * dparam


@pytest.mark.parametrize("depth", [1, 3])
def test_data_that_differ_between_devices_where_parameters_do_not(depth):
    """In a `shard_map`, as the local part of a batch does from shared weights."""
    scaled = lambda params, x, context: branch(params, x, context) * context.data
    block = reversible_block(scaled, scaled)
    x = (jnp.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH),) * 2
    data = jnp.linspace(0.5, 1.5, depth * ROWS).reshape(depth, ROWS, 1)

    def gradient(params, x, data, mean=lambda value: value):
        def total(params):
            y, _ = chain(block, params, x, data_L=data)
            return mean(jnp.mean(y[0] ** 2))

        return jax.grad(total)(params)

    expected = toy.jit(gradient)(params_L(depth), x, data)
    mesh = Mesh(jax.devices()[:2], ("data",))
    by_rows, by_rows_L = PartitionSpec("data"), PartitionSpec(None, "data")
    local = lambda *args: gradient(*args, mean=lambda value: jax.lax.pmean(value, "data"))
    specs = {"in_specs": (PartitionSpec(), by_rows, by_rows_L), "out_specs": PartitionSpec()}
    found = toy.jit(jax.shard_map(local, mesh=mesh, **specs))(params_L(depth), x, data)
    assert toy.relative_error(found, expected) < 1e-5


def test_gradients_of_shared_inputs_are_added_in_one_order():
    """Two branches in each of three layers read them; all strategies give the same bits."""
    scaled = lambda params, x, context: jnp.tanh(x @ params) * context.shared
    x = (jnp.linspace(-1, 1, ROWS * WIDTH).reshape(ROWS, WIDTH),) * 2

    def gradient(**settings):
        def loss(shared):
            block = reversible_block(scaled, scaled)
            y, _ = chain(block, params_L(3), x, shared=shared, **settings)
            return jnp.mean(y[0] ** 2) + jnp.mean(y[1])

        return toy.jit(jax.grad(loss))(jnp.full((1, WIDTH), 1.3))

    expected = gradient(backprop="store")
    for settings in ({"backprop": "remat"}, {"backprop": "reverse"}, {"stored_layers": 1}):
        np.testing.assert_array_equal(gradient(**settings), expected)


@pytest.mark.thorough
def test_step_by_step():
    """`jax.disable_jit` is how one looks for a fault in a branch."""
    x = (jnp.ones((ROWS, WIDTH)),) * 2
    gradient = jax.grad(loss)
    with jax.disable_jit():
        found = gradient(params_L(2), x)
    jax.tree.map(np.testing.assert_array_equal, found, gradient(params_L(2), x))


@pytest.mark.parametrize("backprop", ["store", "remat", "reverse"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: toy.jit(jax.grad(f)),
        lambda f: jax.grad(toy.jit(f)),
        thorough(lambda f: toy.jit(jax.grad(jax.checkpoint(f)))),
        thorough(lambda f: toy.jit(lambda *args: vmapped(jax.grad(f), *of_two(*args)))),
        thorough(lambda f: jax.grad(lambda *args: jnp.sum(scanned(f, *of_two(*args))))),
    ],
    ids=["jit_of_grad", "grad_of_jit", "checkpoint", "vmap", "scan"],
)
def test_a_branch_that_closes_over_traced_values_of_any_kind(transform, backprop):
    def masked_loss(params, mask, key):
        masked = lambda params, x, context: branch(params, x, context) * mask.astype(x.dtype)
        dropped = lambda *args: jnp.where(jax.random.bernoulli(key), branch(*args), 0.0)
        x = (jnp.ones((ROWS, WIDTH)),) * 2
        y, _ = chain(reversible_block(masked, dropped), params, x, backprop=backprop)
        return jnp.mean(y[0])

    with pytest.raises(ValueError, match=r"closes over traced values \(int32.*key.*`data_L`"):
        transform(masked_loss)(params_L(3), jnp.ones((ROWS, 1), jnp.int32), jax.random.key(0))


def of_two(params, mask, key):
    return params, mask, jax.random.split(key)


def vmapped(f, params, mask, keys):
    return jax.vmap(f, (None, None, 0))(params, mask, keys)


def scanned(f, params, mask, keys):
    return jax.lax.map(lambda key: f(params, mask * 1, key), keys)


def test_intermediates_that_differ_are_a_mismatch():
    """What a branch returns besides its update tells the rewind nothing; the check sees it."""
    calls = itertools.count()

    def counted(params, x, context):
        shape = jax.ShapeDtypeStruct((), jnp.int32)
        return branch(params, x, context), jax.pure_callback(lambda: np.int32(next(calls)), shape)

    plain = lambda *args: (branch(*args), jnp.int32(0))

    def exactness(f):
        def probed(probe):
            x = (jnp.ones((ROWS, WIDTH)),) * 2
            block = reversible_block(f, plain, has_aux=True)
            y, _ = chain(block, params_L(3), x, probe=probe)
            return jnp.mean(y[0])

        return toy.jit(jax.grad(probed))(Exactness.probe())

    assert exactness(plain).mismatches == 0
    found = exactness(counted)
    assert found.mismatches == 1
    assert found.max_difference == 0  # the input is rebuilt all the same


def test_differences_do_not_cancel_in_a_checksum():
    """A sign that is flipped twice, or what one element gains and another loses."""
    checksum = lambda *rows: int(call_witnessed(IDENTITY, [jnp.array(rows, jnp.float32)])[1])
    assert checksum([1, 2], [3, 4]) != checksum([-1, 2], [-3, 4])
    assert checksum([1, 2], [3, 4]) != checksum([1.5, 2], [2.5, 4])
    assert checksum([1, 2], [3, 4]) == checksum([3, 4], [1, 2])  # in whatever order


def test_a_checksum_has_all_bits_of_wide_numbers():
    identity = lambda x: jax.make_jaxpr(lambda x: x)(x)
    checksum = lambda x: int(call_witnessed(identity(x), [x])[1])
    of_complex = lambda z: checksum(jnp.asarray(z, jnp.complex64))
    assert len({of_complex(z) for z in (1 + 2j, -1 - 2j, 1 - 2j, 2 + 1j, 1.5 + 2j)}) == 5
    with jax.enable_x64(True):
        assert checksum(jnp.int64(1)) != checksum(jnp.int64(1 + 2**40))


def test_a_branch_may_compute_complex_numbers():
    """A Fourier transform along the features: its intermediates are in the checksum too."""

    def filtered(params, x, context):
        return jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(params[:1]), n=WIDTH)

    x = (jax.random.normal(jax.random.key(1), (ROWS, WIDTH)),) * 2
    block = reversible_block(filtered, branch)

    def value(params, probe, backprop):
        y, _ = chain(block, params, x, probe=probe, backprop=backprop)
        return jnp.mean(y[0] ** 2) + jnp.mean(y[1])

    gradient = toy.jit(jax.grad(value, (0, 1)), static_argnums=2)
    got, found = gradient(params_L(3), Exactness.probe(), "reverse")
    assert found.mismatches == 0
    expected, _ = gradient(params_L(3), Exactness.probe(), "store")
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_program_that_nobody_reads_in_full_is_computed_in_full():
    """On CPU as a function of its own, with every intermediate among its results."""
    run = toy.jit(jax.grad(lambda params, x: loss(params, x)))
    text = run.lower(params_L(3), (jnp.ones((ROWS, WIDTH)),) * 2).compile().as_text()
    calls = [line.split(" call(")[0] for line in text.splitlines() if " call(" in line]
    stream = f"f32[{ROWS},{WIDTH}]"
    of_branches = sorted(call.count(stream) for call in calls if call.count(stream) > 1)
    # tanh and what its derivative takes, of two branches, forward and in the rewind
    assert len(of_branches) >= 4
    assert len(set(of_branches[-4:])) == 1


def test_a_branch_that_asks_for_its_place_in_a_batch():
    """Dropout that differs by example or replica: its mask depends on no batched input."""

    def dropout(params, x, context):
        key = jax.random.fold_in(context.data, jax.lax.axis_index("examples"))
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), branch(params, x, None), 0.0)

    keys_L = jax.random.split(jax.random.key(1), 2)
    x = (jax.random.normal(jax.random.key(2), (3, ROWS, WIDTH)),) * 2
    found = []
    for backprop in ("remat_dots", "store", "reverse"):  # the first evaluates branches in the open
        block = reversible_block(dropout, dropout)

        def loss(params_L, x, block=block, backprop=backprop):
            y, _ = chain(block, params_L, x, data_L=keys_L, backprop=backprop)
            return jnp.mean(y[0] ** 2) + jnp.mean(y[1])

        gradients = jax.vmap(jax.grad(loss), (None, 0), axis_name="examples")
        found.append(toy.jit(gradients)(params_L(2), x))
    expected, *others = found
    assert not jnp.array_equal(expected[0][0], expected[0][1])
    for got in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_vmap_over_devices_reaches_constraints_in_a_branch():
    def constrained(params, x, context):
        return jnp.tanh(jax.lax.with_sharding_constraint(x @ params, PartitionSpec("model")))

    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    block, x = reversible_block(constrained, constrained), (jnp.ones((2, ROWS, WIDTH)),) * 2
    run = lambda x: chain(block, params_L(1), x)[0]
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.vmap(run, spmd_axis_name="data"))(x))
    assert "P('data', 'model')" in text
    assert "UNCONSTRAINED" not in text


@pytest.mark.parametrize("backprop", ["reverse", "store", "remat"])
def test_a_branch_may_return_a_key_first_or_nothing(backprop):
    """What the checksum cannot read: stochastic rounding, and a stream without arrays."""
    noisy = lambda u: snap(Grid(), u["u"] + jax.random.uniform(u["key"], u["u"].shape) / 2**13)
    coupling = Coupling(
        lambda x, u, grid: (x + noisy(u), None), lambda y, u, residue, grid: y - noisy(u)
    )
    keyed = lambda params, x, context: {"key": context.data, "u": jnp.tanh(x @ params)}
    keys_L = jax.random.split(jax.random.key(1), 2)
    x = (jax.random.normal(jax.random.key(2), (ROWS, WIDTH)),) * 2

    def loss(params_L, probe, backprop):
        block = reversible_block(keyed, keyed, coupling=coupling)
        y, _ = chain(block, params_L, x, data_L=keys_L, probe=probe, backprop=backprop)
        return jnp.mean(y[0] ** 2)

    got, found = jax.grad(loss, argnums=(0, 1))(params_L(2), Exactness.probe(), backprop)
    assert found.mismatches == 0
    expected = jax.grad(loss)(params_L(2), None, "remat_dots")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)

    empty = multi_stream_block((lambda params, x, context: params, lambda params, x, context: {}))
    loss = lambda w: jnp.sum(chain(empty, (w, ()), (jnp.ones(3), {}), backprop=backprop)[0][0] ** 2)
    assert jnp.array_equal(jax.grad(loss)(jnp.ones((2, 3))), jnp.full((2, 3), 6.0))
