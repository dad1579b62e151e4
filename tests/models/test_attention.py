"""Attention by the kernels of GPUs and TPUs; plain JAX, or an interpreter, stands in for them."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.models import attention
from revnet_jax.models.attention import attend, padded_to_even, scores_times_values
from tests.nvidia import needs_compiler, run_for

B, T, N, K = 2, 5, 4, 8


def only_even(q, k, v, *, is_causal, key_value_seq_lengths=None):
    """What cuDNN's kernel is to compute, and its refusal of odd lengths."""
    length = q.shape[1]
    if length % 2:
        raise NotImplementedError(f"Unsupported sequence length Q {length}, KV {length}.")
    seen = jnp.ones((length, length), bool)
    if is_causal:
        seen = jnp.tril(seen)
    if key_value_seq_lengths is not None:  # equal ones
        seen &= jnp.arange(length, dtype=jnp.int32)[None] < key_value_seq_lengths[0]
    return scores_times_values(q, k, v, seen)


def inputs(dtype, length=T, groups=N):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, length, N, K), *[(B, length, groups, K)] * 2, (B, length, N, K))
    return tuple(
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def naive(q, k, v, causal):
    mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool)) if causal else None
    return scores_times_values(q, k, v, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "groups"), [(5, 4), (65, 2), (6, 4)])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("float64", 1e-12)])
def test_padded_attention_is_attention(causal, length, groups, dtype, atol):
    """In value and gradient, with heads that share keys too."""
    with jax.enable_x64(dtype == "float64"):
        q, k, v, dy = inputs(dtype, length, groups)
        padded = lambda q, k, v: padded_to_even(only_even, q, k, v, causal=causal)
        found, pullback = jax.vjp(padded, q, k, v)
        expected, naive_pullback = jax.vjp(lambda *qkv: naive(*qkv, causal), q, k, v)
        assert found.dtype == expected.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        for d, naive_d in zip(pullback(dy), naive_pullback(dy), strict=True):
            np.testing.assert_allclose(d, naive_d, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_kernel_for_tpus_is_attention(causal, groups, monkeypatch):
    """Interpreted, as there is no TPU; heads that share keys read them where they are."""
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
    interpreted = types.SimpleNamespace(**vars(kernels.pl))
    interpreted.pallas_call = functools.partial(kernels.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernels, "pl", interpreted)
    q, k, v, dy = inputs("float32", 256, groups)
    fused = jax.jit(lambda *qkv: attend(*qkv, causal=causal, kernel="flash"))
    found, pullback = jax.vjp(fused, q, k, v)
    expected, naive_pullback = jax.vjp(lambda *qkv: naive(*qkv, causal), q, k, v)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for d, naive_d in zip(pullback(dy), naive_pullback(dy), strict=True):
        np.testing.assert_allclose(d, naive_d, rtol=0, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_the_added_token_has_no_weight_and_no_gradient(causal):
    """Whatever it holds: 1e3 in place of zeros changes no bit, and gets a gradient of exactly 0."""
    arguments = {}

    def spy(*qkv, **settings):
        arguments.update(qkv=qkv, settings=settings)
        return only_even(*qkv, **settings)

    *qkv, dy = inputs("float32")
    padded_to_even(spy, *qkv, causal=causal)
    as_added, settings = arguments["qkv"], arguments["settings"]
    filled = [x.at[:, T:].set(1e3) for x in as_added]
    for x, y in zip(filled, qkv, strict=True):
        assert x.shape[1] == T + 1
        np.testing.assert_array_equal(x[:, :T], y)
    attended = lambda *qkv: only_even(*qkv, **settings)[:, :T]
    expected, _ = jax.vjp(attended, *as_added)
    found, pullback = jax.vjp(attended, *filled)
    np.testing.assert_array_equal(found, expected)
    for d in pullback(dy):
        assert np.all(np.asarray(d[:, T:]) == 0)


@pytest.mark.parametrize("length", [65, 197])
def test_vision_transformers_take_the_fused_kernel(length, monkeypatch):
    """Their odd numbers of tokens do not make them fall back, nor fail, in bfloat16 on a GPU."""
    lengths = []

    def recording(q, k, v, *, implementation, **settings):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return only_even(q, k, v, **settings)

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", recording)
    q, k, v, _ = inputs(jnp.bfloat16, length)
    attended = attend(q, k, v, causal=False, kernel="cudnn")
    assert attended.shape == q.shape
    assert lengths == [length + 1]


BRANCH = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from revnet_jax.memory.traffic import traffic
from revnet_jax.models.attention import attend

B, T, N, K = 256, 197, 12, 64  # ViT-B at 224 pixels
D = N * K
everywhere = NamedSharding(Mesh(np.array(targets), ("data",)), PartitionSpec())
shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=everywhere)

def step(kernel, params, x_BTD, dy_BTD):
    def branch(params, x_BTD):
        qkv, out = (leaf.astype(jnp.bfloat16) for leaf in params)
        heads = (x_BTD.astype(jnp.bfloat16) @ qkv).reshape(B, T, N, 3, K)
        mixed = attend(*jnp.unstack(heads, axis=3), causal=False, kernel=kernel)
        return (mixed.reshape(B, T, D) @ out).astype(jnp.float32)
    u, pullback = jax.vjp(branch, params, x_BTD)
    return u, pullback(dy_BTD)

for kernel in ("cudnn", "chunked"):
    arguments = (shape(D, 3 * D), shape(D, D)), shape(B, T, D), shape(B, T, D)
    compiled = jax.jit(step, static_argnums=0).lower(kernel, *arguments).compile()
    print(json.dumps(traffic(compiled.as_text()).hbm_bytes))
"""


@needs_compiler
def test_padded_is_cheaper_than_chunked(monkeypatch):
    """Compiled for an H100: what `padded_to_even` says of its cost."""
    # Untuned, XLA finds no tiles for one of these products.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    padded, chunked = (int(line) / 2**30 for line in run_for("h100:1", BRANCH).splitlines())
    assert padded == pytest.approx(4.2, abs=0.3)
    assert chunked == pytest.approx(18.5, abs=1.5)
