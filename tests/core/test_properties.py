"""Laws that hold for every shape, depth, dtype, grid and coupling, on examples drawn at random."""

import atexit
import functools
import math
import shutil
import tempfile
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.internal.conjecture.providers import Constants, HypothesisProvider

from revnet_jax.core import (
    Exactness,
    Grid,
    Section,
    additive,
    affine,
    bdia_block,
    chain,
    leapfrog,
    momentum_block,
    multi_stream_block,
    scaled,
    sequence_forward,
    sequence_inverse,
)
from revnet_jax.core.scaling import divide, multiply, pack, unpack
from tests import by_default, thorough
from tests.core import toy

# What hypothesis keeps of the sources it reads would stay in the working directory.
STORAGE = tempfile.mkdtemp(prefix="revnet_jax_hypothesis_")
set_hypothesis_home_dir(STORAGE)
atexit.register(shutil.rmtree, STORAGE, ignore_errors=True)

# Else one draw in twenty is a number out of whatever modules have been imported by then, and other
# tests decide which examples are drawn here.
HypothesisProvider._local_constants = Constants()


def fixed(number):
    """The same examples in every run."""
    return hypothesis.settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),  # shrinking takes minutes
        suppress_health_check=(hypothesis.HealthCheck.too_slow,),
    )


def wide(number):
    """Many more, others in every run; one that fails is printed, with what draws it again."""
    return hypothesis.settings(fixed(20 * number), derandomize=False, print_blob=True)


every_search = pytest.mark.parametrize(
    "search",
    [fixed, pytest.param(wide, marks=pytest.mark.slow)],
    ids=["fixed", "wide"],
)
shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)
stream_dtypes = st.sampled_from([jnp.float32, jnp.float64])
grids = st.integers(0, 22).map(Grid)

# The limit over the size of the input, so that no stream leaves the range within MAX_DEPTH layers,
# whatever the branches say, and most of the range is used.
ROOM = {"additive": 4, "leapfrog": 4, "affine": 4, "momentum": 16, "bdia": 32, "scaled": 4}
MAX_DEPTH = 9


# One number, of which branches take the mean so that a layer reads 4 KiB. XLA's CPU compiler makes
# one function of a loop that touches about 1 KiB or less, branches and all, and rounds to bfloat16
# in other places there: up to 8e-3 of a gradient, and a rebuilt input in a few cases.
SHARED = np.full(512, 0.75)


def same_bits(tree, true_tree):
    leaves, true_leaves = jax.tree.leaves(tree), jax.tree.leaves(true_tree)
    for got, expected in zip(leaves, true_leaves, strict=True):
        assert got.dtype == expected.dtype
        view = {4: np.uint32, 8: np.uint64}[expected.dtype.itemsize]
        np.testing.assert_array_equal(np.asarray(got).view(view), np.asarray(expected).view(view))


