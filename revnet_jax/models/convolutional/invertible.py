"""Invertible changes of resolution and channels, so that a whole network can be inverted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from revnet_jax.core import Invertible


def space_to_depth(x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H/2, W/2, 4C]: every 2x2 square of pixels becomes one pixel.

    Dinh et al. 2016 (arXiv:1605.08803, section 3.6, the squeeze); i-RevNet (Jacobsen et al. 2018,
    arXiv:1802.07088, section 3.1).
    """
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C)
    # [B, H/2, 2, W/2, 2, C] -> [B, H/2, W/2, 2, 2, C]: the four pixels of a square side by side.
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // 2, W // 2, 4 * C)


def depth_to_space(x_BHWC: jax.Array) -> jax.Array:
    """Undoes `space_to_depth`."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H, W, 2, 2, C // 4)
    # The permutation swaps two axes, so that it is its own inverse.
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, 2 * H, 2 * W, C // 4)


def squeeze() -> Invertible:
    """A layer that halves the resolution of every stream. No parameters; exactly invertible."""
    return Invertible(
        apply=lambda params, x, context: tuple(map(space_to_depth, x)),
        undo=lambda params, y, context: tuple(map(depth_to_space, y)),
    )


class PadStem(nnx.Module):
    """Image -> features, by appending channels of zeros; dropping them inverts it."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.added = out_channels - in_channels

    def __call__(self, image_BHWC: jax.Array, *, train: bool) -> jax.Array:
        # The barrier hides that these are zeros. A compiler would otherwise merge the constant with
        # a constant of a branch, and compile that branch differently in the rewind.
        zero = lax.optimization_barrier(jnp.zeros((), image_BHWC.dtype))
        return lax.pad(image_BHWC, zero, ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, self.added, 0)))
