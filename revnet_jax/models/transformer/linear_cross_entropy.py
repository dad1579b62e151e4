"""Cross-entropy fused with the linear layer that computes the logits, in chunks of tokens.
Dims: M tokens in a row, C those of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.models.dtypes import at_least_float32

_LANES = 128  # 16-bit matrix products are fast for vocabularies that are multiples of this


def linear_cross_entropy(
    kernel_DV: jax.Array,
    x_MD: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    compute_dtype: Any,
    chunk: int,
) -> jax.Array:
    """sum_m weight_m (log sum_v exp(logit_mv) - logit_m,target), logits = x kernel: a scalar.

    Args:
      target_M: integers; the result is NaN if one is not in [0, V).
      compute_dtype: of the operands of matrix products, including the gradient of the logits;
        everything else is float32 at least.
      chunk: number of tokens whose logits exist at a time.

    Differentiable in all floats. The first derivative computes logits only once: because the loss
    is a scalar, each chunk's gradient is computed together with its loss, and is later scaled by
    the cotangent of the loss (Hsu et al. 2024, arXiv:2410.10989, section 3.2). A second derivative
    keeps the logits of all chunks. Raises ValueError for a chunk below 1.

    Cost: 2 M D V operations, three times that with the gradient. Memory: the kernel in
    `compute_dtype`, chunk x V logits and, with the gradient, the gradients of the kernel and of x.
    The vocabulary is padded to a multiple of 128 if that adds little: on NVIDIA GPUs products of
    odd sizes are several times slower.
    """
    if chunk < 1:
        raise ValueError(f"got chunk={chunk}, expected 1 token or more")
    wide = at_least_float32(x_MD.dtype)
    sums = functools.partial(_sums, compute_dtype=compute_dtype, chunk=chunk)

    # Not custom_vjp, which forbids forward mode, and with it a way to second derivatives.
    @jax.custom_jvp
    def run(*arguments):
        return sums(*arguments, derivative=False)[0]

    @run.defjvp
    def run_jvp(primals, tangents):
        total, gradients = sums(*primals, derivative=True)
        # Targets are integers, and have no tangent.
        *moves, _ = tangents
        pairs = zip(gradients, moves, strict=True)
        # Linear in the tangents. Transposed, it scales the gradients by the cotangent of the loss.
        return total, sum(jnp.sum(gradient * move.astype(wide)) for gradient, move in pairs)

    return run(kernel_DV, x_MD, weight_M.astype(wide), target_M.astype(jnp.int32))


def _sums(kernel_DV, x_MD, weight_M, target_M, *, compute_dtype, chunk, derivative):
    """(the loss, its gradients by kernel, x and weights, or None), in the dtype of the weights."""
    (M, D), V, wide = x_MD.shape, kernel_DV.shape[1], weight_M.dtype
    kernel_DV = _padded(kernel_DV.astype(compute_dtype))
    class_1V = jnp.arange(kernel_DV.shape[1], dtype=jnp.int32)[None]
    # Added rather than selected: JAX would keep the constant of a selection as an array of the size
    # of the logits.
    mask_1V = jnp.where(class_1V < V, 0, -jnp.inf).astype(wide)
    product = functools.partial(jnp.matmul, preferred_element_type=wide)

    def of_chunk(carry, part):
        total, dkernel_DV = carry
        x_CD, weight_C, target_C = part
        x_CD = x_CD.astype(compute_dtype)
        logits_CV = product(x_CD, kernel_DV)
        normalizer_C = jax.nn.logsumexp(logits_CV + mask_1V, axis=1)
        # A masked sum, not a gather: a gather's derivative is a slow scatter.
        is_true_CV = (class_1V == target_C[:, None]).astype(wide)
        nll_C = normalizer_C - jnp.sum(is_true_CV * logits_CV, axis=1)
        nll_C = jnp.where((target_C >= 0) & (target_C < V), nll_C, jnp.nan)
        total += jnp.sum(weight_C * nll_C)
        if not derivative:
            return (total, None), None
        # d nll / d logits = softmax(logits) - onehot(target)
        probability_CV = jnp.exp(logits_CV + mask_1V - normalizer_C[:, None])
        dlogits_CV = weight_C[:, None] * (probability_CV - is_true_CV)
        # Narrow, like the other operand of both products; these sum in float32 at least.
        dlogits_CV = dlogits_CV.astype(compute_dtype)
        dkernel_DV += product(x_CD.T, dlogits_CV)
        # The loss is linear in the weights, so nll is the gradient by them.
        return (total, dkernel_DV), (product(dlogits_CV, kernel_DV.T), nll_C)

    C = max(1, min(chunk, M))
    # The padding of the last chunk has weight 0.
    parts = jax.tree.map(lambda rows: _in_chunks(rows, C), (x_MD, weight_M, target_M))
    dkernel_DV = jnp.zeros(kernel_DV.shape, wide) if derivative else None
    start = jnp.zeros((), wide), dkernel_DV
    (total, dkernel_DV), of_tokens = lax.scan(of_chunk, start, parts)
    if dkernel_DV is None:
        return total, None
    dx, nll = of_tokens
    # Without the padding of the vocabulary and of the last chunk.
    return total, (dkernel_DV[:, :V], dx.reshape(-1, D)[:M], nll.reshape(-1)[:M])


def _padded(kernel_DV):
    V = kernel_DV.shape[1]
    added = -V % _LANES
    # Not where it would add more than 1/16 to the products.
    return jnp.pad(kernel_DV, ((0, 0), (0, added))) if 16 * added <= V else kernel_DV


def _in_chunks(rows, chunk):
    """[M, ...] -> [M / chunk, chunk, ...]; the last chunk is padded with zeros."""
    filled = jnp.pad(rows, ((0, -len(rows) % chunk), *((0, 0),) * (rows.ndim - 1)))
    return filled.reshape(-1, chunk, *rows.shape[1:])
