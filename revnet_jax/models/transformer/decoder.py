"""The branches of a decoder: causal attention and feed-forward networks, as nnx modules.

Dims: B batch, T tokens, S tokens of a cache, D stream width, N heads, G key-value heads, K head
size, F hidden width, E experts, R experts per token (in `Attention`: query heads per key-value
head), M all tokens in a row. Streams are float32; branches normalise their input and compute in
`dtype` (mixed precision).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from revnet_jax.models.dtypes import at_least_float32
from revnet_jax.models.partition import BATCH, by_device, by_heads
from revnet_jax.models.transformer.attention import (
    AttentionKernel,
    attend,
    causal_mask,
    rotate,
    scores_times_values,
)
from revnet_jax.models.transformer.linear import Linear, LoRA, leading

# Sharding of a layer's weights: heads and hidden units over "tensor", the other axis over "fsdp".
LAYER_RULES = (
    (r"qkv/kernel$", ("fsdp", "tensor")),
    (r"up/kernel$", ("fsdp", None, "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    # The kernels of experts: [E, D, 2, F] and [E, F, D].
    (r"up_kernel$", (None, "fsdp", None, "tensor")),
    (r"down_kernel$", (None, "tensor", "fsdp")),
    # Scales of kernels in 8 bits. Those of "out" and "down" are small, and needed whole.
    (r"qkv/kernel_scale$", ("tensor",)),
    (r"up/kernel_scale$", (None, "tensor")),
)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich 2019, arXiv:1910.07467).

    Computed in float32 at least.
    """

    def __init__(self, width: int, *, eps: float):
        self.scale, self.eps = nnx.Param(jnp.ones(width)), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(mean_square + self.eps) * leading(self.scale[...], x)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias (Ba et al. 2016, arXiv:1607.06450).

    Computed in float32 at least.
    """

    def __init__(self, width: int, *, eps: float):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(at_least_float32(x.dtype))
        # Not as mean(x^2) - mean(x)^2, which loses digits where the mean is large.
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * leading(self.scale[...], x) + leading(self.bias[...], x)


Norm = Callable[[int], nnx.Module]  # makes a normalisation of this width
NORMS = {"rms": RMSNorm, "layer": LayerNorm}
Bias = Literal["none", "qkv", "attention", "all"]
BIASES = ("none", "qkv", "attention", "all")
# The activation of a feed-forward network: how many hidden vectors it takes, and the function.
ACTIVATIONS = {
    "swiglu": (2, lambda gate, value: jax.nn.silu(gate) * value),
    "gelu": (1, lambda value: jax.nn.gelu(value, approximate=True)),
}


class Cache(NamedTuple):
    """The KV cache: keys and values of the tokens so far, [B, S, G, K]; zeros for later tokens.

    Attributes:
      document_B: the position at which the document of the next token starts. Only in the cache of
        a whole model, and only if documents are kept separate; otherwise None.
    """

    k_BSGK: jax.Array
    v_BSGK: jax.Array
    document_B: jax.Array | None = None


class Positions(NamedTuple):
    """The positions of tokens, computed once because every layer reads the same.

    Attributes:
      first: the position of the first token in its sequence.
      angles: the rotary angles of all tokens, see `rotary_angles`. Split over the mesh with the
        tokens. None for a model that learns an embedding of each position instead.
      document_BT: the position at which each token's document starts; attention reads no token
        before it. None if tokens read across documents. Not split along the sequence.
    """

    first: jax.Array
    angles: tuple[jax.Array, jax.Array] | None
    document_BT: jax.Array | None = None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and grouped-query heads.

    Ainslie et al. 2023 (arXiv:2305.13245). For `kernel` and `window` see `attend`, for `bias` and
    `qk_norm` `LanguageModelShape`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        out_std: float,
        kernel: AttentionKernel,
        window: int,
        norm: Norm,
        bias: Bias,
        qk_norm: bool,
        lora: LoRA,
        int8: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.kernel, self.window, self.qk_norm = kernel, window, qk_norm
        self.norm = norm(width)
        if qk_norm:
            self.q_norm, self.k_norm = norm(head_size), norm(head_size)
        linear = functools.partial(Linear, lora=lora, int8=int8, dtype=dtype, rngs=rngs)
        # One product for all: R query heads, a key and a value for each key-value head.
        inner = (heads + 2 * kv_heads) * head_size
        self.qkv = linear(width, inner, std=width**-0.5, bias=bias != "none")
        has_bias = bias in ("attention", "all")
        self.out = linear(heads * head_size, width, std=out_std, bias=has_bias)

    def __call__(
        self, x_BTD: jax.Array, positions: Positions, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """(u_BTD, the KV cache with these tokens added).

        Without a cache, tokens read one another only; with a cache, also all tokens in it.
        """
        B, T, _ = x_BTD.shape
        G, R, K = self.kv_heads, self.heads // self.kv_heads, self.head_size
        # Each key-value head lies next to the query heads that read it, so that sharding over
        # "tensor" gives every device whole groups.
        qkv = self.qkv(self.norm(x_BTD)).reshape(B, T, G, R + 2, K)
        # Split rather than indexed: the derivative of indexing pads each part and adds them.
        q, k, v = jnp.split(qkv, (R, R + 1), axis=3)
        q_BTNK, k_BTGK, v_BTGK = q.reshape(B, T, G * R, K), k[..., 0, :], v[..., 0, :]
        if self.qk_norm:
            # Norms compute in float32 at least, attention in `dtype`.
            q_BTNK = self.q_norm(q_BTNK).astype(q_BTNK.dtype)
            k_BTGK = self.k_norm(k_BTGK).astype(k_BTGK.dtype)
        if positions.angles is not None:
            q_BTNK, k_BTGK = (rotate(x, positions.angles) for x in (q_BTNK, k_BTGK))
        if cache is None:
            attend_causally = functools.partial(
                attend,
                causal=True,
                kernel=self.kernel,
                window=self.window,
                segment_BT=positions.document_BT,
            )
            mixed = by_heads(attend_causally, q_BTNK, k_BTGK, v_BTGK)
        else:
            # Later places keep their zeros, which the mask hides.
            write = lambda old, new: lax.dynamic_update_slice_in_dim(
                old, new.astype(old.dtype), positions.first, axis=1
            )
            cache = Cache(write(cache.k_BSGK, k_BTGK), write(cache.v_BSGK, v_BTGK))
            position_T = positions.first + jnp.arange(T)
            # The whole cache is read, behind a mask: one length, and so one program for all
            # positions.
            places = position_T[:, None], jnp.arange(cache.k_BSGK.shape[1])[None]
            sees = causal_mask(*places, self.window)
            if positions.document_BT is not None:
                sees = sees[None] & (places[1][None] >= positions.document_BT[..., None])
            mixed = scores_times_values(q_BTNK, cache.k_BSGK, cache.v_BSGK, sees)
        return self.out(mixed.reshape(B, T, G * R * K)), cache


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x A) * x B) C (Shazeer 2020, arXiv:2002.05202), or gelu(x A) C.

    Args:
      activation: one of `ACTIVATIONS`. "gelu" is its approximation by tanh (Hendrycks & Gimpel
        2016, arXiv:1606.08415), as in GPT-2.
      bias: whether the linear layers have biases.
      chunks: number of parts of the tokens, computed one after the other and recomputed in the
        backward pass, so that the hidden activations of all tokens never exist together. If it does
        not divide the number of tokens (as in a prompt), all are computed at once.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        chunks: int,
        activation: str,
        norm: Norm,
        bias: bool,
        lora: LoRA,
        int8: bool,
        out_std: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm, self.chunks, self.activation = norm(width), chunks, activation
        linear = functools.partial(Linear, bias=bias, lora=lora, int8=int8, dtype=dtype, rngs=rngs)
        # Gate and value have an axis of their own, not halves of one. So a device that has a part
        # of the hidden units has both for each.
        self.up = linear(width, ACTIVATIONS[activation][0], hidden, std=width**-0.5)
        self.down = linear(hidden, width, std=out_std)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        if self.chunks == 1 or T % self.chunks:
            return self._apply(x_BTD)
        # [B, T, D] -> [chunks, B, T / chunks, D]
        parts = jnp.swapaxes(x_BTD.reshape(B, self.chunks, T // self.chunks, D), 0, 1)
        u = lax.map(jax.checkpoint(self._apply), parts)
        return jnp.swapaxes(u, 0, 1).reshape(B, T, D)

    def _apply(self, x_BTD):
        hidden = jnp.unstack(self.up(self.norm(x_BTD)), axis=-2)
        return self.down(ACTIVATIONS[self.activation][1](*hidden))


class Experts(nnx.Module):
    """Mixture of SwiGLU experts: each token goes to the R experts of highest router probability.

    Routing and the load-balancing loss follow Fedus et al. 2021 (arXiv:2101.03961, eq. 4), with
    top-R of E experts; for R > 1 the chosen probabilities are normalised to sum to 1. Experts have
    no capacity limit, so no token is dropped. Cost: on TPUs that of R feed-forward networks per
    token; on platforms where JAX has no kernel for `ragged_dot`, that of E. Every device sorts its
    own tokens.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        experts: int,
        experts_per_token: int,
        norm: Norm,
        out_std: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.experts_per_token, self.dtype = experts_per_token, dtype
        self.norm = norm(width)
        normal = lambda std, *shape: nnx.Param(std * jax.random.normal(rngs.params(), shape))
        wide = at_least_float32(dtype)
        # In float32 at least: a rounding could send a token to another expert.
        self.router = Linear(width, experts, std=width**-0.5, dtype=wide, rngs=rngs)
        self.up_kernel = normal(width**-0.5, experts, width, 2, hidden)
        self.down_kernel = normal(out_std, experts, hidden, width)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(u_BTD, load-balancing loss, expert_BTR); the loss is 1 if experts get equal shares."""
        x_BTD = self.norm(x_BTD)
        probability_BTE = jax.nn.softmax(self.router(x_BTD))
        weight_BTR, expert_BTR = lax.top_k(probability_BTE, self.experts_per_token)
        # With one expert the normalised weight would be constant 1, and the router would get no
        # gradient.
        if self.experts_per_token > 1:
            weight_BTR = weight_BTR / jnp.sum(weight_BTR, axis=-1, keepdims=True)
        E = probability_BTE.shape[-1]
        # The counts have no gradient; the router learns by the probabilities.
        share_E = jnp.mean(jax.nn.one_hot(expert_BTR, E), axis=(0, 1, 2))
        balance = E * jnp.sum(share_E * jnp.mean(probability_BTE, axis=(0, 1)))

        up, down = (kernel[...].astype(self.dtype) for kernel in (self.up_kernel, self.down_kernel))
        # Dimensions of up [E, D, 2, F] and down [E, F, D].
        hidden = (None, None, None, "tensor"), (None, "tensor")
        tokens = (BATCH, "sequence")
        dispatch = by_device(_dispatch, (tokens,) * 3 + hidden, ("tensor", *tokens))
        # Sums over the "tensor" devices: each has computed a part of the hidden units.
        u_BTD = jnp.sum(dispatch(x_BTD, weight_BTR, expert_BTR, up, down), axis=0)
        return u_BTD, balance, expert_BTR


def _dispatch(x_BTD, weight_BTR, expert_BTR, up_ED2F, down_EFD):
    """The weighted sum of the experts' outputs for each token, [1, B, T, D]."""
    B, T, D = x_BTD.shape
    E, R = len(up_ED2F), expert_BTR.shape[-1]
    # [E, D, 2 F], gates then values: here F is what one device has, so halves are whole.
    up_EDF = up_ED2F.reshape(E, D, -1)
    expert_M = expert_BTR.reshape(-1)
    # Tokens are sorted by expert, and sorted back by a gather: a scatter-add might sum in another
    # order each time, and the rewind needs the same bits.
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = jnp.bincount(expert_M, length=E)
    # A token's R choices lie side by side, so choice m is of token m // R.
    rows = x_BTD.astype(up_EDF.dtype).reshape(B * T, D)[order_M // R]
    gate, value = jnp.split(lax.ragged_dot(rows, up_EDF, sizes_E), 2, axis=-1)
    outputs = lax.ragged_dot(jax.nn.silu(gate) * value, down_EFD, sizes_E)
    # Sorting a permutation gives its inverse.
    u_BTRD = outputs[jnp.argsort(order_M)].reshape(B, T, R, D)
    u_BTD = jnp.sum(u_BTRD * weight_BTR[..., None].astype(u_BTRD.dtype), axis=2)
    return u_BTD[None]
