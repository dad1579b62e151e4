"""A chain of different layers under one gradient: the naive program's, and nothing kept between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    Context,
    Exactness,
    Grid,
    Invertible,
    PlainLayer,
    Section,
    affine,
    chain,
    momentum_block,
    reversible_block,
    sequence,
    sequence_forward,
    sequence_inverse,
)
from tests.core import toy

BATCH, SIZE, CHANNELS, BOUND = 2, 4, 2, 1.5


def dense(params, x, context):
    hidden = jnp.tanh(x @ params["w"] + params["b"].reshape(1, 1, 1, -1))
    return hidden * context.shared["scale"], {"moment": jnp.mean(hidden, (0, 1, 2))}


def gated(params, x, context):
    return jax.nn.gelu(x @ params["w"]) * context.data["rate"], None


def scale_and_shift(params, x, context):
    return jnp.sin(x @ params["scale"]), jnp.tanh(x @ params["shift"]) * context.shared["scale"]


def tied(params, x, context):
    """Has no parameters of its own."""
    hidden = jnp.tanh(x @ context.shared["w"])
    return hidden, jnp.sum(hidden**2)


def space_to_depth(params, x, context):
    """Half the height and width, four times the channels; auxiliary: how much is in a corner."""

    def one(x):
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h // 2, w // 2, 4 * c)

    return tuple(map(one, x)), jnp.sum(x[0][:, 0, 0] * context.shared["scale"])


def depth_to_space(params, y, context):
    def one(y):
        b, h, w, c = y.shape
        y = y.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, 2 * h, 2 * w, c // 4)

    return tuple(map(one, y))


def make_sections(params, data, grid=Grid()):
    """Five, no two alike: in parameters, depth, shapes, coupling or auxiliary outputs."""
    wide = lambda f: reversible_block(f, f, has_aux=True, grid=grid)
    return [
        Section(reversible_block(dense, gated, has_aux=True, grid=grid), params[0], data[0]),
        Section(Invertible(space_to_depth, depth_to_space, has_aux=True), length=1),
        Section(
            reversible_block(scale_and_shift, scale_and_shift, coupling=affine(BOUND), grid=grid),
            params[1],
        ),
        Section(wide(dense), params[2]),
        Section(wide(tied), ((), ()), length=3),
    ]


def naive_sequence(params, data, x, shared):
    """Written out: no scan, no grid, no custom gradient."""
    x1, x2 = x
    first, last = [], []
    at = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
    context = Context(shared)
    for i in range(3):
        u, aux = dense(at(params[0][0], i), x2, context)
        x1 = x1 + u
        x2 = x2 + gated(at(params[0][1], i), x1, Context(shared, at(data[0], i)))[0]
        first.append(aux["moment"])
    (x1, x2), corner = space_to_depth((), (x1, x2), context)
    for i in range(2):
        raw, shift = scale_and_shift(at(params[1][0], i), x2, context)
        x1 = x1 * jnp.power(BOUND, jnp.tanh(raw)) + shift
        raw, shift = scale_and_shift(at(params[1][1], i), x1, context)
        x2 = x2 * jnp.power(BOUND, jnp.tanh(raw)) + shift
    u, aux_f = dense(at(params[2][0], 0), x2, context)
    x1 = x1 + u
    u, aux_g = dense(at(params[2][1], 0), x1, context)
    x2 = x2 + u
    for _ in range(3):
        u, energy_f = tied((), x2, context)
        x1 = x1 + u
        u, energy_g = tied((), x1, context)
        x2 = x2 + u
        last.append(energy_f * energy_g)
    moments = aux_f["moment"] * aux_g["moment"]
    return loss((x1, x2), jnp.stack(first), corner, moments, jnp.stack(last))


def loss(y, moments_f, corner, moments, energies):
    """The loss reads both streams, and what four sections returned besides."""
    outputs = jnp.mean(y[0] ** 2) + jnp.mean(jnp.sin(y[1]) * y[0])
    auxes = jnp.sum(moments_f**2) + jnp.sin(corner) + jnp.sum(moments) + jnp.mean(jnp.cos(energies))
    return outputs + auxes


def sequence_loss(params, data, x, shared, grid, backprop):
    sections = make_sections(params, data, grid)
    y, auxes = sequence(sections, x, shared=shared, backprop=backprop)
    first, corner_L, _, fourth, last = auxes
    moments = fourth[0]["moment"] * fourth[1]["moment"]
    return loss(y, first[0]["moment"], corner_L[0], moments, last[0] * last[1])


def arguments(dtype):
    """(params of the sections that have some, data likewise, x, shared)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    c, d = CHANNELS, 4 * CHANNELS
    params = (
        ({"w": normal(3, c, c), "b": normal(3, c)}, {"w": normal(3, c, c)}),
        tuple({"scale": normal(2, d, d) / 3, "shift": normal(2, d, d) / 3} for _ in range(2)),
        tuple({"w": normal(1, d, d) / 3, "b": normal(1, d)} for _ in range(2)),
    )
    data = ({"rate": jnp.asarray([0.2, 0.5, 0.9], dtype)},)
    x = tuple(normal(BATCH, SIZE, SIZE, c) for _ in range(2))
    return params, data, x, {"scale": normal(), "w": normal(d, d) / 3}


