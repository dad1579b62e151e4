"""Every misuse is one line that says what was got, what was expected, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    Block,
    Coupling,
    Grid,
    Invertible,
    Section,
    bdia_block,
    chain,
    keeping_operands,
    reversible_block,
    scale_on_grid,
    sequence,
    sequence_forward,
    sequence_inverse,
)


def double(params, x, context):
    return x * params


PARAMS_L = (jnp.ones(3), jnp.ones(3))
X = (jnp.ones(4), jnp.ones(4))
BLOCK = reversible_block(double, double)


def call(**changes):
    arguments = {"layer": BLOCK, "params_L": PARAMS_L, "x": X} | changes
    return chain(**arguments)


CASES = {
    "unknown strategy": ({"backprop": "revers"}, ValueError, "got backprop='revers', expected one"),
    "streams not a tuple": ({"x": jnp.ones(4)}, TypeError, "expected a plain tuple"),
    "a string as a stream": (
        {"x": (jnp.ones(4), "x2")},
        TypeError,
        r"got x\[1\] of type str, expected an array",
    ),
    "the name of a dtype among shared inputs": (
        {"shared": {"dtype": "float32"}},
        TypeError,
        r"got shared\['dtype'\] of type str, expected an array",
    ),
    "a dtype among shared inputs": (
        {"shared": jnp.bfloat16},
        TypeError,
        "got shared of type _ScalarMeta and dtype bfloat16, expected an array",
    ),
    "a string among shared inputs": (
        {"shared": {"mode": "train"}},
        TypeError,
        r"got shared\['mode'\] of type str, expected an array: write constants that are not "
        "arrays into the branch",
    ),
    "an object among the parameters": (
        {"params_L": (jnp.ones(3), object())},
        TypeError,
        r"got params_L\[1\] of type object, expected an array",
    ),
    "words among the data": (
        {"data_L": np.asarray(["a", "b", "c"])},
        TypeError,
        "got data_L of type ndarray and dtype <U1, expected an array",
    ),
    "integer stream": (
        {"x": (jnp.ones(4), jnp.ones(4, jnp.int32))},
        TypeError,
        r"got a stream int32\[4\], expected floating point",
    ),
    "narrow streams on the grid": (
        {"x": (jnp.ones(4, jnp.bfloat16),) * 2},
        TypeError,
        "got a bfloat16 stream, expected float32.*grid=None",
    ),
    "a stream too few": ({"x": (jnp.ones(4),)}, ValueError, "got 1 streams, expected the 2"),
    "streams a list": ({"x": list(X)}, TypeError, "got streams of type list, expected a plain"),
    "parameters a list": (
        {"params_L": list(PARAMS_L)},
        ValueError,
        "got block parameters a list, expected a tuple of 2",
    ),
    "parameters of one branch": ({"params_L": PARAMS_L[:1]}, ValueError, "expected a tuple of 2"),
    "two depths": (
        {"params_L": (jnp.ones(3), jnp.ones(2))},
        ValueError,
        r"got leading axes 3 in params_L\[0\], 2 in params_L\[1\], expected one depth",
    ),
    "data of another depth": (
        {"data_L": jnp.ones(5)},
        ValueError,
        "got leading axes 3 in .*, 5 in data_L, expected one depth",
    ),
    "parameters not stacked": (
        {"params_L": (1.0, jnp.ones(3))},
        ValueError,
        r"params_L\[0\] is a scalar, expected a leading axis",
    ),
    "nothing stacked": (
        {"params_L": ((), ())},
        ValueError,
        "got no arrays in params_L and data_L, expected `length`",
    ),
    "probe not one": ({"probe": 0.0}, TypeError, r"got probe=0.0, expected Exactness.probe\(\)"),
    "length not whole": ({"length": 3.0}, TypeError, "got length=3.0, expected a whole number"),
    "more stored than there are": (
        {"stored_layers": 4},
        ValueError,
        "got stored_layers=4, expected a whole number from 0 to 3",
    ),
    "iterations of no layer": (
        {"unroll": 0},
        ValueError,
        "got unroll=0, expected a whole number of layers from 1",
    ),
    "stored layers a truth": (
        {"stored_layers": True},
        ValueError,
        "got stored_layers=True, expected a whole number from 0 to 3",
    ),
    "unroll a truth": ({"unroll": True}, ValueError, "got unroll=True, expected a whole number"),
    "length a truth": ({"length": True}, TypeError, "got length=True, expected a whole number"),
    "a function as a layer": (
        {"layer": double},
        TypeError,
        "got double as a layer, expected one with `forward`: what `reversible_block",
    ),
    "what builds a layer": (
        {"layer": reversible_block},
        TypeError,
        "got reversible_block as a layer, expected one with `forward`",
    ),
    "a layer's class": ({"layer": Invertible}, TypeError, "got Invertible as a layer, expected"),
    "complex update of a real stream": (
        {"layer": reversible_block(lambda p, x, c: jax.lax.complex(x, x), double)},
        ValueError,
        r"returned complex64\[4\], expected real numbers for a stream of them, float32\[4\]",
    ),
    "complex update of an integrator": (
        {
            "layer": bdia_block(lambda p, x, c: jax.lax.complex(x, x), double),
            "data_L": {"gamma": jnp.full((3, 2), 0.5)},
        },
        ValueError,
        r"returned complex64\[4\], expected real numbers",
    ),
    "an update that is no array": (
        {"layer": reversible_block(lambda p, x, c: object(), double)},
        TypeError,
        "a branch returned something of type object, expected arrays",
    ),
    "an auxiliary output that is no array": (
        {"layer": reversible_block(*[lambda p, x, c: (x, "hello")] * 2, has_aux=True)},
        TypeError,
        "a branch returned something of type str, expected arrays",
    ),
    "gamma for one half-step": (
        {"layer": bdia_block(double, double), "data_L": {"gamma": jnp.full((3, 1), 0.5)}},
        ValueError,
        "got 1 gammas for a layer, expected 2, one for each half-step",
    ),
    "gamma for none": (
        {"layer": bdia_block(double, double), "data_L": {"gamma": jnp.full(3, 0.5)}},
        ValueError,
        "got 0 gammas for a layer, expected 2",
    ),
    "gamma of another shape": (
        {"layer": bdia_block(double, double), "data_L": {"gamma": jnp.full((3, 2, 7), 0.5)}},
        ValueError,
        r"got gamma float32\[7\], expected a shape that broadcasts to a stream float32\[4\]",
    ),
    "gamma of more axes": (
        {"layer": bdia_block(double, double), "data_L": {"gamma": jnp.full((3, 2, 1, 4), 0.5)}},
        ValueError,
        r"got gamma float32\[1,4\], expected a shape that broadcasts",
    ),
    "update no function": ({"update": "sgd"}, TypeError, "got update='sgd', expected a function"),
    "a state without an update": (
        {"state_L": jnp.ones(3)},
        ValueError,
        "got state_L float32.3. but no `update`, expected both",
    ),
    "a counter in the state": (
        {"state_L": {"count": jnp.ones(3, jnp.int32)}, "update": lambda d, s, p: (p, s)},
        ValueError,
        "got state_L.'count'. int32.3., expected floats .* Keep counters outside",
    ),
    "update of another shape": (
        {"layer": reversible_block(lambda p, x, c: x[:2] * p, double)},
        ValueError,
        r"returned float32\[2\], expected the shape of the stream it updates, float32\[4\]",
    ),
    "update of another structure": (
        {"layer": reversible_block(lambda p, x, c: {"u": x * p}, double)},
        ValueError,
        "expected the shape of the stream it updates",
    ),
}


@pytest.mark.parametrize("backprop", ["store", "reverse"])
@pytest.mark.parametrize("case", CASES)
def test_clear_error(case, backprop):
    changes, error, message = CASES[case]
    with pytest.raises(error, match=message) as caught:
        call(**({"backprop": backprop} | changes))
    assert "\n" not in str(caught.value)


def test_a_layer_that_changes_a_stream():
    from revnet_jax.core import PlainLayer

    layer = PlainLayer(lambda params, x, context: ((x[0][:2],), None))
    with pytest.raises(ValueError, match=r"maps stream 0 from float32\[4\] to float32\[2\]"):
        chain(layer, jnp.ones(3), X[:1], backprop="store")


@pytest.mark.parametrize("backprop", ["store", "remat", "reverse"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_closing_over_something_differentiated(backprop, wrap):
    def loss(weight):
        block = reversible_block(lambda p, x, c: x * weight, double)
        return jnp.sum(chain(block, PARAMS_L, X, backprop=backprop)[0][0])

    with pytest.raises(ValueError, match=r"closes over traced values \(float32\[\]\).*`shared`"):
        jax.grad(wrap(loss))(2.0)


def test_closing_over_constants_is_fine():
    mask = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    block = reversible_block(lambda p, x, c: x * mask * p, double)
    loss = jax.jit(lambda params_L: jnp.sum(chain(block, params_L, X)[0][0]))
    assert jnp.all(jax.grad(loss)(PARAMS_L)[0] != 0)


def swap(params, x, context):
    return x[1], x[0] * params


def unswap(params, y, context):
    return y[1] / params, y[0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_an_inverse_that_closes_over_something_traced(wrap):
    def invertible(weight):
        return Invertible(swap, lambda *args: (unswap(*args)[0] * weight, args[1][0])), jnp.ones(3)

    def block(weight):
        coupling = Coupling(lambda x, u, grid: (x + u, None), lambda y, u, _, grid: y - u * weight)
        return reversible_block(double, double, coupling=coupling), PARAMS_L

    for make in (invertible, block):
        loss = lambda weight, make=make: jnp.sum(chain(*make(weight), X)[0][0])
        with pytest.raises(
            ValueError, match=r"closes over traced values \(float32\[\]\).*`shared`"
        ):
            jax.grad(wrap(loss))(2.0)


@pytest.mark.parametrize(
    ("undo", "message"),
    [
        (
            lambda p, y, c: y[:1],
            r"returned float32\[4\], expected what it undoes, float32\[4\], fl",
        ),
        (lambda p, y, c: list(unswap(p, y, c)), "returned streams of type list, expected a plain"),
        (
            lambda p, y, c: (y[1].astype(jnp.float16), y[0]),
            r"returned float16\[4\], float32\[4\], ",
        ),
    ],
)
def test_what_an_inverse_returns(undo, message):
    layer = Invertible(swap, undo)
    with pytest.raises((TypeError, ValueError), match=f"the inverse of the Invertible {message}"):
        chain(layer, jnp.ones(3), X)
    chain(layer, jnp.ones(3), X, backprop="store")  # which has no use for it


def test_what_an_unmerge_returns():
    coupling = Coupling(lambda x, u, grid: (x + u, None), lambda y, u, residue, grid: y[:1])
    message = (
        r"a coupling's unmerge returned float32\[1\], .*, expected what it undoes, float32\[4\]"
    )
    with pytest.raises(ValueError, match=message):
        call(layer=reversible_block(double, double, coupling=coupling))


def test_whole_numbers_may_be_of_numpy():
    call(stored_layers=np.int64(1), length=np.int64(3), unroll=np.int32(2))


def test_inverse_checks_its_arguments_too():
    with pytest.raises(ValueError, match="got 1 streams, expected the 2"):
        sequence_inverse([Section(BLOCK, PARAMS_L)], X[:1])


def test_a_sequence_may_be_generated():
    sections = [Section(BLOCK, PARAMS_L)] * 2
    y, _, residues = sequence_forward(iter(sections), X)
    assert all(map(jnp.array_equal, y, sequence(sections, X)[0]))
    assert all(map(jnp.array_equal, y, sequence(iter(sections), X)[0]))
    assert all(map(jnp.array_equal, X, sequence_inverse(iter(sections), y, residues)))


@pytest.mark.parametrize("run", [sequence, sequence_forward, sequence_inverse])
def test_a_section_alone_is_no_sequence(run):
    with pytest.raises(TypeError, match=r"got a Section as a sequence, expected a list of them"):
        run(Section(BLOCK, PARAMS_L), X)


def test_a_sequence_takes_sections():
    with pytest.raises(TypeError, match="got a Block in a sequence, expected Section"):
        sequence([BLOCK], X)
    with pytest.raises(ValueError, match="got residues of 2 sections, expected 1"):
        sequence_inverse([Section(BLOCK, PARAMS_L)], X, (None, None))


@pytest.mark.parametrize(
    ("branch", "options", "message"),
    [
        (lambda p, x, c: (x * p, None), {}, "returned a tuple of 2.*say has_aux=True"),
        (double, {"has_aux": True}, r"has_aux=True returned a .*, expected a pair \(u, aux\)"),
        (
            double,
            {"coupling": Coupling(lambda x, u, grid: x + u, lambda y, u, residue, grid: y - u)},
            r"merge returned a .*, expected a pair \(y, residue\)",
        ),
    ],
)
def test_what_a_branch_and_a_coupling_return(branch, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(layer=reversible_block(branch, branch, **options))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda d, s, p: p[0], r"update returned a .*, expected a pair \(params, state\)"),
        (lambda d, s, p: (p, p), "another structure than .* pass its state"),
        (
            lambda d, s, p: ((p[0], p[1][None]), s),
            r"update returned params\[1\] float32\[1\], expected float32\[\]: new values",
        ),
        (
            lambda d, s, p: ((p[0].astype(jnp.float16), p[1]), s),
            r"update returned params\[0\] float16\[\], expected float32\[\]: new values",
        ),
        (lambda d, s, p: ((p[0], "p"), s), "update returned something of type str, expected arr"),
    ],
)
def test_what_an_update_returns(update, message):
    loss = lambda params_L: jnp.sum(call(params_L=params_L, update=update)[0][0])
    with pytest.raises((TypeError, ValueError), match=message):
        jax.grad(loss)(PARAMS_L)


def test_an_update_of_another_state():
    update = lambda dparams, state, params: (params, {"rate": state["rate"][None]})
    message = r"update returned state\['rate'\] float32\[1\], expected float32\[\]"
    state_L = {"rate": jnp.ones(3)}
    loss = lambda params_L: jnp.sum(call(params_L=params_L, update=update, state_L=state_L)[0][0])
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(PARAMS_L)


def test_a_learning_rate_that_is_traced():
    """What is traced outside of `jax.grad` outlives the backward pass, and may be closed over."""

    def loss(params_L, rate):
        update = lambda d, s, p: (jax.tree.map(lambda p, d: p - rate * d, p, d), s)
        y, _ = call(params_L=params_L, update=update)
        return jnp.sum(y[0] * y[1])

    new = jax.jit(jax.grad(loss))(PARAMS_L, 0.1)
    assert all(map(jnp.array_equal, new, jax.grad(loss)(PARAMS_L, 0.1)))
    message = (
        r"update closes over traced values \(float32\[\]\).*in the state \(state_L.*jit the whole"
    )
    with pytest.raises(ValueError, match=message):
        jax.grad(jax.jit(loss))(PARAMS_L, 0.1)


@pytest.mark.parametrize("together", [jax.vmap, lambda f: lambda xs: jax.lax.map(f, xs)])
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_a_learning_rate_that_is_traced_inside_of_grad(together, jit):
    """What a `vmap` or `scan` traces within `jax.grad` is gone in the backward pass, too."""

    def loss(params_L, rates):
        def one(rate):
            new = lambda params, dparams: jax.vmap(lambda p, d: p - rate * d)(params, dparams)
            update = lambda d, s, p: (jax.tree.map(new, p, d), s)
            y, _ = chain(BLOCK, params_L, (jnp.ones(2),) * 2, update=update)
            return jnp.sum(y[0] * y[1])

        return jnp.sum(together(one)(rates))

    wide_L = (jnp.ones((3, 2)),) * 2
    with pytest.raises(ValueError, match=r"update closes over traced values \(float32\[\]\)"):
        jit(jax.grad(loss))(wide_L, jnp.ones(3))


def test_a_learning_rate_of_each_example_around_grad():
    def new_params(rate):
        update = lambda d, s, p: (jax.tree.map(lambda p, d: p - rate * d, p, d), s)
        loss = lambda params_L: jnp.sum(call(params_L=params_L, update=update)[0][0])
        return jax.grad(loss)(PARAMS_L)[0]

    together = jax.vmap(new_params)(jnp.asarray([0.0, 0.5]))
    np.testing.assert_array_equal(together[0], PARAMS_L[0])
    np.testing.assert_array_equal(together[1], new_params(jnp.float32(0.5)))


def test_arrays_of_numpy_are_those_of_jax():
    """Its default is float64, which JAX has not unless told so."""
    rng = np.random.default_rng(0)
    params_L, x = (tuple(rng.normal(size=shape) for _ in range(2)) for shape in ((3,), (4,)))
    y, _ = call(params_L=params_L, x=x, shared=np.float64(1))
    expected = jax.jit(lambda params_L, x: call(params_L=params_L, x=x)[0])(params_L, x)
    jax.tree.map(np.testing.assert_array_equal, y, expected)
    sections = [Section(BLOCK, params_L)]
    y, _, residues = sequence_forward(sections, x)
    rebuilt = sequence_inverse(sections, jax.tree.map(np.asarray, y), residues)
    true_x = BLOCK.grid.snap(jax.tree.map(jnp.asarray, x))
    jax.tree.map(np.testing.assert_array_equal, rebuilt, true_x)


@jax.tree_util.register_pytree_node_class
class Checked:
    """A pytree that looks at what it gets."""

    def __init__(self, weight):
        self.weight = weight
        assert weight.ndim < 9

    def tree_flatten(self):
        return (self.weight,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("where", ["params_L", "data_L", "shared", "state_L"])
def test_classes_that_refuse_placeholders(where):
    """Under `store` they will do; JAX's custom gradients put placeholders into them."""
    weight = Checked(jnp.ones(3))
    arguments = {where: (weight, weight) if where == "params_L" else weight}
    options = {"update": lambda d, s, p: (p, s)} if where == "state_L" else {}
    block = reversible_block(*[lambda params, x, context: x] * 2)
    run = lambda **options: call(layer=block, **arguments | options)
    message = r"class that rejects None .*'NoneType' object has no attribute 'ndim'.*constructor"
    with pytest.raises(TypeError, match=message) as caught:
        run(**options)
    assert "\n" not in str(caught.value)
    if not options:
        run(backprop="store")


