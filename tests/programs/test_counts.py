"""The arithmetic of programs, against numbers worked out by hand and against XLA's own."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax._src.cudnn import fused_attention_stablehlo

from revnet_jax.models.transformer.attention import attend
from revnet_jax.programs.counts import arithmetic
from revnet_jax.training.program import step_program

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
PRODUCT = 2 * 8 * 16 * 16
IMAGE = jax.ShapeDtypeStruct((2, 9, 9, 4), jnp.float32)
KERNEL = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)


def count(function, *args, platform="cpu"):
    return arithmetic(jax.jit(function).trace(*args).jaxpr, platform=platform)


def convolve(x, kernel, **kwargs):
    settings = {"window_strides": (1, 1), "padding": "SAME", **kwargs}
    return lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


def test_a_product_counts_two_per_multiply_add():
    assert count(lambda x, w: x @ w, X, W) == PRODUCT


def test_a_batched_product_counts_its_batch_once():
    stacked = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), stacked, stacked) == (
        5 * 2 * 16 * 16 * 16
    )


def test_loops_count_as_often_as_they_run():
    def run(x, w):
        return lax.fori_loop(0, 3, lambda i, x: lax.scan(body, x, None, length=5)[0], x)

    def body(x, _):
        return x @ jnp.ones((16, 16)), None

    assert count(run, X, W) == 15 * PRODUCT


def test_of_branches_the_dearest_counts():
    run = lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)
    assert count(run, X, W) == 2 * PRODUCT


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("tpu", 2), ("gpu", 2)])
def test_of_platforms_the_one_planned_for_counts(platform, products):
    run = lambda x, w: lax.platform_dependent(x, cpu=lambda x: x @ w, default=lambda x: x @ w @ w)
    assert count(run, X, W, platform=platform) == products * PRODUCT


def test_what_is_not_used_does_not_count():
    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w: jnp.tanh(x @ w) @ w)(w))

    # Forward nothing, of the recompute the first product, and 2 * 2 backward, less that to x.
    assert count(jax.grad(loss), W, X) == (0 + 1 + 3) * PRODUCT


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint])
def test_functions_inside_functions_count(inner):
    assert count(lambda x, w: inner(lambda x, w: x @ w)(x, w), X, W) == PRODUCT


def test_a_custom_gradient_counts_what_is_called():
    @jax.custom_vjp
    def run(x, w):
        return x @ w

    run.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[1]))
    assert count(run, X, W) == PRODUCT
    loss = lambda x, w: jnp.sum(run(x, w))
    assert count(jax.grad(loss), X, W) == PRODUCT  # of the forward pass nothing is used
    assert count(jax.value_and_grad(loss), X, W) == 2 * PRODUCT


def test_a_convolution_counts_no_products_with_padding():
    # 9 x 9 pixels x 9 taps, less a row or a column of 9 pixels for each of the outer taps.
    taps_along_an_axis = 3 * 9 - 2
    assert count(convolve, IMAGE, KERNEL) == 2 * 2 * 4 * 6 * taps_along_an_axis**2


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "VALID"},
        {"window_strides": (2, 3)},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 2), "padding": ((1, 2), (0, 3))},
    ],
)
def test_convolutions_and_their_gradients_count_as_in_xla(settings):
    gradient = jax.grad(lambda *args: jnp.sum(convolve(*args, **settings) ** 2), argnums=(0, 1))
    for function in (lambda *args: convolve(*args, **settings), gradient):
        counted = jax.jit(function).lower(IMAGE, KERNEL).cost_analysis()["flops"]
        # XLA also counts the elementwise operations: of the output, and of its square.
        assert count(function, IMAGE, KERNEL) == pytest.approx(counted, rel=0.03)


def test_grouped_convolutions_count_as_in_xla():
    kernel = jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.float32)
    run = lambda x, k: convolve(x, k, feature_group_count=4)
    counted = jax.jit(run).lower(IMAGE, kernel).cost_analysis()["flops"]
    assert count(run, IMAGE, kernel) == counted


def test_reversing_costs_what_the_design_says(step_config):
    """A forward pass of the chains more than storing, which is three: 4/3 at most."""
    step_config.update_from_flattened_dict({"model.units": (3,), "model.channels": (8, 8)})
    flops = {}
    for backprop in ("store", "remat", "reverse"):
        step_config.model.backprop = backprop
        program = step_program(step_config, jax.devices())
        jaxpr = program.step.trace(program.state, program.batch).jaxpr
        flops[backprop] = arithmetic(jaxpr, platform="tpu")
    assert 1 < flops["remat"] / flops["store"] <= 4 / 3
    assert 1 < flops["reverse"] / flops["store"] <= 4 / 3


def test_kernels_and_ragged_products_count():
    shape = jax.ShapeDtypeStruct((2, 1024, 4, 128), jnp.bfloat16)

    def count(kernel):
        run = lambda q, k, v: attend(q, k, v, causal=False, kernel=kernel)
        return arithmetic(jax.make_jaxpr(run)(shape, shape, shape), platform="tpu")

    assert count("flash") == count("chunked") == 4 * 2 * 4 * 1024**2 * 128
    rows, kernels = jnp.ones((64, 32)), jnp.ones((4, 32, 40))
    ragged = jax.make_jaxpr(jax.lax.ragged_dot)(rows, kernels, jnp.full(4, 16))
    assert arithmetic(ragged, platform="cpu") == 2 * 64 * 32 * 40


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 256)])
def test_attention_by_cudnn(monkeypatch, causal, window):
    """Two products forward, five backward, where scores are computed again; half if causal, of a
    window what is in it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 512 if not causal else 1024, 4, 64), jnp.bfloat16)

    def run(q, k, v):
        options = {"is_causal": causal, "implementation": "cudnn"}
        options["local_window_size"] = window and (window - 1, 0)
        return jnp.sum(jax.nn.dot_product_attention(q, k, v, **options), dtype=jnp.float32)

    pairs = 1024 * k.shape[1] // (2 if causal else 1)
    if window:  # a triangle is missing where the sequence starts
        pairs = 1024 * window - window**2 // 2
    product = 2 * 2 * 4 * 64 * pairs
    assert count(run, q, k, k, platform="gpu") == 2 * product
    assert count(jax.grad(run, argnums=(0, 1, 2)), q, k, k, platform="gpu") == 7 * product


def test_a_part_of_a_mesh_that_a_product_is_computed_by_counts_its_axes():
    """Split by hand over "data" alone, and over "tensor" by the compiler: the same product."""
    types = (jax.sharding.AxisType.Auto,) * 2  # jax 0.12 would take Explicit
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), types)
    with jax.sharding.use_abstract_mesh(mesh):
        run = jax.shard_map(
            lambda x, w: x @ w,
            in_specs=(jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()),
            out_specs=jax.sharding.PartitionSpec("data"),
            axis_names={"data"},
            check_vma=False,
        )
        assert arithmetic(jax.make_jaxpr(jax.jit(run))(X, W), platform="cpu") == PRODUCT