def test_gradient_equals_store_and_the_naive_program():
    """Values and gradients of params, streams and shared inputs, in float64 to 1e-10."""
    with jax.enable_x64(True):
        params, data, x, shared = arguments(jnp.float64)
        grad = jax.value_and_grad(sequence_loss, (0, 2, 3))

        @toy.jit
        def all_gradients(*args):
            on_the_grid = [grad(*args, Grid(), b) for b in ("store", "reverse")]
            naive = jax.value_and_grad(naive_sequence, (0, 2, 3))(*args)
            return on_the_grid, [naive, grad(*args, None, "reverse")]

        for expected, got in all_gradients(params, data, x, shared):
            (true_value, true_grads), (value, grads) = expected, got
            assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(true_grads))
            np.testing.assert_allclose(value, true_value, rtol=1e-10)
            assert jax.tree.structure(grads) == jax.tree.structure(true_grads)
            for a, b in zip(grads, true_grads, strict=True):
                assert toy.relative_error(a, b) < 1e-10


def test_the_inverse_is_the_input_bit_for_bit():
    params, data, x, shared = arguments(jnp.float32)
    sections = make_sections(params, data)

    @toy.jit
    def round_trip(x):
        y, _, residues = sequence_forward(sections, x, shared=shared)
        return y, residues, sequence_inverse(sections, y, residues, shared=shared)

    y, residues, rebuilt_x = round_trip(x)
    assert y[0].shape == (BATCH, SIZE // 2, SIZE // 2, 4 * CHANNELS)
    # Of five sections one multiplies, and leaves a bit per layer, half-step and element.
    assert [len(jax.tree.leaves(residue)) for residue in residues] == [0, 0, 2, 0, 0]
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(residues)) == 2 * 2 * x[0].size / 8
    for got, expected in zip(rebuilt_x, Grid().snap(x), strict=True):
        np.testing.assert_array_equal(
            np.asarray(got).view(np.uint32), np.asarray(expected).view(np.uint32)
        )


