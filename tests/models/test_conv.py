import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.models.convolutional import conv as conv_module
from revnet_jax.models.convolutional.conv import conv
from tests import by_default


def lax_conv(x_BHWC, kernel, stride):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), "SAME", dimension_numbers=dims
    )


def operands(x_shape, kernel_shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=x_shape),
        rng.normal(size=kernel_shape) / np.prod(kernel_shape[:3]) ** 0.5,
    )
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def value_and_grads(f, x_BHWC, kernel):
    """y and both gradients, for a cotangent that differs at every element."""

    @jax.jit
    def run(x_BHWC, kernel):
        y_BHWC, pull = jax.vjp(f, x_BHWC, kernel)
        return y_BHWC, *pull(
            jnp.cos(jnp.arange(y_BHWC.size).astype(y_BHWC.dtype)).reshape(y_BHWC.shape)
        )

    return run(x_BHWC, kernel)


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", by_default([1, 3, 7], 3))
def test_equals_lax_conv_in_float64(size, stride):
    with jax.enable_x64(True):
        for (H, W), cin, cout in [((9, 6), 3, 4), ((2, 1), 2, 1)][: 1 if size == 7 else 2]:
            x_BHWC, kernel = operands((3, H, W, cin), (size, size, cin, cout), np.float64)
            got = value_and_grads(lambda x, k: conv(x, k, stride=stride), x_BHWC, kernel)
            want = value_and_grads(lambda x, k: lax_conv(x, k, stride), x_BHWC, kernel)
            for g, w in zip(got, want, strict=True):
                assert g.dtype == w.dtype == np.float64
                np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("column_bytes", "stride"), [(1, 1), (3000, 2), (1 << 30, 1)])
def test_any_chunking_of_the_batch_gives_the_same(column_bytes, stride, monkeypatch):
    monkeypatch.setattr(conv_module, "_COLUMN_BYTES", column_bytes)
    x_BHWC, kernel = operands((6, 5, 4, 3), (3, 3, 3, 2))
    got = value_and_grads(lambda x, k: conv(x, k, stride=stride), x_BHWC, kernel)
    want = value_and_grads(lambda x, k: lax_conv(x, k, stride), x_BHWC, kernel)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_bfloat16_is_summed_in_float32_and_rounded_once(size):
    x_BHWC, kernel = operands((4, 16, 16, 16), (size, size, 16, 16), jnp.bfloat16)
    got = value_and_grads(conv, x_BHWC, kernel)
    exact = (a.astype(jnp.float32) for a in (x_BHWC, kernel))
    y, pull = jax.vjp(lambda x, k: lax_conv(x, k, 1), *exact)
    dy = jnp.cos(jnp.arange(y.size).astype(jnp.bfloat16)).reshape(y.shape)
    for g, w in zip(got, (y, *pull(dy.astype(jnp.float32))), strict=True):
        assert g.dtype == jnp.bfloat16
        # One rounding to 8 bits costs 1.7e-3 of the norm; sums kept in bfloat16 several times that.
        assert relative_error(g, w) < 2.5e-3


def test_cpu_gradient_is_matrix_products():
    x_BHWC, kernel = operands((4, 8, 8, 4), (3, 3, 4, 4))
    grad = jax.jit(jax.grad(lambda x, k: jnp.square(conv(x, k)).sum(), (0, 1)))
    text = grad.lower(x_BHWC, kernel).compile().as_text()
    assert "dot(" in text
    assert text.count("convolution(") == 1  # the value


def test_tpu_gradient_is_xlas_convolution():
    x_BHWC, kernel = operands((4, 8, 8, 4), (3, 3, 4, 4))
    grad = jax.jit(jax.grad(lambda x, k: jnp.square(conv(x, k)).sum(), (0, 1)))
    text = grad.trace(x_BHWC, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3  # the value and two gradients
    assert "dot_general" not in text
    assert "concatenate" not in text


def test_residuals_are_the_operands():
    x_BHWC, kernel = operands((2, 8, 8, 4), (3, 3, 4, 4))
    _, pull = jax.vjp(conv, x_BHWC, kernel)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull)]
    assert sorted(kept) == sorted([x_BHWC.shape, kernel.shape])


