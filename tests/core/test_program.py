"""What is claimed of memory and arithmetic, read off the compiled program."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from revnet_jax.core import GATHERED, STRATEGIES, Exactness, Grid, chain, reversible_block
from revnet_jax.programs.counts import arithmetic
from tests import thorough

WIDTH, ROWS = 32, 128


def branch(params, x, context):
    return jnp.tanh(x @ params)


def compiled_gradient(backprop, depth, *, probe=False, grid=Grid(), **options):
    block = reversible_block(branch, branch, grid=grid)

    def loss(params_L, x, probe):
        y, _ = chain(block, params_L, x, backprop=backprop, probe=probe, **options)
        return jnp.sum(y[0] * y[1])

    params_L = (jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32),) * 2
    x = (jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),) * 2
    probe = jax.eval_shape(Exactness.probe) if probe else None
    argnums = (0, 2) if probe is not None else 0
    return jax.jit(jax.grad(loss, argnums=argnums)).lower(params_L, x, probe).compile()


def temporary_bytes(*args, **kwargs):
    """Weights are arguments and their gradients outputs; neither counts."""
    return compiled_gradient(*args, **kwargs).memory_analysis().temp_size_in_bytes


def test_memory_of_reverse_does_not_depend_on_depth():
    shallow, deep = temporary_bytes("reverse", 4), temporary_bytes("reverse", 64)
    assert abs(deep - shallow) <= 0.01 * shallow


def test_memory_of_store_and_remat_is_linear_in_depth():
    """remat keeps two streams a layer; store also keeps what each branch computed."""
    stream_bytes = ROWS * WIDTH * 4
    for backprop, least_streams in (("store", 4), ("remat", 2)):
        few, some, many = (temporary_bytes(backprop, depth) for depth in (4, 34, 64))
        assert many - some == pytest.approx(some - few, rel=0.01)
        per_layer = (many - few) / 60
        assert per_layer >= least_streams * stream_bytes
        if backprop == "remat":
            assert per_layer == pytest.approx(2 * stream_bytes, rel=0.01)


def test_the_exactness_check_keeps_one_chain_input():
    """Both streams at the input, and one of the layer whose range is measured, at any depth."""
    extra = [
        temporary_bytes("reverse", depth, probe=True) - temporary_bytes("reverse", depth)
        for depth in (4, 64)
    ]
    assert extra[0] == extra[1] <= 3 * ROWS * WIDTH * 4 + 1024


@pytest.mark.parametrize(("backprop", "products_per_layer"), [("store", 3), ("reverse", 4)])
def test_each_branch_is_evaluated_once_in_the_backward_loop(backprop, products_per_layer):
    """Per product of f: one forward, two backward, and one to recompute and undo together."""
    text = compiled_gradient(backprop, 8).as_text()
    # On CPU a product is a `dot` or, where a library takes it over, a custom call.
    products = re.findall(r"= f32\[[\d,]*\]\S* (?:dot|custom-call)\(", text)
    assert len(products) == products_per_layer * 2


@pytest.mark.parametrize("backprop", STRATEGIES)
@pytest.mark.parametrize("depth", [1, 6])
def test_no_strategy_keeps_gathered_weights(backprop, depth):
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    parts = jax.NamedSharding(mesh, P(None, "fsdp"))

    def branch(params, x, context):
        whole = jax.lax.with_sharding_constraint(params.astype(jnp.bfloat16), P())
        return jnp.tanh(x.astype(jnp.bfloat16) @ checkpoint_name(whole, GATHERED))

    def loss(params_L):
        block = reversible_block(branch, branch)
        y, _ = chain(block, params_L, x, backprop=backprop, stored_layers=depth // 2)
        return jnp.sum(y[0] * y[1])

    with jax.set_mesh(mesh):
        params_L = (jax.device_put(jnp.ones((depth, WIDTH, WIDTH)), parts),) * 2
        x = (jnp.ones((4, WIDTH)),) * 2
        _, pullback = jax.vjp(loss, params_L)
        text = jax.jit(jax.grad(loss)).lower(params_L).compile().as_text()
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[-2:] == (WIDTH, WIDTH)]
    assert {leaf.dtype for leaf in kept} <= {jnp.dtype("float32")}
    # Both branches gather in the forward pass. In the backward pass the first may need no weights.
    assert text.count(" all-gather(") >= 3


def test_no_loop_is_unrolled_and_nothing_is_compiled_per_layer():
    few, many = (compiled_gradient("reverse", depth).as_text() for depth in (4, 64))
    assert few.count(" = ") == many.count(" = ")  # instructions; the text also lists stack frames
    assert len(re.findall(r" while\(", many)) == 2


@pytest.mark.parametrize(("options", "loops"), [({}, 2), ({"unroll": 8}, 0), ({"unroll": 9}, 0)])
def test_without_a_loop_what_is_stored_is_not_stacked(options, loops):
    text = compiled_gradient("store", 8, **options).as_text()
    assert len(re.findall(r" while\(", text)) == loops
    stacks = re.findall(rf"f32\[8,{ROWS},{WIDTH}\]", text)
    assert bool(stacks) == bool(loops)


def test_layers_that_recompute_are_never_unrolled():
    rolled, unrolled = (compiled_gradient("remat", 8, unroll=n).as_text() for n in (1, 8))
    assert rolled.count(" = ") == unrolled.count(" = ")


def test_without_loops_no_more_than_gradients_is_held_of_several_layers():
    """Until they are stacked; what is rebuilt, four times as much here, is not."""
    few, many = (compiled_gradient("reverse", depth, unroll=depth) for depth in (8, 16))
    assert not re.findall(r" while\(", many.as_text())
    few, many = (program.memory_analysis().temp_size_in_bytes for program in (few, many))
    gradient_bytes = 2 * WIDTH * WIDTH * 4
    assert many - few <= 8 * 1.1 * gradient_bytes < 8 * 2 * ROWS * WIDTH * 4


def test_layers_that_are_updated_stay_in_a_loop():
    """Outside of one their new weights would be held beside the old."""
    block = reversible_block(branch, branch)

    def compiled(depth):
        def loss(params_L, x):
            update = lambda dparams, state, params: (params - dparams, state)
            updates = lambda *trees: tuple(zip(*map(update, *trees), strict=True))
            options = {"update": updates, "state_L": (jnp.zeros(depth),) * 2, "unroll": depth}
            y, _ = chain(block, params_L, x, **options)
            return jnp.sum(y[0] * y[1])

        params_L = (jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32),) * 2
        x = (jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),) * 2
        step = jax.jit(jax.grad(loss), donate_argnums=0)
        return step.lower(params_L, x).compile().memory_analysis().temp_size_in_bytes

    assert compiled(32) - compiled(8) < WIDTH * WIDTH * 4


def test_cotangents_of_streams_are_added_up_where_branches_are_differentiated():
    """Nothing else of a stream's size is added but in merges, whose results nobody reads."""
    block = reversible_block(branch, branch, grid=None)

    def loss(params_L, x):
        y, _ = chain(block, params_L, x)
        return jnp.sum(y[0] * y[1])

    params_L = (jnp.zeros((4, WIDTH, WIDTH)),) * 2
    program = jax.make_jaxpr(jax.grad(loss))(params_L, (jnp.zeros((ROWS, WIDTH)),) * 2)
    loops = [e for e in program.eqns if e.primitive.name == "scan"]
    adds = [e for e in loops[-1].params["jaxpr"].eqns if e.primitive.name in ("add", "add_any")]
    assert len([e for e in adds if e.outvars[0].aval.shape == (ROWS, WIDTH)]) == 2


