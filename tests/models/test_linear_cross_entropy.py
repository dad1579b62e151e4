"""The loss over a vocabulary: the naive form's value and derivatives, with each logit made once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.models.transformer.linear_cross_entropy import linear_cross_entropy
from tests import by_default

M, D = 21, 6


def naive(kernel_DV, x_MD, weight_M, target_M, dtype=jnp.float64):
    x, kernel = x_MD.astype(dtype), kernel_DV.astype(dtype)
    logits_MV = jnp.matmul(x, kernel, preferred_element_type=x_MD.dtype)
    true_M = jnp.take_along_axis(logits_MV, target_M[:, None], axis=1)[:, 0]
    return jnp.sum(weight_M * (jax.nn.logsumexp(logits_MV, axis=1) - true_M))


def ours(kernel_DV, x_MD, weight_M, target_M, dtype=jnp.float64, chunk=8):
    return linear_cross_entropy(
        kernel_DV, x_MD, target_M, weight_M, compute_dtype=dtype, chunk=chunk
    )


def inputs(V, dtype=jnp.float64, width=D, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    kernel_DV = scale * jax.random.normal(keys[0], (width, V), dtype)
    x_MD = jax.random.normal(keys[1], (M, width), dtype)
    weight_M = jax.random.uniform(keys[2], (M,), dtype)
    return kernel_DV, x_MD, weight_M, jax.random.randint(keys[3], (M,), 0, V)


def derivatives(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


@pytest.mark.parametrize("V", [17, 2000, 2048])  # the second is padded
@pytest.mark.parametrize("chunk", by_default([1, 8, 64], 8))
def test_value_and_gradient_are_the_naive_ones(V, chunk):
    with jax.enable_x64(True):
        arguments = inputs(V)
        value, gradients = derivatives(functools.partial(ours, chunk=chunk))(*arguments)
        expected, expected_gradients = derivatives(naive)(*arguments)
        alone = ours(*arguments, chunk=chunk)  # without a derivative
    np.testing.assert_allclose([value, alone], [expected] * 2, rtol=1e-13)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.thorough
def test_derivatives_of_any_order_and_mode():
    with jax.enable_x64(True):
        *arguments, target_M = inputs(17)
        moves = [jnp.sin(leaf) for leaf in arguments]
        found = []
        for loss in (ours, naive):
            loss = functools.partial(loss, target_M=target_M)
            _, forward = jax.jvp(loss, arguments, moves)
            _, of_gradient = jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), arguments, moves)
            found.append([forward, *of_gradient])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-12)


def test_losses_are_scaled_and_batched():
    with jax.enable_x64(True):
        kernel_DV, x_MD, weight_M, target_M = inputs(17)
        rows = lambda loss: (
            lambda x_MD, target_M: (
                3 * loss(kernel_DV, x_MD[None], weight_M[:1], target_M[None]) ** 2
            )
        )
        of_each = lambda loss: jax.vmap(jax.grad(rows(loss)))(x_MD, target_M)
        got, want = of_each(ours), of_each(naive)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_naive_form():
    V, width = 300, 64
    with jax.enable_x64(True):
        exact = inputs(V, width=width, scale=width**-0.5)
        _, truth = derivatives(naive)(*exact)
        rounded = [leaf.astype(jnp.float32) for leaf in exact[:3]]
        errors = []
        for loss in (ours, naive):
            _, got = derivatives(functools.partial(loss, dtype=jnp.bfloat16))(*rounded, exact[3])
            pairs = [map(np.asarray, pair) for pair in zip(got, truth, strict=True)]
            errors.append([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    for ours_error, naive_error in zip(*errors, strict=True):
        assert 0 < ours_error < 1.2 * naive_error


def test_each_logit_is_computed_once_and_no_index_is_looked_up():
    shapes = jax.eval_shape(lambda: inputs(2000, jnp.float32))
    loss = functools.partial(ours, dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes))
    assert text.count("dot_general[") == 3
    assert "gather" not in text
    assert "scatter" not in text
    assert "2048]" in text


@pytest.mark.parametrize("kernel", by_default(["float32", "bfloat16", "float16"], "bfloat16"))
@pytest.mark.parametrize("x", ["float32", "bfloat16"])
def test_kernels_and_features_may_have_other_dtypes(kernel, x):
    kernel_DV, x_MD, weight_M, target_M = inputs(17, jnp.float32)
    kernel_DV, x_MD = kernel_DV.astype(kernel), x_MD.astype(x)
    loss = functools.partial(ours, dtype=jnp.float32)
    value, (dkernel_DV, dx_MD, _) = derivatives(loss)(kernel_DV, x_MD, weight_M, target_M)
    expected = naive(
        kernel_DV.astype(jnp.float32), x_MD.astype(jnp.float32), weight_M, target_M, jnp.float32
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)  # sums are in float32
    assert (value.dtype, dkernel_DV.dtype, dx_MD.dtype) == (jnp.float32, kernel, x)


def test_a_target_outside_the_vocabulary_is_not_a_number():
    kernel_DV, x_MD, weight_M, target_M = inputs(17, jnp.float32)
    for wrong in (-1, 17):
        assert jnp.isnan(ours(kernel_DV, x_MD, weight_M, target_M.at[3].set(wrong), jnp.float32))


def test_no_tokens_and_no_chunk():
    kernel_DV, x_MD, weight_M, target_M = inputs(17, jnp.float32)
    empty = x_MD[:0], weight_M[:0], target_M[:0]
    value, (dkernel_DV, dx_MD, _) = derivatives(functools.partial(ours, dtype=jnp.float32))(
        kernel_DV, *empty
    )
    assert value == 0
    assert not dkernel_DV.any()
    assert dx_MD.shape == (0, D)
    with pytest.raises(ValueError, match="got chunk=0, expected 1 token or more"):
        ours(kernel_DV, x_MD, weight_M, target_M, chunk=0)
