"""Linear layers of a decoder, with what is added to them for fine-tuning."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from revnet_jax.models.dtypes import at_least_float32
from revnet_jax.models.int8 import quantized


class LoRA(NamedTuple):
    """Low-rank adaptation of a kernel W: W + scale A B (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
      rank: columns of A and rows of B; 0 for no adaptation.
      scale: the paper's alpha / rank.
    """

    rank: int = 0
    scale: float = 1.0


NO_LORA = LoRA()


class Linear(nnx.Module):
    """x @ kernel, or x @ kernel + bias, computed in `dtype`.

    The kernel is initialised from a normal of standard deviation `std`, the bias with zeros.

    `outputs` is the last dimension of the output, or its last dimensions. With `lora` the
    parameters `lora_a` [inputs, rank] and `lora_b` [rank, *outputs] are added; `lora_b` starts as
    zeros, so that the layer starts as it was. The product of both is never formed. With `int8`
    the kernel is kept in 8 bits, frozen, and has the parameter `kernel_scale` [*outputs]: see
    `models/int8.py`.
    """

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        std: float,
        dtype,
        rngs: nnx.Rngs,
        bias: bool = False,
        lora: LoRA = NO_LORA,
        int8: bool = False,
    ):
        kernel = std * jax.random.normal(rngs.params(), (inputs, *outputs))
        if int8:
            kernel, scale = quantized(kernel)
            self.kernel_scale = nnx.Param(scale)
        self.kernel = nnx.Param(kernel)
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs))
        if lora.rank:
            # x A is then about as large as x.
            down = inputs**-0.5 * jax.random.normal(rngs.params(), (inputs, lora.rank))
            self.lora_a, self.lora_b = nnx.Param(down), nnx.Param(jnp.zeros((lora.rank, *outputs)))
        self.dtype, self.has_bias, self.lora, self.int8 = dtype, bias, lora, int8

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        y = jnp.tensordot(x, self.kernel[...].astype(self.dtype), 1)
        if self.int8:
            # Up to 127, whole numbers are exact in every dtype. Their product with the scale would
            # not be, so it is the sum that is scaled.
            wide = at_least_float32(self.dtype)
            y = (y.astype(wide) * leading(self.kernel_scale[...].astype(wide), y)).astype(y.dtype)
        if self.lora.rank:
            a, b = (leaf[...].astype(self.dtype) for leaf in (self.lora_a, self.lora_b))
            y = y + jnp.asarray(self.lora.scale, y.dtype) * jnp.tensordot(x @ a, b, 1)
        return y + leading(self.bias[...].astype(self.dtype), y) if self.has_bias else y


def merged_kernel(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """A kernel with the product of its low-rank matrices added, in their dtype: see `LoRA`.

    Args:
      kernel: [inputs, *outputs], of one layer; NumPy or JAX, like the others.
      a: [inputs, rank].
      b: [rank, *outputs].
    """
    product = a @ b.reshape(len(b), -1)
    return kernel.astype(product.dtype) + scale * product.reshape(kernel.shape)


class Adapter(nnx.Module):
    """gelu(x A) B, which starts at zero (Houlsby et al. 2019, arXiv:1902.00751).

    The branch that makes a layer reversible under the integrator "meft". Like its authors' for
    decoders, it reads a stream as it is, without a normalisation.
    """

    def __init__(self, width: int, rank: int, *, dtype, rngs: nnx.Rngs):
        down = width**-0.5 * jax.random.normal(rngs.params(), (width, rank))
        self.adapter_a, self.adapter_b = nnx.Param(down), nnx.Param(jnp.zeros((rank, width)))
        self.dtype = dtype

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        a, b = (leaf[...].astype(self.dtype) for leaf in (self.adapter_a, self.adapter_b))
        return jax.nn.gelu(x_BTD.astype(self.dtype) @ a, approximate=True) @ b


def leading(parameter, x):
    """A parameter with axes of size 1 before its own, so that it broadcasts over `x`."""
    return jnp.expand_dims(parameter, tuple(range(x.ndim - parameter.ndim)))
