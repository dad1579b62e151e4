"""Cross-entropy of a linear layer's outputs, from one chunk of tokens after the other.

Dims: M tokens in a row, C those of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.models.dtypes import at_least_float32

_LANES = 128  # what products of 16 bits want a vocabulary to be a multiple of


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

    target_M: integers; the sum is NaN where one is not in [0, V). compute_dtype: of the products'
      operands, the gradient of the logits among them; all else is float32 at least. chunk: tokens
      whose logits exist together.

    Differentiable in all floats. For a first derivative logits are still computed once: each
    chunk's gradient is taken beside its loss, as the loss is one number, and scaled afterwards by
    what that number's gradient turns out to be (Hsu et al. 2024, arXiv:2410.10989, section 3.2). A
    second derivative keeps the logits of all chunks. Raises ValueError for a chunk below 1.

    Cost: 2 M D V operations, three times that with the gradient. Memory: the kernel in
    `compute_dtype`, chunk x V logits and, with the gradient, those of the kernel and of x. The
    vocabulary is padded to a multiple of 128, where that adds little: NVIDIA's products of odd
    sizes are several times slower.
    """
    if chunk < 1:
        raise ValueError(f"got chunk={chunk}, expected 1 token or more")
    wide = at_least_float32(x_MD.dtype)
    sums = functools.partial(_sums, compute_dtype=compute_dtype, chunk=chunk)

    @jax.custom_jvp
    def run(*arguments):
        return sums(*arguments, derivative=False)[0]

    @run.defjvp
    def run_jvp(primals, tangents):
        total, gradients = sums(*primals, derivative=True)
        *moves, _ = tangents
        pairs = zip(gradients, moves, strict=True)
        return total, sum(jnp.sum(gradient * move.astype(wide)) for gradient, move in pairs)

    return run(kernel_DV, x_MD, weight_M.astype(wide), target_M.astype(jnp.int32))


def _sums(kernel_DV, x_MD, weight_M, target_M, *, compute_dtype, chunk, derivative):
    """(the sum, its gradient by kernel, x and weights, or None); all of the weights' dtype."""
    (M, D), V, wide = x_MD.shape, kernel_DV.shape[1], weight_M.dtype
    kernel_DV = _padded(kernel_DV.astype(compute_dtype))
    class_1V = jnp.arange(kernel_DV.shape[1], dtype=jnp.int32)[None]
    # Added, not selected: JAX would keep a selection's constant as an array of all logits' size.
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
        probability_CV = jnp.exp(logits_CV + mask_1V - normalizer_C[:, None])
        dlogits_CV = weight_C[:, None] * (probability_CV - is_true_CV)
        dlogits_CV = dlogits_CV.astype(compute_dtype)
        dkernel_DV += product(x_CD.T, dlogits_CV)
        return (total, dkernel_DV), (product(dlogits_CV, kernel_DV.T), nll_C)

    C = max(1, min(chunk, M))
    # What fills up the last chunk weighs nothing.
    parts = jax.tree.map(lambda rows: _in_chunks(rows, C), (x_MD, weight_M, target_M))
    dkernel_DV = jnp.zeros(kernel_DV.shape, wide) if derivative else None
    start = jnp.zeros((), wide), dkernel_DV
    (total, dkernel_DV), of_tokens = lax.scan(of_chunk, start, parts)
    if not derivative:
        return total, None
    dx, nll = of_tokens
    return total, (dkernel_DV[:, :V], dx.reshape(-1, D)[:M], nll.reshape(-1)[:M])


def _padded(kernel_DV):
    V = kernel_DV.shape[1]
    added = -V % _LANES
    return jnp.pad(kernel_DV, ((0, 0), (0, added))) if 16 * added <= V else kernel_DV


def _in_chunks(rows, chunk):
    """[M, ...] -> [M / chunk, chunk, ...]; the last is filled up with zeros."""
    filled = jnp.pad(rows, ((0, -len(rows) % chunk), *((0, 0),) * (rows.ndim - 1)))
    return filled.reshape(-1, chunk, *rows.shape[1:])
