"""Attention by the kernels of GPUs and TPUs; plain JAX, or an interpreter, stands in for them."""

import functools
import importlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.models.transformer import attention
from revnet_jax.models.transformer.attention import attend, padded_to_even, scores_times_values
from revnet_jax.programs.counts import arithmetic
from tests import by_default, thorough
from tests.nvidia import needs_compiler, run_for

B, T, N, K = 2, 5, 4, 8
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, K), *[(B, length, groups, K)] * 2, (B, length, N, K))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def naive(q, k, v, causal):
    mask = jnp.tril(jnp.ones((q.shape[1],) * 2, bool)) if causal else None
    return scores_times_values(q, k, v, mask)


def masked(q, k, v, causal, window=0, segment_BT=None):
    """With all scores at once, and a mask of each sequence."""
    place = np.arange(q.shape[1])
    back = place[:, None] - place[None]
    seen = (back >= 0 if causal else back == back) & (back < (window or len(place)))
    segment_BT = np.zeros((B, len(place))) if segment_BT is None else np.asarray(segment_BT)
    return scores_times_values(
        q, k, v, jnp.asarray(seen & (segment_BT[:, :, None] == segment_BT[:, None]))
    )


def segments_of(length):
    """Other ones in each sequence; some of a single token."""
    starts = np.random.default_rng(0).random((B, length)) < 0.3
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def compare(function, expected, arguments, dy, atol):
    """In value and gradient."""

    @functools.partial(jit, static_argnums=0)
    def both(function, arguments, dy):
        value, pullback = jax.vjp(function, *arguments)
        return value, *pullback(dy)

    (value, *gradient), (naive_value, *naive_gradient) = (
        both(each, arguments, dy) for each in (function, expected)
    )
    assert value.dtype == naive_value.dtype == dy.dtype
    np.testing.assert_allclose(value, naive_value, rtol=0, atol=atol)
    for d, naive_d in zip(gradient, naive_gradient, strict=True):
        np.testing.assert_allclose(d, naive_d, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "groups"), [thorough(5, 4), (65, 2), (6, 4)])
@pytest.mark.parametrize(("dtype", "atol"), [thorough("float32", 1e-5), ("float64", 1e-12)])
def test_padded_attention_is_attention(causal, length, groups, dtype, atol):
    """In value and gradient, with heads that share keys too."""
    with jax.enable_x64(dtype == "float64"):
        q, k, v, dy = inputs(dtype, length, groups)
        padded = lambda q, k, v: padded_to_even(only_even, q, k, v, causal=causal)
        compare(padded, lambda *qkv: naive(*qkv, causal), (q, k, v), dy, atol)


@pytest.mark.parametrize("causal", [thorough(False), True])
@pytest.mark.parametrize(
    ("groups", "segments"), [thorough(1, False), thorough(2, False), thorough(4, False), (2, True)]
)
def test_the_kernel_for_tpus_is_attention(causal, groups, segments, monkeypatch):
    """Interpreted, as there is no TPU; heads that share keys read them where they are."""
    kernels = importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")
    interpreted, called = types.SimpleNamespace(**vars(kernels.pl)), []

    def pallas_call(*args, **kwargs):
        called.append(args)
        return kernels_call(*args, **kwargs, interpret=True)

    kernels_call = kernels.pl.pallas_call
    interpreted.pallas_call = pallas_call
    monkeypatch.setattr(kernels, "pl", interpreted)
    q, k, v, dy = inputs("float32", 256, groups)
    segment_BT = segments_of(256) if segments else None
    fused = lambda *qkv: attend(*qkv, causal=causal, kernel="flash", segment_BT=segment_BT)
    naive = lambda *qkv: masked(*qkv, causal, segment_BT=segment_BT)
    compare(fused, naive, (q, k, v), dy, atol=1e-5)
    assert called


# Of (tokens, window): less than a chunk of 4; one; two; blocks of 4, 5 and 7, and their remainders.
WINDOWS = [(3, 2), (4, 1), (8, 3), (16, 1), (16, 4), (37, 5), (37, 7), (37, 36), (8, 8), (8, 9)]


@pytest.mark.parametrize("segments", [thorough(False), True])
@pytest.mark.parametrize(("length", "window"), by_default([*WINDOWS, (37, 0)], *WINDOWS[4:7]))
def test_windows_and_segments_are_masks(length, window, segments, monkeypatch):
    monkeypatch.setattr(attention, "_SMALLEST_CHUNK", 4)
    monkeypatch.setattr(attention, "_MOST_CHUNKS", 2)
    with jax.enable_x64(True):
        q, k, v, dy = inputs("float64", length, 2)
        segment_BT = segments_of(length) if segments else None
        limits = {"window": window, "segment_BT": segment_BT}
        found = lambda *qkv: attend(*qkv, causal=True, kernel="chunked", **limits)
        compare(found, lambda *qkv: masked(*qkv, True, **limits), (q, k, v), dy, atol=1e-12)