def flat(tree):
    """In numpy, which compiles nothing for a new shape."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


class Network(NamedTuple):
    """A chain drawn at random; streams may be trees and, where the block allows, of many shapes."""

    coupling: str
    depth: int
    grid: Grid
    dtype: Any
    branch_dtype: Any
    reads: str
    shapes: tuple[tuple[int, ...], ...]
    number: float  # what the coupling takes: a step, a bound or a gamma
    seed: int
    most: float = math.inf

    def amplitude(self):
        """How large the input may be."""
        growth = self.number**self.depth if self.coupling == "affine" else 1
        return min(self.most, self.grid.limit(self.dtype) / ROOM[self.coupling] / growth)

    def section(self):
        update_size = min(self.amplitude() / 4, 2.0**14)  # float16 ends at 65504

        def branch(params, *args):
            """Sees every element read, at unit size, and computes in a dtype of its own."""
            *reads, context = args
            cast = lambda leaf: leaf.astype(self.branch_dtype)
            w = cast(params)
            means = [jnp.mean(cast(leaf / self.amplitude())) for leaf in jax.tree.leaves(reads)]
            hidden = jnp.sin(w * (0.3 + sum(means)))
            update = as_stream(hidden * cast(jnp.mean(context.shared) * update_size))
            return (as_stream(3 * w - hidden), update) if self.coupling == "affine" else update

        n, grid = len(self.shapes), self.grid
        if self.coupling == "momentum":
            block, params = momentum_block(branch, gamma=self.number, grid=grid), (0, None)
        elif self.coupling == "bdia":
            block, params = bdia_block(branch, branch, grid=grid), (0, 1)
        else:
            make = {"additive": additive, "leapfrog": leapfrog, "affine": affine, "scaled": scaled}
            coupling = make[self.coupling](self.number)
            block = multi_stream_block([branch] * n, reads=self.reads, coupling=coupling, grid=grid)
            params = tuple(range(n))

        rng = np.random.default_rng(self.seed)
        values = lambda *shape: jnp.asarray(rng.normal(size=shape), self.dtype)
        params_L = tuple(() if i is None else values(self.depth, *self.shapes[i]) for i in params)
        gamma = rng.choice([-0.5, 0.5], size=(self.depth, 2, *(1 for _ in self.shapes[0])))
        data_L = {"gamma": jnp.asarray(gamma, self.dtype)}
        return Section(block, params_L, data_L)

    def input(self):
        """Grid points: all of a signed range, with its ends and zero."""
        rng = np.random.default_rng(self.seed + 1)
        most = int(self.amplitude() * 2**self.grid.bits)
        x = [rng.integers(-most, most, size=shape, endpoint=True) for shape in self.shapes]
        for stream in x:
            stream.flat[0] = rng.choice([-most, 0, most])
        return tuple(
            as_stream(jnp.asarray(stream / 2.0**self.grid.bits, self.dtype)) for stream in x
        )


def as_stream(array):
    """Streams of even rank are arrays, those of odd rank are trees."""
    return {"only": array} if jnp.ndim(array) % 2 else array


@st.composite
def networks(draw, coupling):
    number = {
        "additive": st.just(1.0),
        "leapfrog": st.floats(0.05, 0.5),
        "affine": st.floats(1.1, 2.0),
        "momentum": st.floats(0.5, 0.999),
        "bdia": st.just(0.0),
        "scaled": st.floats(0.01, 1.0),
    }[coupling]
    num_streams = 2 if coupling in ("momentum", "bdia") else draw(st.sampled_from([2, 2, 3, 4]))
    alike = coupling in ("momentum", "bdia") or draw(st.booleans())
    drawn = [draw(shapes) for _ in range(1 if alike else num_streams)]
    return Network(
        coupling,
        draw(st.integers(1, MAX_DEPTH)),
        draw(grids),
        draw(stream_dtypes),
        draw(st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32])),
        draw(st.sampled_from(["others", "next"])),
        tuple(drawn * num_streams if alike else drawn),
        draw(number),
        draw(st.integers(0, 1000)),
    )


def network_loss(params_L, x, shared, probe, section, network, backprop):
    y, _ = chain(
        section.layer,
        params_L,
        x,
        shared=shared,
        data_L=section.data_L,
        backprop=backprop,
        probe=probe,
    )
    # Linear, so that the chain's cotangents are the same bits whatever the loss is fused with.
    rng = np.random.default_rng(network.seed + 2)
    weights = [rng.normal(size=leaf.shape) / network.amplitude() for leaf in jax.tree.leaves(y)]
    pairs = zip(weights, jax.tree.leaves(y), strict=True)
    return sum((jnp.sum(jnp.asarray(w, leaf.dtype) * leaf) for w, leaf in pairs), start=0.0), y


every_coupling = pytest.mark.parametrize("coupling", by_default(ROOM, "affine"))


@every_search
@pytest.mark.parametrize("coupling", by_default(ROOM, "additive"))
def test_the_inverse_of_forward_is_the_input_bit_for_bit(coupling, search):
    @search(4)
    @hypothesis.given(networks(coupling))
    def law(network):
        with jax.enable_x64(True):
            check_inverse(network)

    law()


def check_inverse(network):
    section, x = network.section(), network.input()
    shared = SHARED.astype(network.dtype)

    @toy.jit
    def round_trip(params_L, x):
        sections = [section._replace(params_L=params_L)]
        y, _, residues = sequence_forward(sections, x, shared=shared)
        return y, sequence_inverse(sections, y, residues, shared=shared)

    y, rebuilt_x = round_trip(section.params_L, x)
    same_bits(rebuilt_x, x)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(y))
    assert 0 < largest < network.grid.limit(network.dtype)


@every_search
@every_coupling
def test_the_gradient_of_reverse_is_that_of_store(coupling, search):
    """Bit for bit, with branches of any dtype; what it rebuilds on the way is the input."""

    @search(3)
    @hypothesis.given(networks(coupling))
    def law(network):
        with jax.enable_x64(True):
            # float16 has cotangents to hold
            check_gradient(network._replace(dtype=jnp.float64, most=1024.0))

    law()


def check_gradient(network):
    section, x = network.section(), network.input()
    grad = jax.grad(network_loss, (0, 1, 2, 3), has_aux=True)
    both = jax.jit(
        lambda *args: [grad(*args, section, network, b) for b in ("store", "reverse")],
        # Without any optimization one function narrows float64 to float16 in one rounding and
        # an equal one in two.
        compiler_options={"xla_backend_optimization_level": 1},
    )
    args = section.params_L, x, SHARED.astype(network.dtype), Exactness.probe()
    ((*true_grads, _), true_y), ((*grads, exactness), y) = both(*args)
    assert exactness.mismatches == 0
    assert 0 < exactness.max_abs < network.grid.limit(jnp.float64)
    same_bits(y, true_y)
    assert jax.tree.structure(grads) == jax.tree.structure(true_grads)
    for got, expected in zip(grads, true_grads, strict=True):
        got, expected = flat(got), flat(expected)
        assert 0 < np.linalg.norm(expected) < np.inf
        np.testing.assert_array_equal(got, expected)


class Product(NamedTuple):
    """Grid points `steps * 2**-bits` and scales `parts * 2**-12` that broadcast to them."""

    steps: np.ndarray
    parts: np.ndarray
    grid: Grid
    dtype: Any

    def arrays(self):
        x = jnp.asarray(self.steps / 2.0**self.grid.bits, self.dtype)
        return x, jnp.asarray(self.parts / 2.0**12, self.dtype)

    def exact(self):
        """The product in grid steps, times 2**12, in Python's integers: nothing rounds."""
        steps, parts = np.broadcast_arrays(self.steps, self.parts)
        return steps.astype(object) * parts.astype(object)

    def in_steps(self, array):
        return np.vectorize(int, otypes=[object])(np.asarray(array, float) * 2.0**self.grid.bits)