def test_gradient_memory_of_a_layer_in_a_scan_is_its_input():
    def temp_bytes(depth):
        def loss(x_BHWC, kernel_L):
            y_BHWC, _ = lax.scan(lambda x, k: (x + conv(x, k), None), x_BHWC, kernel_L)
            return y_BHWC.sum()

        shapes = ((64, 16, 16, 8), (depth, 3, 3, 8, 8))
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    input_bytes = 64 * 16 * 16 * 8 * 4
    assert 0.9 < (temp_bytes(12) - temp_bytes(4)) / 8 / input_bytes < 1.1


def test_cpu_temporaries_do_not_grow_with_the_batch():
    def temp_bytes(batch):
        def pull(x, k, dy):
            return jax.vjp(conv, x, k)[1](dy)

        shapes = ((batch, 32, 32, 16), (3, 3, 16, 16), (batch, 32, 32, 16))
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(pull).lower(*args).compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(64), temp_bytes(256)
    assert large < 1.1 * small < 6 * 2**20  # the larger batch alone is 16 MiB


@pytest.mark.parametrize(("dtype", "stride"), [(jnp.float32, 1), (jnp.bfloat16, 2)])
def test_recompute_gives_the_same_bits(dtype, stride):
    """A forward loop's values equal those computed again in the loop that differentiates."""
    x_BHWC, kernel_L = operands((100, 8, 8, 16), (3, 3, 3, 16, 16), dtype)

    def f(x_BHWC, kernel):
        return conv(jax.nn.relu(x_BHWC), kernel, stride=stride)

    @jax.jit
    def forward(x_BHWC, kernel_L):
        return lax.scan(lambda x, k: (x * 0.5, f(x, k)), x_BHWC, kernel_L)[1]

    @jax.jit
    def recompute(x_BHWC, kernel_L):
        def step(x, kernel):
            y, pull = jax.vjp(f, x, kernel)
            return x * 0.5, (y, pull(jnp.ones_like(y)))

        return lax.scan(step, x_BHWC, kernel_L)[1]

    y_L, (again_L, _) = forward(x_BHWC, kernel_L), recompute(x_BHWC, kernel_L)
    np.testing.assert_array_equal(np.asarray(y_L, np.float32), np.asarray(again_L, np.float32))


def test_batch_sharded_over_devices_gives_the_same():
    x_BHWC, kernel = operands((8, 8, 8, 4), (3, 3, 4, 4))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x_sharded = jax.device_put(x_BHWC, NamedSharding(mesh, PartitionSpec("data")))
    kernel_sharded = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    got = value_and_grads(conv, x_sharded, kernel_sharded)
    for g, w in zip(got, value_and_grads(conv, x_BHWC, kernel), strict=True):
        assert relative_error(g, w) < 1e-6


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "dtypes", "stride", "match"),
    [
        ((2, 3, 8, 8), (3, 3, 3, 4), ("float32", "float32"), 1, "same Cin"),
        ((8, 8, 3), (3, 3, 3, 4), ("float32", "float32"), 1, "expected .B, H, W, Cin"),
        ((2, 8, 8, 3), (3, 3, 3, 4), ("bfloat16", "float32"), 1, "one floating dtype"),
        ((2, 8, 8, 3), (3, 3, 3, 4), ("int32", "int32"), 1, "one floating dtype"),
        ((2, 8, 8, 3), (3, 3, 3, 4), ("float32", "float32"), 0, "stride 0"),
    ],
)
def test_says_what_does_not_fit(x_shape, kernel_shape, dtypes, stride, match):
    with pytest.raises(ValueError, match=match):
        conv(jnp.zeros(x_shape, dtypes[0]), jnp.zeros(kernel_shape, dtypes[1]), stride=stride)