def test_a_collective_over_an_axis_that_the_rewind_does_not_know():
    centred = lambda params, x, context: x - jax.lax.pmean(x * params, "batch")
    block = reversible_block(centred, centred)
    rows = (jnp.ones((2, 4)), jnp.ones((2, 4)))

    def total(params_L, backprop):
        one = lambda x: jnp.sum(chain(block, params_L, x, backprop=backprop)[0][0])
        return jnp.sum(jax.vmap(one, axis_name="batch")(rows))

    jax.grad(total)(PARAMS_L, "store")
    message = r"axis name: batch.*vmap\(grad\(loss\)\).*'store'"
    with pytest.raises(NameError, match=message) as caught:
        jax.grad(total)(PARAMS_L, "reverse")
    assert "\n" not in str(caught.value)

    def advised(params_L, backprop):
        one = lambda params_L, x: jnp.sum(chain(block, params_L, x, backprop=backprop)[0][0])
        return jax.vmap(jax.grad(one), (None, 0), axis_name="batch")(params_L, rows)

    jax.tree.map(
        np.testing.assert_array_equal, advised(PARAMS_L, "reverse"), advised(PARAMS_L, "store")
    )


def test_free_streams_may_be_narrow():
    block = reversible_block(double, double, grid=None)
    params_L = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), PARAMS_L)
    y, _ = chain(block, params_L, (jnp.ones(4, jnp.float16),) * 2)
    assert y[0].dtype == jnp.float16
    assert Grid(8).limit(jnp.float32) == 2.0**16


