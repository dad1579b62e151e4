"""The parts of residual image networks: stem, branches, shortcuts, head (Gomez et al. 2017).

Streams are float32. Branches compute in `dtype` (mixed precision); batch statistics are always
float32 at least.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from revnet_jax.models.convolutional.conv import conv
from revnet_jax.models.dtypes import at_least_float32

# Sharding of a unit's weights: the channels inside it over "tensor", the others over "fsdp".
RULES = (
    (r"stem/conv/kernel$", (None, "fsdp")),
    (r"head/dense/kernel$", ("fsdp", None)),
    (r"convs/0/kernel$", ("fsdp", "tensor")),
    (r"convs/1/kernel$", ("tensor", "fsdp")),
    # Shortcuts, and the third convolution of a bottleneck.
    (r"kernel$", ("fsdp", None)),
)


def batch_norm(channels: int, dtype: Any, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalisation in float32 at least; `dtype` is that of the convolutions."""
    wide = at_least_float32(dtype)
    return nnx.BatchNorm(channels, momentum=0.99, epsilon=1e-3, dtype=wide, rngs=rngs)


class Conv(nnx.Module):
    """A "SAME" convolution without bias, with He initialisation (fan-out), computed in `dtype`."""

    def __init__(self, in_channels, out_channels, size, *, stride=1, dtype, rngs):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        # Cast at use: the gradient is cast back to the dtype that the parameter is kept in.
        kernel = self.kernel[...].astype(self.dtype)
        return conv(x_BHWC.astype(self.dtype), kernel, stride=self.stride)


class Stem(nnx.Module):
    """Image -> the first features, float32: convolution, batch normalisation, ReLU.

    Args:
      kind: "cifar" (3x3) or "imagenet" (7x7 stride 2, then 3x3 max-pooling stride 2).
    """

    def __init__(self, in_channels, out_channels, *, kind: str, dtype, rngs):
        size, stride = {"cifar": (3, 1), "imagenet": (7, 2)}[kind]
        self.kind = kind
        self.conv = Conv(in_channels, out_channels, size, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(out_channels, dtype, rngs)

    def __call__(self, image_BHWC: jax.Array, *, train: bool) -> jax.Array:
        x_BHWC = nnx.relu(self.norm(self.conv(image_BHWC), use_running_average=not train))
        if self.kind == "imagenet":
            x_BHWC = nnx.max_pool(x_BHWC, (3, 3), strides=(2, 2), padding="SAME")
        return x_BHWC


class ResidualBranch(nnx.Module):
    """A residual branch: (batch normalisation, ReLU, convolution), two or three times.

    Pre-activation (He et al. 2016, arXiv:1603.05027). Two 3x3 convolutions; or, with `bottleneck`,
    1x1, 3x3, 1x1 with a quarter of the output channels inside. The first convolution has the
    stride.

    Args:
      activate_first: whether batch normalisation and ReLU come before the first convolution.
    """

    def __init__(
        self, in_channels, out_channels, *, stride, bottleneck, activate_first: bool, dtype, rngs
    ):
        inner, sizes = (out_channels // 4, (1, 3, 1)) if bottleneck else (out_channels, (3, 3))
        widths = [in_channels] + [inner] * (len(sizes) - 1) + [out_channels]
        self.dtype = dtype
        self.convs = nnx.List([])
        self.norms = nnx.List([])
        for i, size in enumerate(sizes):
            if i > 0 or activate_first:
                self.norms.append(batch_norm(widths[i], dtype, rngs))
            step = stride if i == 0 else 1
            self.convs.append(
                Conv(widths[i], widths[i + 1], size, stride=step, dtype=dtype, rngs=rngs)
            )

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        # 1 if the first convolution has no normalisation before it, else 0.
        without = len(self.convs) - len(self.norms)
        for i, convolution in enumerate(self.convs):
            if i >= without:
                # Normalised in float32 at least, then convolved in `dtype`.
                x_BHWC = self.norms[i - without](x_BHWC, use_running_average=not train)
                x_BHWC = nnx.relu(x_BHWC).astype(self.dtype)
            x_BHWC = convolution(x_BHWC)
        return x_BHWC


class PooledShortcut(nnx.Module):
    """A shortcut without parameters: average pooling, and zero channels added on both sides."""

    def __init__(self, in_channels, out_channels, *, stride):
        # Half of the added channels before the others; one more after them if the number is odd.
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before
        self.stride = stride

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        window = (1, self.stride, self.stride, 1)
        sums_BHWC = lax.reduce_window(x_BHWC, 0.0, lax.add, window, window, "SAME")
        x_BHWC = sums_BHWC / self.stride**2
        return jnp.pad(x_BHWC, ((0, 0), (0, 0), (0, 0), (self.before, self.after)))


def make_shortcut(in_channels, out_channels, *, stride, bottleneck, dtype, rngs) -> Any:
    """The shortcut of a unit that changes width or resolution.

    A 1x1 convolution for bottleneck units, otherwise pooling without parameters.
    """
    if bottleneck:
        return Conv(in_channels, out_channels, 1, stride=stride, dtype=dtype, rngs=rngs)
    return PooledShortcut(in_channels, out_channels, stride=stride)


class ConvHead(nnx.Module):
    """Features -> logits: batch normalisation, ReLU, global average pooling, a dense layer."""

    def __init__(self, channels, num_classes, *, dtype, rngs):
        self.norm = batch_norm(channels, dtype, rngs)
        self.dense = nnx.Linear(channels, num_classes, dtype=at_least_float32(dtype), rngs=rngs)

    def __call__(self, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        x_BHWC = nnx.relu(self.norm(x_BHWC, use_running_average=not train))
        return self.dense(jnp.mean(x_BHWC, axis=(1, 2)))
