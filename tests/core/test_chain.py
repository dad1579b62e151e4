"""The three strategies are one function with one gradient, and it is the naive one's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    STRATEGIES,
    Block,
    Context,
    Exactness,
    Grid,
    HalfStep,
    PlainLayer,
    Section,
    additive,
    chain,
    reversible_block,
    sequence_inverse,
)
from tests import by_default
from tests.core import toy

DEPTHS = [1, 2, 3, 7, 64]


def chain_loss(params_L, x, scale, shared, data_L, backprop, grid=Grid()):
    shared = {**shared, "scale": scale}
    y, aux_L = chain(toy.block(grid), params_L, x, shared=shared, data_L=data_L, backprop=backprop)
    return toy.loss(y, aux_L)


def naive_loss(params_L, x, scale, shared, data_L):
    """The layers written out: no scan, no custom gradient, no grid."""
    (x1, x2), auxes = x, []
    for i in range(len(data_L["rate"])):
        params_f, params_g = jax.tree.map(lambda leaf, i=i: leaf[i], params_L)
        data = jax.tree.map(lambda leaf, i=i: leaf[i], data_L)
        context = Context({**shared, "scale": scale}, data)
        u, aux_f = toy.f(params_f, x2, context)
        x1 = x1 + u
        u, aux_g = toy.g(params_g, x1, context)
        x2 = x2 + u
        auxes.append((aux_f, aux_g))
    aux_L = jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)
    return toy.loss((x1, x2), aux_L)


@pytest.mark.parametrize("depth", by_default(DEPTHS, 3))
def test_gradient_equals_store(depth):
    """Values and gradients of params, streams and shared inputs, in float64 to 1e-10."""
    with jax.enable_x64(True):
        # Both kinds of PRNG keys: raw ones are integers with a cotangent type of their own.
        typed_keys = depth != 3
        params_L, x, shared, data_L = toy.arguments(depth, jnp.float64, typed_keys=typed_keys)
        args = params_L, x, shared["scale"], shared, data_L
        grad = toy.jit(jax.value_and_grad(chain_loss, argnums=(0, 1, 2)), static_argnums=5)
        true_value, true_grads = grad(*args, "store")
        for backprop in ("remat", "reverse"):
            value, grads = grad(*args, backprop)
            np.testing.assert_allclose(value, true_value, rtol=1e-12)
            for got, expected in zip(grads, true_grads, strict=True):
                assert toy.relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("backprop", STRATEGIES)
@pytest.mark.parametrize("depth", by_default([1, 3, 7], 3))
def test_gradient_equals_the_naive_program(depth, backprop):
    with jax.enable_x64(True):
        params_L, x, shared, data_L = toy.arguments(depth, jnp.float64)
        args = params_L, x, shared["scale"], shared, data_L
        naive_grad = toy.jit(jax.value_and_grad(naive_loss, argnums=(0, 1, 2)))
        true_value, true_grads = naive_grad(*args)
        grad = toy.jit(jax.value_and_grad(chain_loss, argnums=(0, 1, 2)), static_argnums=(5, 6))
        value, grads = grad(*args, backprop, None)
        np.testing.assert_allclose(value, true_value, rtol=1e-12)
        assert toy.relative_error(grads, true_grads) < 1e-10


@pytest.mark.parametrize("depth", by_default(DEPTHS, 1, 64))
def test_inverse_undoes_forward_bit_for_bit(depth):
    block = toy.block()
    params_L, x, shared, data_L = toy.arguments(depth)
    y, _ = toy.jit(lambda x: chain(block, params_L, x, shared=shared, data_L=data_L))(x)
    inverse = lambda y: sequence_inverse([Section(block, params_L, data_L)], y, shared=shared)
    for rebuilt, true in zip(toy.jit(inverse)(y), block.grid.snap(x), strict=True):
        np.testing.assert_array_equal(
            np.asarray(rebuilt).view(np.uint32), np.asarray(true).view(np.uint32)
        )


def test_a_loss_on_auxiliary_outputs_alone_has_a_gradient():
    params_L, x, shared, data_L = toy.arguments(3)

    def balance(params_L, backprop):
        _, aux_L = chain(toy.block(), params_L, x, shared=shared, data_L=data_L, backprop=backprop)
        return jnp.sum(aux_L[0]["moment"] ** 2)

    grad = toy.jit(jax.grad(balance), static_argnums=1)
    true_grad = grad(params_L, "store")
    assert np.any(true_grad[0]["w"] != 0)
    assert toy.relative_error(grad(params_L, "reverse"), true_grad) < 1e-5


def test_the_operation_before_the_chain_gets_its_gradient():
    """Custom gradients that only return what 'requires a gradient' drop the embedding's."""
    params_L, x, shared, data_L = toy.arguments(4)

    def loss(stem, backprop):
        inputs = tuple(stream * stem for stream in x)
        return chain_loss(params_L, inputs, shared["scale"], shared, data_L, backprop)

    grad = toy.jit(jax.grad(loss), static_argnums=1)
    got, expected = (grad(jnp.float32(0.7), backprop) for backprop in ("reverse", "store"))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got != 0


def test_integer_and_key_leaves_in_params_and_shared():
    """They have no cotangent, wherever they are."""

    def f(params, x, context):
        noise = jax.random.normal(context.shared["key"], x.shape)
        return jnp.tanh(x * params["w"]) * params["sign"].astype(jnp.float32) + noise

    block = reversible_block(f, f)
    branch = {"w": jnp.asarray([0.3, 0.5]), "sign": jnp.asarray([1, -1])}
    x = (jnp.ones(()), jnp.full((), 0.4))
    shared = {"key": jax.random.key(0)}

    def loss(w, backprop):
        params_L = ({**branch, "w": w}, branch)
        y, _ = chain(block, params_L, x, shared=shared, backprop=backprop)
        return y[0] * y[1]

    grad = toy.jit(jax.grad(loss), static_argnums=1)
    grads = [grad(branch["w"], backprop) for backprop in STRATEGIES]
    for grad in grads:
        np.testing.assert_allclose(grad, grads[0], rtol=1e-5)
    assert np.all(grads[0] != 0)


