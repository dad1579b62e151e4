"""Kernels in 8 bits: whole numbers, with one scale for each output channel.

Dettmers et al. 2022 (LLM.int8(), arXiv:2208.07339, section 2), absmax quantisation by column. One
scale per channel rather than per block (QLoRA, arXiv:2305.14314) can be multiplied after the
product, so that kernels are used as they are: no rounded copy of them is made.
"""

from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.models.dtypes import at_least_float32

LARGEST = 127  # -128 is not used, so that the range is symmetric


def quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds a kernel [inputs, *outputs] to the nearest multiples of each output channel's scale.

    Returns:
      numbers: int8 [inputs, *outputs], from -127 to 127.
      scale: float32 [*outputs] (float64 for a float64 kernel), the channel's largest absolute value
        / 127; 0 for a channel of zeros. A weight differs from number * scale by at most scale / 2.
    """
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    scale = jnp.max(jnp.abs(kernel), axis=0) / LARGEST
    numbers = jnp.round(kernel / jnp.where(scale > 0, scale, 1)[None])
    return jnp.clip(numbers, -LARGEST, LARGEST).astype(jnp.int8), scale


def dequantized(numbers: Any, scale: Any) -> Any:
    """The kernel [inputs, *outputs] that `quantized` keeps, in the dtype of the scale.

    Takes NumPy or JAX arrays.
    """
    return numbers.astype(scale.dtype) * scale[None]