def test_segments_without_an_order():
    q, k, v, dy = inputs("float32", 9, 2)
    segment_BT = segments_of(9)
    found = lambda *qkv: attend(*qkv, causal=False, kernel="cudnn", segment_BT=segment_BT)
    compare(found, lambda *qkv: masked(*qkv, False, segment_BT=segment_BT), (q, k, v), dy, 1e-5)


def test_windows_need_an_order():
    q, k, v, _ = inputs("float32")
    for window, causal in ((3, False), (-1, True)):
        with pytest.raises(ValueError, match=f"got window={window} and causal={causal}, expected"):
            attend(q, k, v, causal=causal, kernel="chunked", window=window)


def test_heads_that_devices_cannot_share_are_one_line(monkeypatch):
    """Only kernels that compilers cannot partition need it: here the loop over blocks."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    monkeypatch.setattr(attention, "_SMALLEST_CHUNK", 4)
    monkeypatch.setattr(attention, "_MOST_CHUNKS", 2)
    q, k, v, _ = inputs("float32", 37, 1)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="got 4 heads and 1 key-value heads, e"),
    ):
        attend(q, k, v, causal=True, kernel="chunked", window=3)


@pytest.mark.thorough
@pytest.mark.parametrize("length", [8, 9])
def test_cudnn_gets_the_window(length, monkeypatch):
    """As what it reads besides the token itself, which is how JAX counts: compared with JAX's own
    mask of it. Not where all tokens are in it, nor with segments."""
    windows = []

    def in_plain_jax(*qkv, implementation, local_window_size=None, **settings):
        assert implementation == "cudnn"
        windows.append(local_window_size)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return dot_product_attention(*qkv, local_window_size=local_window_size, **settings)

    dot_product_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", in_plain_jax)
    q, k, v, _ = inputs(jnp.bfloat16, length)
    attended = functools.partial(attend, q, k, v, causal=True, kernel="cudnn")
    found, expected = attended(window=3), masked(q, k, v, True, window=3)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (found, expected)), atol=0.02)
    attended(window=length)
    attended(window=3, segment_BT=segments_of(length))
    assert windows == [(2, 0), None]


def test_of_a_window_only_what_is_near_is_computed():
    """16 times the tokens are 16 times the work, and no array has two axes of tokens."""

    def gradient_of(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        loss = lambda *qkv: jnp.sum(attend(*qkv, causal=True, kernel="chunked", window=200))
        return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape)

    short, long = gradient_of(6400), gradient_of(102400)
    assert arithmetic(long, platform="cpu") == 16 * arithmetic(short, platform="cpu")
    # Of a sum's gradient: scores forward and again, and two products for each of two backward.
    assert arithmetic(short, platform="cpu") == 6 * 2 * (2 * 8) * 6400 * 400
    assert not re.search(r"6400,(\d+,)*6400\b", str(short))


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

    @jit
    def value_and_gradient(*qkv):
        value, pullback = jax.vjp(attended, *qkv)
        return value, *pullback(dy)

    found, *gradient = value_and_gradient(*filled)
    np.testing.assert_array_equal(found, value_and_gradient(*as_added)[0])
    for d in gradient:
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


NARROW = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from revnet_jax.models.transformer.attention import attend

everywhere = NamedSharding(Mesh(np.array(targets), ("data",)), PartitionSpec())
shape = lambda heads: jax.ShapeDtypeStruct(
    (2, {length}, heads, 64), jnp.bfloat16, sharding=everywhere
)
qkv = shape(4), shape(2), shape(2)
attended = lambda q, k, v: attend(q, k, v, causal=True, kernel="cudnn", window=256)
loss = lambda *qkv: jnp.sum(jnp.square(attended(*qkv)), dtype=jnp.float32)
print(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv).compile().as_text())
"""


@needs_compiler
@pytest.mark.parametrize("length", [1536, 1537])
def test_a_window_is_cudnns(length):
    """Compiled for an H100: forward and backward, and no scores of all tokens."""
    text = run_for("h100:1", NARROW.format(length=length))
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2
    assert all(re.search(r'"sliding_window_length": ?256\b', call) for call in calls)
    assert not re.search(r"\[[\d,]*153[678],[\d,]*153[678]\b", text)


BRANCH = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from revnet_jax.programs.traffic import traffic
from revnet_jax.models.transformer.attention import attend

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
    assert chunked == pytest.approx(15.3, abs=1)
