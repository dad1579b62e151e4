"""Memory-efficient attention: the T x T scores never exist all at once.
Dims: B batch, T tokens, N heads, G key-value heads (N is a multiple), K size of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.models.dtypes import at_least_float32
from revnet_jax.models.partition import BATCH, by_device, extent

AttentionKernel = Literal["chunked", "cudnn", "flash"]
KERNELS: dict[str, AttentionKernel] = {
    "cpu": "chunked",
    # JAX has two names for this platform.
    "gpu": "cudnn",
    "cuda": "cudnn",
    "tpu": "flash",
}
# The loop over chunks is unrolled, so more of them would make a larger program.
_MOST_CHUNKS, _SMALLEST_CHUNK = 16, 128
_FLASH_BLOCK = 128  # the TPU kernel needs lengths that are multiples of this


def kernel_for(platform: str) -> AttentionKernel:
    """The default kernel for a platform: "cpu", "gpu" or "tpu"."""
    return KERNELS.get(platform, "chunked")


def attend(
    q_BTNK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    causal: bool,
    kernel: AttentionKernel,
    window: int = 0,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention, softmax(q k' / sqrt(K)) v: [B, T, N, K].

    Query head n reads key-value head n // (N / G).

    Args:
      causal: token t reads tokens up to itself.
      kernel: "chunked": plain JAX, one block of queries at a time, with scores recomputed in the
        backward pass. "cudnn": the fused kernel of `jax.nn.dot_product_attention` for NVIDIA GPUs,
        16-bit dtypes and heads of up to 128, see `padded_to_even`. "flash": the Pallas kernel for
        TPUs that comes with JAX (Dao et al. 2022, arXiv:2205.14135), for lengths that are multiples
        of 128. For inputs that a fused kernel does not support, "chunked" is used instead.
      window: sliding-window attention: a token reads this many tokens, the last of them itself
        (Beltagy et al. 2020, arXiv:2004.05150); 0 for all. Raises ValueError without `causal`.
        "cudnn" supports windows, "flash" does not.
      segment_BT: integers; a token reads only tokens of its own segment. "flash" supports segments,
        "cudnn" does not: for it JAX's public function has no argument but a mask of T x T.

    Softmax is float32 at least. Cost: 4 B T T N K operations; about half of that if causal, since
    later keys are skipped. With a window 4 B T S N K, where S is the window for "cudnn" and at
    most 2 max(window, 128) for the others. Only the scores of one chunk, or of one block of the
    window's size, exist at a time.

    Determinism: each kernel gives the same values for the same inputs every time, which rebuilding
    streams needs. So do gradients, except with "cudnn": its backward kernel sums in an order
    that varies, unless `config.deterministic` makes XLA ask cuDNN for its deterministic, slower
    algorithm (openxla/xla#14125). So two gradients of one program, or of `store` and `reverse`, may
    differ by rounding although all streams are equal.
    """
    if kernel not in KERNELS.values():
        known = ", ".join(sorted(set(KERNELS.values())))
        raise ValueError(f"got attention={kernel!r}, expected one of {known}")
    T = q_BTNK.shape[1]
    K = q_BTNK.shape[-1]
    half = q_BTNK.dtype in (jnp.bfloat16, jnp.float16)
    if window < 0 or (window and not causal):
        raise ValueError(
            f"got window={window} and causal={causal}, expected 0 (none), or a number of tokens "
            "that causal attention reads"
        )
    if window >= T:  # the window holds every earlier token
        window = 0
    # JAX raises an error for other dtypes and sizes (256 is allowed from Hopper on).
    if kernel == "cudnn" and segment_BT is None and half and K % 8 == 0 and K <= 128:
        # cuDNN's window is (tokens before, tokens after), not counting the token itself.
        reach = {"local_window_size": (window - 1, 0)} if window else {}
        kernel_for_even = functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn", **reach
        )
        return padded_to_even(kernel_for_even, q_BTNK, k_BTGK, v_BTGK, causal=causal)
    # The Pallas kernel has no windows, and raises an error for other sizes.
    taken_by_flash = T % _FLASH_BLOCK == 0 and (K <= 128 or K % 128 == 0) and not window
    if kernel == "flash" and taken_by_flash:
        return _flash(q_BTNK, k_BTGK, v_BTGK, segment_BT, causal=causal)
    chunk = max(_SMALLEST_CHUNK, -(-T // _MOST_CHUNKS))
    # Only where a block is shorter than a chunk: chunks alone also skip keys, but fewer.
    if window and chunk > max(window, _SMALLEST_CHUNK):
        return _in_blocks(q_BTNK, k_BTGK, v_BTGK, segment_BT, window=window)
    return _in_chunks(q_BTNK, k_BTGK, v_BTGK, segment_BT, causal=causal, window=window, chunk=chunk)


def causal_mask(query_T1: jax.Array, key_1S: jax.Array, window: int = 0) -> jax.Array:
    """[T, S]: which keys each query sees, from the positions of both; window: see `attend`."""
    mask_TS = query_T1 >= key_1S
    return mask_TS & (query_T1 - key_1S < window) if window else mask_TS


def _of_segments(q_BNTK, k_BGSK, v_BGSK, mask_TS, *segments):
    """`_heads_first` with the mask of segments added.

    The mask is made inside the checkpointed function, so that it is not kept as a residual.
    """
    if not segments:
        return _heads_first(q_BNTK, k_BGSK, v_BGSK, mask_TS)
    segment_BT, segment_BS = segments
    same_BTS = segment_BT[:, :, None] == segment_BS[:, None]
    mask_BTS = same_BTS if mask_TS is None else same_BTS & mask_TS[None]
    return _heads_first(q_BNTK, k_BGSK, v_BGSK, mask_BTS)


def _in_chunks(q_BTNK, k_BTGK, v_BTGK, segment_BT, *, causal, window, chunk):
    """Attention of one chunk of queries at a time to the keys that it reads."""
    T = q_BTNK.shape[1]
    # Heads first, so that no product has a transposed result. XLA chooses which operands of such a
    # product to transpose, and chose differently under `store` and `reverse`, whose gradients in
    # float32 were 3e-4 apart on an H100. Once for all chunks, which moves less memory.
    q_BNTK, k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (q_BTNK, k_BTGK, v_BTGK))
    parts = []
    for start in range(0, T, chunk):
        stop = min(start + chunk, T)
        # Skip keys after the chunk's last query (causal) or before its first query's window.
        first, last = max(0, start - window + 1) if window else 0, stop if causal else T
        mask_TS = None
        if causal:
            places = jnp.arange(start, stop)[:, None], jnp.arange(first, last)[None]
            # XLA merges equal masks of two isolated programs (see core/isolate.py) and keeps the
            # result, where a program alone makes its mask as it goes along. The barrier keeps it
            # everywhere, a byte for each score of one head, so that the code that reads it is the
            # same.
            mask_TS = jax.lax.optimization_barrier(causal_mask(*places, window))
        # The maximum and the sum of each query are kept, its scores are not.
        part = jax.checkpoint(_of_segments, policy=_is_softmax_sum)
        queries, read = slice(start, stop), slice(first, last)
        arrays = q_BNTK[:, :, queries], k_BGTK[:, :, read], v_BGTK[:, :, read], mask_TS
        if segment_BT is not None:
            arrays += segment_BT[:, queries], segment_BT[:, read]
        parts.append(part(*arrays))
    mixed_BNTK = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    return jnp.swapaxes(mixed_BNTK, 1, 2)


def _in_blocks(q_BTNK, k_BTGK, v_BTGK, segment_BT, *, window):
    """Sliding-window attention, one block of queries at a time.

    A block is at least as long as the window, so it reads its own keys and those of the block
    before it.
    """
    T, block = q_BTNK.shape[1], max(window, _SMALLEST_CHUNK)
    blocks = -(-T // block)

    def split(x_BT):  # the padding of the last block comes after all real queries, so none reads it
        added = ((0, 0), (0, blocks * block - T), *[(0, 0)] * (x_BT.ndim - 2))
        x_BT = jnp.pad(x_BT, added)
        # [B, T, ...] -> [blocks, B, block, ...]: `lax.map` goes along the first axis.
        return jnp.swapaxes(x_BT.reshape(len(x_BT), blocks, block, *x_BT.shape[2:]), 0, 1)

    def with_before(x_BT):
        here = split(x_BT)
        return jnp.concatenate([jnp.zeros_like(here[:1]), here[:-1]]), here

    def of_block(parts):
        i, queries, read = parts
        # The keys of the block before, then those of this one: S = 2 blocks.
        k_BSGK, v_BSGK, *segment_BS = (jnp.concatenate(pair, axis=1) for pair in read)
        key_S = (i - 1) * block + jnp.arange(2 * block)
        # The first block has no block before it: mask those zeros.
        mask_TS = causal_mask(key_S[block:, None], key_S[None], window) & (key_S >= 0)[None]
        # The segments of the queries, which are the second half, and of all keys.
        segments = [ids for each in segment_BS for ids in (each[:, block:], each)]
        arrays = (jnp.swapaxes(x, 1, 2) for x in (queries, k_BSGK, v_BSGK))
        return jnp.swapaxes(_of_segments(*arrays, mask_TS, *segments), 1, 2)

    def of_device(q_BTNK, *read):
        parts = jnp.arange(blocks), split(q_BTNK), tuple(map(with_before, read))
        mixed = lax.map(jax.checkpoint(of_block, policy=_is_softmax_sum), parts)
        # [blocks, B, block, N, K] -> [B, T, N, K], without the padding
        return jnp.swapaxes(mixed, 0, 1).reshape(len(q_BTNK), -1, *q_BTNK.shape[2:])[:, :T]

    return _by_heads_of_device(of_device, q_BTNK, k_BTGK, v_BTGK, segment_BT)


def _by_heads_of_device(function, q_BTNK, k_BTGK, v_BTGK, segment_BT):
    """`function(q, k, v)`, or `(q, k, v, segments)`, with each device computing its own heads."""
    axes_of_heads = ("tensor", "sequence")
    devices = extent(axes_of_heads, dict(jax.sharding.get_abstract_mesh().shape))
    N, G = q_BTNK.shape[2], k_BTGK.shape[2]
    if N % devices or G % devices:
        raise ValueError(
            f"got {N} heads and {G} key-value heads, expected multiples of the {devices} devices "
            "of the mesh axes tensor and sequence: repeat heads, as `by_heads` does, or use fewer"
        )
    heads = (BATCH, None, axes_of_heads)
    arrays, axes = (q_BTNK, k_BTGK, v_BTGK), (heads,) * 3
    if segment_BT is not None:
        arrays, axes = (*arrays, segment_BT), (*axes, (BATCH,))
    return by_device(function, axes, heads)(*arrays)


def _is_softmax_sum(primitive, *_, **params):
    """A `jax.checkpoint` policy: keep the maximum and sum of a softmax, two numbers per query."""
    return primitive.name in ("reduce_max", "reduce_sum")


def scores_times_values(
    q_BTNK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """Attention of T queries to S keys with all scores at once.

    Args:
      mask: which keys each query sees, [T, S], or [B, T, S] if it differs between sequences.
    """
    arrays = (jnp.swapaxes(x, 1, 2) for x in (q_BTNK, k_BSGK, v_BSGK))
    return jnp.swapaxes(_heads_first(*arrays, mask), 1, 2)


def _heads_first(q_BNTK, k_BGSK, v_BGSK, mask):
    """`scores_times_values` of arrays whose second axis is the heads."""
    B, N, T, K = q_BNTK.shape
    G = k_BGSK.shape[1]
    # Query head n = g R + r reads key-value head g.
    q_BGRTK = q_BNTK.reshape(B, G, N // G, T, K)
    wide = at_least_float32(q_BNTK.dtype)
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=wide)
    scores = scores / math.sqrt(K)
    if mask is not None:
        mask = jnp.expand_dims(mask, (1, 2) if mask.ndim == 3 else (0, 1, 2))
        # The smallest finite number: with -inf a row that sees no key would be NaN.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSK.dtype)
    return jnp.einsum("bgrts,bgsk->bgrtk", weights, v_BGSK).reshape(B, N, T, K)


def padded_to_even(
    kernel: Callable[..., Any],
    q_BTNK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    *,
    causal: bool,
) -> jax.Array:
    """Calls `kernel(q, k, v, is_causal=...)`, padding an odd number of tokens by a token of zeros.

    When JAX differentiates cuDNN's attention it supports even lengths only (up to 0.12.0, in
    `check_is_flash_attention`: it mistakes the absent bias for one). A vision transformer with a
    class token has an odd length, 65 or 197.

    The key of the added token is masked, so its weight is exactly 0; with a causal mask it comes
    after all real queries. The output of its query is cut off, so its gradient is exactly 0. That
    query is not masked, because cuDNN would leave its output and softmax sum, which are kept for
    the backward pass, undefined.

    Args:
      kernel: has an argument `key_value_seq_lengths`, as `jax.nn.dot_product_attention` has.

    Cost: one token. Compiled for an H100, a branch of ViT-B at 197 tokens and its gradient, for
    256 images in bfloat16, reads and writes 4.2 GiB; chunked attention 15.3 GiB, and padding to 256
    tokens 4.7 GiB.
    """
    B, T = q_BTNK.shape[:2]
    if T % 2 == 0:
        return kernel(q_BTNK, k_BTGK, v_BTGK, is_causal=causal)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BTNK, k_BTGK, v_BTGK))
    lengths_B = None if causal else jnp.full((B,), T, jnp.int32)
    return kernel(q, k, v, is_causal=causal, key_value_seq_lengths=lengths_B)[:, :T]


def _flash(q_BTNK, k_BTGK, v_BTGK, segment_BT, *, causal):
    # Imported here, because only TPUs need Pallas.
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    scale = 1 / math.sqrt(q_BTNK.shape[-1])

    def by_head(q_BTNK, k_BTGK, v_BTGK, *segments):
        B, T, N, K = q_BTNK.shape
        q_BGTRK = jnp.swapaxes(q_BTNK.reshape(B, T, k_BTGK.shape[2], -1, K), 1, 2)
        q_BGRTK = jnp.swapaxes(q_BGTRK, 2, 3)
        # Queries and keys are the same tokens.
        ids = SegmentIds(*segments * 2) if segments else None
        kernel = functools.partial(flash_attention, segment_ids=ids, causal=causal, sm_scale=scale)
        # Mapped over the query heads of a group: they share one key-value head without copies.
        kernel = jax.vmap(kernel, in_axes=(2, None, None), out_axes=2)
        mixed = kernel(q_BGRTK, jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2))
        # [B, G, R, T, K] -> [B, T, G, R, K] -> [B, T, N, K]
        return jnp.moveaxis(mixed, 3, 1).reshape(B, T, N, K)

    return _by_heads_of_device(by_head, q_BTNK, k_BTGK, v_BTGK, segment_BT)