def test_three_streams_of_unequal_shape_and_a_merge_that_multiplies():
    """The types leave room for other couplings: rotate a stream's sign, streams as trees."""
    from revnet_jax.core import Coupling
    from revnet_jax.core.grid import snap

    flip = Coupling(
        merge=lambda x, u, grid: (snap(grid, u) - x, None),
        unmerge=lambda y, u, residue, grid: snap(grid, u) - y,
    )
    block = Block(
        (
            HalfStep(lambda p, b, c, _: (p * jnp.sum(c["v"]) + b[:2], None), 0, (1, 2), additive()),
            HalfStep(lambda p, a, _: (jnp.sin(p * jnp.sum(a)) * jnp.ones(3), None), 1, (0,), flip),
            HalfStep(lambda p, a, b, _: ({"v": p * a * b[:2]}, None), 2, (0, 1), additive()),
        )
    )
    params_L = tuple(jnp.linspace(0.1, 0.5, 5) + i for i in range(3))
    x = (jnp.asarray([0.5, 0.25]), jnp.asarray([1.0, 2.0, 3.0]), {"v": jnp.asarray([0.1, 0.2])})

    def loss(params_L, x, backprop):
        (a, b, c), _ = chain(block, params_L, x, backprop=backprop)
        return jnp.sum(a * c["v"]) + jnp.sum(jnp.cos(b))

    grad = toy.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    grads = {backprop: grad(params_L, x, backprop) for backprop in STRATEGIES}
    for backprop in ("remat", "reverse"):
        assert toy.relative_error(grads[backprop], grads["store"]) < 1e-5
    y, _ = chain(block, params_L, x)
    rebuilt = sequence_inverse([Section(block, params_L)], y)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, block.grid.snap(x))


@pytest.mark.parametrize("backprop", STRATEGIES)
def test_per_layer_data_is_not_differentiated(backprop):
    params_L, x, shared, data_L = toy.arguments(2)

    def loss(rate):
        data = {**data_L, "rate": rate}
        return chain_loss(params_L, x, shared["scale"], shared, data, backprop)

    np.testing.assert_array_equal(toy.jit(jax.grad(loss))(data_L["rate"]), [0.0, 0.0])


def test_probe_counts_what_was_not_rebuilt():
    """A branch that answers differently when asked again is caught; a pure one is not accused."""
    params_L, x, shared, data_L = toy.arguments(3)
    calls = []

    def impure(params, x, context):
        calls.append(1)
        return x * (0.5 + 1e-3 * len(calls))

    def exactness(block, params_L, **kwargs):
        def loss(probe):
            y, _ = chain(block, params_L, x, probe=probe, **kwargs)
            return jnp.sum(y[0])

        return toy.jit(jax.grad(loss))(Exactness.probe())

    good = exactness(toy.block(), params_L, shared=shared, data_L=data_L)
    assert good.mismatches == 0
    assert good.max_difference == 0
    assert 1 < good.max_abs < Grid().limit(jnp.float32)
    bad = exactness(reversible_block(impure, impure), (jnp.ones(3), jnp.ones(3)))
    assert bad.mismatches > toy.ROWS * toy.WIDTH
    assert bad.max_difference > 1e-3


def test_plain_layers_run_through_the_same_machinery():
    layer = PlainLayer(lambda params, x, context: ((jnp.tanh(x[0] * params),), jnp.max(x[0])))
    x, params_L = (jnp.linspace(-1, 1, 5),), jnp.linspace(0.5, 1.5, 4)

    def loss(params_L, backprop):
        (y,), aux_L = chain(layer, params_L, x, backprop=backprop)
        return jnp.sum(y) + jnp.sum(aux_L)

    grad = toy.jit(jax.grad(loss), static_argnums=1)
    store, remat = (grad(params_L, backprop) for backprop in ("store", "remat"))
    np.testing.assert_allclose(store, remat, rtol=1e-6)
    with pytest.raises(ValueError, match="got a PlainLayer to be reversed"):
        loss(params_L, "reverse")


def test_vmap_and_second_call_without_recompiling():
    with jax.enable_x64(True):
        params_L, x, shared, data_L = toy.arguments(2, jnp.float64)
        grad = toy.jit(jax.grad(chain_loss, argnums=1), static_argnums=5)
        one = grad(params_L, x, shared["scale"], shared, data_L, "reverse")
        grad(params_L, x, shared["scale"], shared, data_L, "reverse")
        assert grad._cache_size() == 1
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x)
        many = jax.vmap(grad, in_axes=(None, 0, None, None, None, None))(
            params_L, batch, shared["scale"], shared, data_L, "reverse"
        )
        assert toy.relative_error(jax.tree.map(lambda leaf: leaf[0], many), one) < 1e-12


def test_store_has_forward_mode_derivatives():
    params_L, x, shared, data_L = toy.arguments(2)
    loss = lambda scale: chain_loss(params_L, x, scale, shared, data_L, "store")
    tangent = toy.jit(lambda scale: jax.jvp(loss, (scale,), (jnp.ones_like(scale),))[1])
    gradient = toy.jit(jax.grad(loss))(shared["scale"])
    np.testing.assert_allclose(tangent(shared["scale"]), jnp.sum(gradient), rtol=1e-5)
