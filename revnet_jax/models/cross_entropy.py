"""The loss of a prediction among many classes, whose logits never exist together.

Dims: M tokens in a row, C those of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LANES = 128  # what products of 16 bits want a vocabulary to be a multiple of


def cross_entropy(
    kernel_DV: jax.Array,
    x_MD: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    compute_dtype: Any,
    chunk: int,
) -> jax.Array:
    """sum_m weight_m (log sum_v exp(logit_mv) - logit_m,target), logits = x kernel; in x's dtype.

    target_M: integers below V. compute_dtype: of the products' operands, the gradient of the logits
    among them; their sums, and all else, are in x's dtype. chunk: tokens whose logits exist
    together.

    Differentiable in all floats. Where a derivative is wanted, logits are still computed once:
    each chunk's gradient is taken beside its loss, as the loss is one number, and scaled afterwards
    by what that number's gradient turns out to be (Hsu et al. 2024, arXiv:2410.10989, section 3.2).

    Cost: 2 M D V operations, three times that with the gradient; memory: chunk x V logits and, with
    the gradient, those of the kernel and of x. The vocabulary is padded inside to a multiple of
    128, where that adds little: of odd ones NVIDIA's products are several times slower.
    """
    V = kernel_DV.shape[1]
    C = min(chunk, len(x_MD))

    def summed(kernel_DV, x_MD, weight_M, target_M, *, derivative):
        kernel_DV = _padded(kernel_DV.astype(compute_dtype))
        class_1V = jnp.arange(kernel_DV.shape[1], dtype=jnp.int32)[None]
        mask_1V = jnp.where(class_1V < V, 0, -jnp.inf).astype(x_MD.dtype)

        def of_chunk(carry, part):
            total, dkernel_DV = carry
            x_CD, weight_C, target_C = part
            x_CD = x_CD.astype(compute_dtype)
            logits_CV = jnp.matmul(x_CD, kernel_DV, preferred_element_type=total.dtype)
            # Vectors alone: JAX takes a whole array of zeros out of the loop, to be read each time.
            is_true_CV = (class_1V == target_C[:, None]).astype(total.dtype)
            normalizer_C = jax.nn.logsumexp(logits_CV + mask_1V, axis=1)
            # Without an index, of which the derivative and some hardware's version are slow.
            nll_C = normalizer_C - jnp.sum(is_true_CV * logits_CV, axis=1)
            total += jnp.sum(weight_C * nll_C)
            if not derivative:
                return (total, None), None
            probability_CV = jnp.exp(logits_CV + mask_1V - normalizer_C[:, None])
            dlogits_CV = weight_C[:, None] * (probability_CV - is_true_CV)
            dlogits_CV = dlogits_CV.astype(compute_dtype)
            product = lambda a, b: jnp.matmul(a, b, preferred_element_type=total.dtype)
            dkernel_DV += product(x_CD.T, dlogits_CV)
            return (total, dkernel_DV), (product(dlogits_CV, kernel_DV.T), nll_C)

        # What fills up the last chunk weighs nothing.
        parts = jax.tree.map(lambda rows: _in_chunks(rows, C), (x_MD, weight_M, target_M))
        dkernel_DV = jnp.zeros(kernel_DV.shape, x_MD.dtype) if derivative else None
        start = jnp.zeros((), x_MD.dtype), dkernel_DV
        (total, dkernel_DV), of_tokens = lax.scan(of_chunk, start, parts)
        if not derivative:
            return total
        dx_MD, nll_M = (rows.reshape(-1, *rows.shape[2:])[: len(x_MD)] for rows in of_tokens)
        return total, (dkernel_DV[:, :V], dx_MD, nll_M)

    @jax.custom_jvp
    def run(*arguments):
        return summed(*arguments, derivative=False)

    @run.defjvp
    def run_jvp(primals, tangents):
        total, gradients = summed(*primals, derivative=True)
        *moves, _ = tangents
        pairs = zip(gradients, moves, strict=True)
        return total, sum(jnp.sum(gradient * move) for gradient, move in pairs)

    return run(kernel_DV, x_MD, weight_M.astype(x_MD.dtype), target_M.astype(jnp.int32))


def _padded(kernel_DV):
    V = kernel_DV.shape[1]
    added = -V % _LANES
    return jnp.pad(kernel_DV, ((0, 0), (0, added))) if 16 * added <= V else kernel_DV


def _in_chunks(rows, chunk):
    """[M, ...] -> [M / chunk, chunk, ...]; the last is filled up with zeros."""
    filled = jnp.pad(rows, ((0, -len(rows) % chunk), *((0, 0),) * (rows.ndim - 1)))
    return filled.reshape(-1, chunk, *rows.shape[1:])
