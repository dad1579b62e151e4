"""Frozen parameters: what `jax.grad` is not asked for is not computed by a chain either."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    Exactness,
    Invertible,
    PlainLayer,
    Section,
    chain,
    reversible_block,
    sequence,
    trees,
)
from revnet_jax.programs.counts import arithmetic
from tests import by_default
from tests.core import toy

DEPTH = 4
WAYS = [
    {"backprop": "store"},
    {"backprop": "remat"},
    {"backprop": "reverse"},
    {"backprop": "reverse", "unroll": 2},
    {"backprop": "reverse", "stored_layers": 2},
]
some_ways = pytest.mark.parametrize("way", by_default(WAYS, WAYS[2]), ids=str)
# Trained: b of f only, so that both square matrices of f and that of g are frozen.
TRAINED = ({"w": False, "b": True, "v": False}, {"w": False})


def loss_of(trained, frozen, others, way):
    x, shared, data_L = others
    params = trees.join(trained, frozen)
    return toy.loss(*chain(toy.block(), params, x, shared=shared, data_L=data_L, **way))


def divided(dtype="float32"):
    params, *others = toy.arguments(DEPTH, dtype)
    return params, trees.partition(params, TRAINED), others


@some_ways
def test_the_gradient_is_that_of_all_parameters_without_the_frozen(way):
    with jax.enable_x64():
        params, (trained, frozen), others = divided("float64")
        nothing = jax.tree.map(lambda _: None, params)
        full = toy.jit(jax.grad(lambda p: loss_of(p, nothing, others, way)))(params)
        for grad in (
            toy.jit(jax.grad(lambda t, f: loss_of(t, f, others, way))),
            jax.grad(jax.jit(lambda t, f: loss_of(t, f, others, way))),
        ):
            found = grad(trained, frozen)
            assert jax.tree.structure(found) == jax.tree.structure(trained)
            assert toy.relative_error(found, trees.like(trained, full)) < 1e-13


@some_ways
def test_products_for_frozen_kernels_are_not_computed(way):
    """One product less for each frozen matrix of a layer: that of its cotangent."""
    params, (trained, frozen), others = divided()
    nothing = jax.tree.map(lambda _: None, params)
    flops = lambda function, *args: arithmetic(jax.jit(function).trace(*args).jaxpr, platform="cpu")
    full = flops(jax.grad(lambda p: loss_of(p, nothing, others, way)), params)
    part = flops(jax.grad(lambda t, f: loss_of(t, f, others, way)), trained, frozen)
    assert full - part == 3 * DEPTH * 2 * toy.ROWS * toy.WIDTH**2


def test_gradients_of_frozen_parameters_are_not_stacked():
    """No array of the shape of all frozen kernels is made, in the whole jaxpr."""
    params, (trained, frozen), others = divided()
    stack, way = f":f32[{DEPTH},{toy.WIDTH},{toy.WIDTH}] = ", {"backprop": "reverse"}
    program = lambda grad, *args: str(jax.make_jaxpr(grad)(*args))
    assert stack not in program(jax.grad(lambda t, f: loss_of(t, f, others, way)), trained, frozen)
    nothing = jax.tree.map(lambda _: None, params)
    assert stack in program(jax.grad(lambda p: loss_of(p, nothing, others, way)), params)


def test_the_update_gets_the_trained_parameters_only():
    params, (trained, frozen), (x, shared, data_L) = divided()
    state = jax.tree.map(jnp.ones_like, trained)
    seen = []

    def update(dparams, state, params):
        seen.append(jax.tree.structure((dparams, state, params)))
        move = lambda p, d, s: p - 0.1 * s * d
        return jax.tree.map(move, params, dparams, state), jax.tree.map(lambda s: s + 1, state)

    def loss(trained, state, **options):
        args = {"shared": shared, "data_L": data_L, "state_L": state, **options}
        return toy.loss(*chain(toy.block(), trees.join(trained, frozen), x, **args))

    new, new_state = toy.jit(jax.grad(lambda t, s: loss(t, s, update=update), (0, 1)))(
        trained, state
    )
    grad = toy.jit(jax.grad(lambda t: loss(t, None)))(trained)
    expected = jax.tree.map(lambda p, d: p - 0.1 * d, trained, grad)
    assert toy.relative_error(new, expected) < 1e-6
    assert all(np.all(leaf == 2) for leaf in jax.tree.leaves(new_state))
    one = jax.tree.structure(trained)
    assert set(seen) == {jax.tree.structure((trained, state, trained))}
    assert one.num_leaves == 1
    with pytest.raises(ValueError, match="update returned trees of another structure"):
        jax.grad(lambda t, s: loss(t, s, update=lambda d, s, p: (params, s)))(trained, state)


class OwnLayer:
    """y = w x, then + b, with w frozen: a class of the caller's own, by the protocol."""

    def forward(self, params, x, context):
        w, b = params
        return (w * x[0] + b,), None, None

    def inverse(self, params, y, residue, context):
        w, b = params
        return ((y[0] - b) / w,)

    def rewind(self, params, y, dy, daux, residue, context):
        (x,) = self.inverse(params, y, residue, context)
        w, _ = params
        return (x,), (w * dy[0],), (jnp.sum(x * dy[0]), jnp.sum(dy[0])), None


def scaled(params, x, context):
    w, b = params
    return (w * x[0] + b,)


def unscaled(params, y, context):
    w, b = params
    return ((y[0] - b) / w,)


@pytest.mark.parametrize(
    "layer",
    [
        OwnLayer(),
        Invertible(scaled, unscaled),
        PlainLayer(lambda params, x, context: (scaled(params, x, context), None)),
    ],
    ids=["own", "invertible", "plain"],
)
def test_other_layers(layer):
    """Under `reverse`, or the mixture that a layer without an inverse allows."""
    with jax.enable_x64():
        w, b = jnp.array([0.5, 2.0, 4.0]), jnp.array([0.1, 0.2, 0.3])
        x = (jnp.arange(4.0),)
        options = {"backprop": "remat", "stored_layers": 1}
        if not isinstance(layer, PlainLayer):
            options = {"backprop": "reverse"}

        def loss(w, b, **options):
            (y,), _ = chain(layer, (w, b), x, **options)
            return jnp.sum(jnp.sin(y))

        expected = jax.grad(lambda b: loss(w, b, backprop="store"))(b)
        found = jax.grad(lambda b: loss(w, b, **options))(b)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_one_of_two_sections_is_frozen():
    """A frozen section is still rewound, exactly, and the check says so."""
    branch = lambda params, x, context: jnp.tanh(x @ params)
    layer = reversible_block(branch, branch)
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    first, second = ((normal(i, 2, 6, 6), normal(i + 1, 2, 6, 6)) for i in (0, 2))
    x = (normal(4, 5, 6), normal(5, 5, 6))

    def loss(trained, x, probe, **options):
        sections = (Section(layer, first), Section(layer, trained))
        y, _ = sequence(sections, x, probe=probe, **options)
        return jnp.sum(jnp.sin(y[0]) * y[1])

    grad = toy.jit(jax.grad(lambda t, x, p: loss(t, x, p), (0, 1, 2)))
    dparams, dx, found = grad(second, x, Exactness.probe())
    stored = jax.grad(lambda t, x: loss(t, x, None, backprop="store"), (0, 1))(second, x)
    assert toy.relative_error((dparams, dx), stored) < 1e-5
    assert found.mismatches == 0
    assert found.max_abs > 0