@pytest.mark.parametrize(
    "options", [{"backprop": "store"}, thorough({"stored_layers": 5}), thorough({})]
)
def test_an_unrolled_gradient_is_the_same_to_the_bit(options):
    block = reversible_block(branch, branch)

    def gradient(unroll):
        def loss(params_L, x):
            y, _ = chain(block, params_L, x, unroll=unroll, **options)
            return jnp.sum(y[0] * y[1])

        keys = jax.random.split(jax.random.key(0), 4)
        params_L = tuple(0.1 * jax.random.normal(key, (6, WIDTH, WIDTH)) for key in keys[:2])
        x = tuple(jax.random.normal(key, (ROWS, WIDTH)) for key in keys[2:])
        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params_L, x))

    expected = gradient(1)
    for unroll in (4, 6):
        assert all(map(jnp.array_equal, gradient(unroll), expected))


def test_every_stored_layer_saves_its_recompute():
    """Products of the gradient: two branches' forward and backward, and again what is reversed."""
    depth, product = 12, 2 * ROWS * WIDTH**2

    def products(stored_layers):
        def loss(params_L, x):
            block = reversible_block(branch, branch)
            y, _ = chain(block, params_L, x, stored_layers=stored_layers)
            return jnp.sum(y[0] * y[1])

        params_L = (jnp.ones((depth, WIDTH, WIDTH)),) * 2
        x = (jnp.ones((ROWS, WIDTH)),) * 2
        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params_L, x)
        return arithmetic(program, platform="cpu") / product

    for m in (0, 1, 5, 11):
        assert products(m) == 6 * depth + 2 * (depth - m)
    assert products(depth) == 6 * depth


def test_an_update_in_the_sweep_is_in_place():
    """No gradient of the whole chain, no second copy of its parameters and moments."""

    def temporary_bytes(depth):
        def loss(params_L, moments_L, x):
            block = reversible_block(branch, branch)
            y, _ = chain(block, params_L, x, update=update, state_L=moments_L)
            return jnp.sum(y[0] * y[1])

        def update(dparams, moments, params):
            moments = jax.tree.map(lambda m, d: 0.9 * m + d, moments, dparams)
            return jax.tree.map(lambda p, m: p - 0.1 * m, params, moments), moments

        params_L = (jax.ShapeDtypeStruct((depth, WIDTH, WIDTH), jnp.float32),) * 2
        x = (jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),) * 2
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), donate_argnums=(0, 1))
        program = step.lower(params_L, params_L, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) <= 1.01 * temporary_bytes(4)