@pytest.mark.parametrize("impure_section", [None, 0, 2])
def test_the_probe_covers_the_sequence_from_end_to_end(impure_section):
    """A layer that answers differently when asked again is caught wherever it is."""
    calls = []

    def pure(params, x, context):
        return jnp.tanh(x * params)

    def impure(params, x, context):
        calls.append(1)
        return jnp.tanh(x * params) * (0.5 + 1e-3 * len(calls))

    blocks = [reversible_block(impure if i == impure_section else pure, pure) for i in (0, None, 2)]
    params_L = (jnp.linspace(0.5, 1, 3), jnp.linspace(1, 0.5, 3))
    first, last = Section(blocks[0], params_L), Section(blocks[2], params_L)
    between = Section(Invertible(space_to_depth, depth_to_space, has_aux=True), length=1)
    _, _, x, shared = arguments(jnp.float32)

    def loss(probe):
        (y1, y2), _ = sequence([first, between, last], x, shared=shared, probe=probe)
        return jnp.sum(y1 * y2)

    exactness = toy.jit(jax.grad(loss))(Exactness.probe())
    if impure_section is None:
        assert exactness.mismatches == 0
        assert exactness.max_difference == 0
    else:
        assert exactness.mismatches > x[0].size / 2
        assert exactness.max_difference > 1e-3
    assert 1 < exactness.max_abs < Grid().limit(jnp.float32)


WIDTH, ROWS = 32, 128
STREAM_BYTES = ROWS * WIDTH * 4


def temporary_bytes(num_sections, depth, *, one_sequence):
    """For the gradient of this number of sections, under one `sequence` or a `chain` each."""
    branch = lambda params, x, context: jnp.tanh(x @ params)
    block = reversible_block(branch, branch)

    def loss(params, y):
        if one_sequence:
            y, _ = sequence([Section(block, params_L) for params_L in params], y)
        else:
            for params_L in params:
                y, _ = chain(block, params_L, y)
        return jnp.sum(y[0] * y[1])

    params = [(jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32),) * 2] * num_sections
    x = (jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),) * 2
    return toy.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [1, 4])
def test_memory_of_a_sequence_does_not_depend_on_how_many_sections_it_has(depth):
    """But for a loop's counters and pointers, and a checksum of its rows: of a stream, 1/32."""
    few, many = (temporary_bytes(n, depth, one_sequence=True) for n in (7, 11))
    assert abs(many - few) / 4 <= 0.05 * STREAM_BYTES


@pytest.mark.thorough
@pytest.mark.parametrize("depth", [1, 4])
def test_chains_one_after_the_other_keep_a_pair_of_streams_each(depth):
    """The reason for `sequence`; a chain of one layer keeps what its branches computed as well."""
    few, many = (temporary_bytes(n, depth, one_sequence=False) for n in (3, 7))
    per_chain = (many - few) / 4
    assert per_chain >= 2 * STREAM_BYTES
    if depth > 1:
        assert per_chain == pytest.approx(2 * STREAM_BYTES, rel=0.03)  # and a checksum of its rows


def double(params, x, context):
    return x * params