@jax.tree_util.register_pytree_node_class
class Arrayed(Checked):
    """A pytree that takes arrays only."""

    def __init__(self, weight):
        assert isinstance(weight, jax.Array)
        self.weight = weight


@pytest.mark.parametrize("where", ["params_L", "data_L", "shared"])
def test_classes_that_take_arrays_only(where):
    weight = Arrayed(jnp.ones(3))
    arguments = {where: (weight, weight) if where == "params_L" else weight}
    block = reversible_block(*[lambda params, x, context: x] * 2)
    call(layer=block, **arguments, backprop="store")
    with pytest.raises(TypeError, match="constructor"):
        call(layer=block, **arguments)


def test_numbers_are_streams_without_axes():
    rows = jnp.float32(1), jnp.float32(0)
    run = lambda x: chain(reversible_block(double, double), PARAMS_L, x)[0]
    assert run((1.0, 0.0)) == run(rows)
    with pytest.raises(TypeError, match=r"a stream int32\[\], expected floating point"):
        run((1, 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: keeping_operands(Invertible(double, double)),
            "got a Invertible, expected a Block, which has branches",
        ),
        (
            lambda: Invertible(lambda p, x: x, double),
            r"got a branch <lambda>\(p, x\), expected one",
        ),
        (lambda: Block((double, double)), "got half-steps .*, expected HalfSteps, at least one"),
        (lambda: scale_on_grid("0.5", Grid()), "got scale='0.5', expected"),
        (
            lambda: call(layer=Invertible(lambda p, x, c: (*x, 0), double, has_aux=True)),
            r"apply returned a .*, expected a pair \(y, aux\)",
        ),
    ],
)
def test_parts_of_layers(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


@pytest.mark.parametrize("run", [sequence, sequence_forward, sequence_inverse])
def test_data_have_no_gradient(run):
    scaled_by_data = lambda params, x, context: x * params * context.data
    block = reversible_block(scaled_by_data, scaled_by_data)

    def loss(data_L):
        found = run([Section(block, PARAMS_L, data_L)], X)
        return jnp.sum(jax.tree.leaves(found)[0])

    assert jnp.array_equal(jax.grad(loss)(jnp.ones(3)), jnp.zeros(3))


def test_a_stream_is_not_weakly_typed():
    """Once rebuilt it would not take the dtype of what it meets."""
    kept, x = [], (jnp.full(4, 0.5),) * 2

    def branch(params, x, context):
        kept.append((x * params).dtype)
        return x * params

    params_L = (jnp.ones(1, jnp.bfloat16),) * 2
    layer = reversible_block(branch, branch, grid=None)
    with jax.numpy_dtype_promotion("standard"):
        jax.grad(lambda p: jnp.sum(chain(layer, p, x)[0][0]))(params_L)
    assert set(kept) == {jnp.dtype("float32")}