def limit_in_steps(dtype):
    """The same for every grid."""
    return int(Grid(0).limit(dtype))


@st.composite
def products(draw):
    """All magnitudes below the limit, odd shapes, one scale for all elements or for each."""
    shape, dtype = draw(shapes), draw(stream_dtypes)
    scale_shape = draw(st.sampled_from([shape, (1,) * len(shape), ()]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    limit = limit_in_steps(dtype)
    steps = rng.integers(-limit + 1, limit, size=shape) // 2 ** rng.integers(0, 24, size=shape)
    parts = rng.integers(2**11, 2**13, size=scale_shape, endpoint=True)
    return Product(np.asarray(steps), np.asarray(parts), draw(grids), dtype)


@functools.partial(toy.jit, static_argnums=2)
def there_and_back(x, scale, grid):
    """(y, residue, x rebuilt, the gradients of the sum of y, signs of x packed and unpacked)."""
    y, pullback, residue = jax.vjp(lambda *args: multiply(*args, grid), x, scale, has_aux=True)
    signs = unpack(pack(x < 0), x.shape)
    return y, residue, divide(y, residue, scale, grid), pullback(jnp.ones_like(y)), signs


def check_product(product):
    """The laws of `multiply` and `divide` below the limit."""
    x, scale = product.arrays()
    y, residue, rebuilt_x, (dx, dscale), signs = there_and_back(x, scale, product.grid)
    # Within half a step, and bit for bit, where the product has not left the range.
    exact, steps = product.exact(), product.in_steps(y)
    inside = abs(exact) < limit_in_steps(product.dtype) * 2**12
    off = abs(steps * 2**12 - exact)
    assert np.all(np.where(inside, off <= 2**11, off <= 2**11 + 2**12))
    same_bits(np.asarray(rebuilt_x)[inside], np.asarray(x)[inside])
    assert np.all(abs(product.in_steps(rebuilt_x) - product.steps) <= 2)
    # One bit for each element; a row is what one example has.
    rows, row = (x.shape[0], x[0].size) if x.ndim > 1 else (1, x.size)
    assert residue.dtype == jnp.uint8
    assert residue.nbytes == rows * math.ceil(row / 8)
    np.testing.assert_array_equal(signs, np.asarray(x) < 0)
    # Straight through the rounding.
    np.testing.assert_array_equal(dx, jnp.broadcast_to(scale, x.shape))
    axes = tuple(i for i in range(x.ndim) if scale.ndim < x.ndim or scale.shape[i] != x.shape[i])
    true_dscale = np.asarray(x, np.float64).sum(axes).reshape(scale.shape)
    np.testing.assert_allclose(dscale, true_dscale, rtol=1e-5, atol=1e-6 * np.abs(x).max())


@every_search
def test_a_product_is_undone_bit_for_bit_by_one_bit_per_element(search):
    @search(15)
    @hypothesis.given(products())
    def law(product):
        with jax.enable_x64(True):
            check_product(product)

    law()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_every_scale_is_undone_from_one_end_of_the_range_to_the_other(dtype):
    with jax.enable_x64(True):
        limit = limit_in_steps(dtype)
        rng = np.random.default_rng(0)
        few, many = np.arange(-10, 10), rng.integers(-limit + 1, limit, size=20)
        ends = [sign * (limit - 1 - i) for i in range(5) for sign in (-1, 1)]
        parts = np.arange(2**11, 2**13 + 1)
        steps = np.tile(np.concatenate([few, many, ends]), (len(parts), 1))
        check_product(Product(steps, parts[:, None], Grid(), dtype))


@pytest.mark.parametrize(
    ("bits", "dtype"), [(0, jnp.float32), (12, jnp.float32), (22, jnp.float32), (12, jnp.float64)]
)
def test_beyond_the_limit_a_product_is_undone_as_ordinary_floats_are(bits, dtype):
    """Up to where floats end; infinities and what is not a number stay what they are."""
    with jax.enable_x64(True):
        grid = Grid(bits)
        factors = [1, 1.25, 2.3, 2**6, 2**7, 1.9 * 2**7, 2**8, 2**9, 2**10, 2**12, 1e9, 1e20]
        x = grid.limit(dtype) * np.asarray([*factors, np.inf, np.nan])
        x = jnp.asarray(np.concatenate([x, -x]), dtype)
        scale = jnp.asarray(np.arange(2**11, 2**13 + 1)[:, None] / 2**12, dtype)
        x = jnp.tile(x, (len(scale), 1))
        y, _, rebuilt_x, *_ = there_and_back(x, scale, grid)
        np.testing.assert_array_equal(y, x * scale)
        np.testing.assert_allclose(rebuilt_x, x, rtol=2 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("coupling", "backprop"),
    [
        thorough("additive", "store"),
        thorough("affine", "store"),
        ("additive", "reverse"),
        thorough("affine", "reverse"),
    ],
)
def test_second_derivatives_are_those_of_free_streams(coupling, backprop):
    """But for the rounding of the streams themselves; forward over reverse, and reverse twice."""
    with jax.enable_x64(True):
        shift = lambda params, x, context: jnp.sin(x * params)
        pair = lambda params, x, context: (jnp.cos(x * params), jnp.sin(x * params))
        f, merge = (shift, additive()) if coupling == "additive" else (pair, affine())
        params_L = (jnp.linspace(0.5, 1.0, 3), jnp.linspace(-0.3, 0.9, 3))

        def loss(x, grid):
            block = multi_stream_block((f, f), coupling=merge, grid=grid)
            (y1, y2), _ = chain(block, params_L, (x, jnp.cos(x)), backprop=backprop)
            return jnp.sin(y1) * y2

        def second(x):
            return [
                derivative(jax.grad(lambda x, grid=grid: loss(x, grid)))(x)
                for grid in (None, Grid(22))
                for derivative in (jax.grad, jax.jacfwd)
            ]

        true_second, *others = toy.jit(second)(jnp.float64(0.3))
        np.testing.assert_allclose(jnp.stack(others), true_second, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [4, 12])
def test_second_derivatives_of_a_product_are_those_of_store(bits):
    """However coarse the grid: what it rounds off is the same, rebuilt or stored."""
    with jax.enable_x64(True):
        pair = lambda params, x, context: (jnp.tanh(x @ params), x @ params / 9)
        block = multi_stream_block((pair, pair), coupling=affine(), grid=Grid(bits))
        rng = np.random.default_rng(0)
        params_L, x = (
            tuple(jnp.asarray(rng.normal(size=shape)) / 3 for _ in range(2))
            for shape in ((5, 4, 4), (3, 4))
        )

        def hessian_vector_product(backprop):
            run = lambda params_L: chain(block, params_L, x, backprop=backprop)[0]
            loss = lambda params_L: jnp.mean(run(params_L)[0] ** 2)
            return jax.jvp(jax.grad(loss), (params_L,), (params_L,))[1]

        got, expected = toy.jit(lambda: [hessian_vector_product(b) for b in ("reverse", "store")])()
        assert toy.relative_error(got, expected) < 1e-13