PARAMS_L, X = (jnp.ones(3), jnp.ones(3)), (jnp.ones(4), jnp.ones(4))
BLOCK = reversible_block(double, double)
AFFINE = reversible_block(lambda *args: (double(*args),) * 2, double, coupling=affine())
HALVE = Invertible(lambda params, x, _: (x[0][::2], x[1][::2]), lambda params, y, _: y)
PLAIN = PlainLayer(lambda params, x, context: (x, None))
ERRORS = {
    "two grids": (
        [
            Section(BLOCK, PARAMS_L),
            Section(reversible_block(double, double, grid=Grid(8)), PARAMS_L),
        ],
        r"got blocks with .*Grid\(bits=8\).* in one sequence, expected one grid",
    ),
    "a grid and none": (
        [Section(BLOCK, PARAMS_L), Section(reversible_block(double, double, grid=None), PARAMS_L)],
        "got blocks with .*None.* in one sequence, expected one grid",
    ),
    "no sections": ([], "got no sections, expected at least one"),
    "shapes that change in a loop": (
        [Section(BLOCK, PARAMS_L), Section(HALVE, length=2)],
        r"maps stream 0 from float32\[4\] to float32\[2\].*section of its own",
    ),
    "a layer without an inverse": (
        [Section(BLOCK, PARAMS_L), Section(PLAIN, length=1)],
        "got a PlainLayer to be reversed, expected a layer with an inverse.*'remat'",
    ),
    "a later section with parameters of one branch": (
        [Section(BLOCK, PARAMS_L), Section(BLOCK, PARAMS_L[:1])],
        "got block parameters 1, expected a tuple of 2",
    ),
    "an affine branch that returns no pair": (
        [Section(AFFINE, PARAMS_L)],
        r"returned a .*, expected a pair \(raw scale, shift\)",
    ),
    "another length than that of params": (
        [Section(BLOCK, PARAMS_L, length=5)],
        r"got leading axes 5 in length, 3 in params_L\[0\], expected one depth",
    ),
    "no layers": (
        [Section(BLOCK, ((), ()), length=0)],
        "got a chain of 0 layers, expected at least one",
    ),
    "params of no layers": (
        [Section(BLOCK, (jnp.ones(0), jnp.ones(0)))],
        "got a chain of 0 layers, expected at least one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_clear_error(case):
    sections, message = ERRORS[case]
    for call in (sequence, sequence_forward):
        with pytest.raises(ValueError, match=message) as caught:
            call(sections, X)
        assert "\n" not in str(caught.value)


def test_the_inverse_refuses_what_the_gradient_refuses():
    for case in ("two grids", "a layer without an inverse", "another length than that of params"):
        sections, message = ERRORS[case]
        with pytest.raises(ValueError, match=message):
            sequence_inverse(sections, X)


def test_an_inverse_without_the_residue_it_needs():
    pair = lambda *args: (double(*args),) * 2
    sections = [Section(reversible_block(pair, pair, coupling=affine()), PARAMS_L)]
    y, _, residues = sequence_forward(sections, X)
    sequence_inverse(sections, y, residues)
    with pytest.raises(ValueError, match=r"got no residue, .*`sequence_forward`.*flow.*grid=None"):
        sequence_inverse(sections, y)
    free = [Section(reversible_block(pair, pair, coupling=affine(), grid=None), PARAMS_L)]
    for back, latent in zip(sequence_forward(free, sequence_inverse(free, y))[0], y, strict=True):
        np.testing.assert_allclose(back, latent, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.49, 1.0, -0.5])
def test_momentum_out_of_range(gamma):
    with pytest.raises(ValueError, match=rf"got gamma={gamma}, expected at least 0.5 and less"):
        momentum_block(double, gamma=gamma)


@pytest.mark.parametrize("bound", [1.0, 2.5])
def test_bound_out_of_range(bound):
    with pytest.raises(ValueError, match=rf"got bound={bound}, expected more than 1 and at most"):
        affine(bound)


def test_forward_mode_through_reverse():
    """Says what to take instead; inside jit it is JAX that speaks."""
    run = lambda x: sequence([Section(BLOCK, PARAMS_L)], x)[0]
    with pytest.raises(
        TypeError, match=r"forward-mode.*expected reverse mode: take backprop=.store"
    ):
        jax.jvp(run, (X,), (X,))
    with pytest.raises(TypeError, match=r"forward-mode.*\(jvp\).*custom_vjp function"):
        jax.jvp(toy.jit(run), (X,), (X,))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_streams_without_elements(shape):
    """A last batch may be empty: nothing to compute, nothing that could differ."""
    pair = lambda params, x, context: (x * params, jnp.sin(x) * params)
    x = (jnp.ones(shape), jnp.ones(shape))
    block = reversible_block(pair, pair, coupling=affine())

    def loss(params_L, x, probe):
        y, _ = chain(block, params_L, x, probe=probe)
        return jnp.sum(y[0] * y[1])

    dparams, dx, exactness = toy.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        PARAMS_L, x, Exactness.probe()
    )
    assert [leaf.shape for leaf in dx] == [shape, shape]
    assert not any(map(jnp.any, dparams))
    assert not any(map(jnp.any, exactness))