def rotary_angles(
    position_T: jax.Array,
    head_size: int,
    *,
    base: float = 10_000.0,
    scaling: Sequence[float] = (),
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) of the angles that `rotate` uses, [T, head_size / 2], in this dtype.

    `scaling` is that of `scaled_frequency`; () for none.
    """
    half = head_size // 2
    # Pair i of K / 2 turns by base**(-2 i / K) for each token.
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    if scaling:
        frequency = scaled_frequency(frequency, *scaling)
    # Not in bfloat16, which has no whole numbers between 256 and 258, and fewer further on.
    angle_TK = position_T.astype(dtype)[:, None] * frequency[None]
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def scaled_frequency(
    frequency: jax.Array, factor: float, low: float, high: float, context: float
) -> jax.Array:
    """Rotary frequencies for longer texts, as Llama 3.1 scales them (arXiv:2407.21783).

    A frequency that turns less than `low` times in the `context` that the model was first trained
    with is divided by `factor`; one that turns more than `high` times stays as it is. Between the
    two, the change is linear in the number of turns.
    """
    turns = context * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x_BTNK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864): rotates the halves of a head.

    Args:
      angles: of the tokens, from `rotary_angles`; constants without a gradient.

    Computed in the dtype of the angles, returned in the dtype of the input.
    """
    cos, sin = (lax.stop_gradient(table)[None, :, None] for table in angles)  # [1, T, 1, K / 2]
    # Pairs are (i, i + K / 2), as in the files of Llama and Qwen for transformers. The paper has
    # neighbours.
    a, b = jnp.split(x_BTNK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNK.dtype)
