"""Exact multiplication of a stream on the grid: what rounding loses is kept as one bit.

A coupling that multiplies a stream by less than 1 maps several grid points to one, so its inverse
needs more information. For a scale of at least 1/2 at most two points map to one, and one bit, the
**residue**, tells them apart. Maclaurin et al. 2015 (arXiv:1502.03492, algorithm 3) and MacKay et
al. 2018 (arXiv:1810.10999) also keep the remainders of such divisions. Here every scale is a
fraction with denominator 2**12 and the arithmetic is in integers, so no rounding mode matters.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees
from revnet_jax.core.grid import Grid, straight_through

# With 12 digits for a scale and 24 for a float32 stream, `multiply` does with 32-bit integers.
SCALE_BITS = 12
_ONE = 2**SCALE_BITS  # the denominator of every scale
_HALF = _ONE // 2


def multiply(x: jax.Array, scale: jax.Array, grid: Grid | None) -> tuple[jax.Array, Any]:
    """Computes `scale * x`, rounded to the grid: (y, residue).

    - scale: a multiple of 2**-12 in [1/2, 2], of a shape that broadcasts to x's; differentiated.
    - residue: uint8, one bit for each element of x (see `pack`). If `grid` is None there is no
      residue (None), and y is not rounded.

    Outside the grid's range y is the ordinary product and the residue is 0, so it is not exact.
    """
    if grid is None:
        return x * scale, None
    scale = jnp.broadcast_to(scale, x.shape)
    product = x * scale
    # A NaN has no integer, so an element with a NaN scale takes the ordinary product.
    in_range = (jnp.abs(x) < grid.limit(x.dtype)) & ~jnp.isnan(scale)
    n, p = _to_integer(x, grid.bits), _to_integer(scale, SCALE_BITS)
    # round(n * p / 2**12), computed from n's high and low bits so that no product overflows.
    # n * p = 2**12 (n >> 12) p + (n & 4095) p, for negative n too, because >> rounds down. With |n|
    # < 2**24 and p <= 2**13 all terms are below 2**26; n * p may have 37 bits.
    m = (n >> SCALE_BITS) * p + (((n & (_ONE - 1)) * p + _HALF) >> SCALE_BITS)
    rounded = jnp.where(in_range, _to_float(m, x.dtype, grid.bits), lax.stop_gradient(product))
    # As p >= 2**11, no more than two neighbouring n have the same m.
    is_second = in_range & (n != _first_preimage(m, p))
    return straight_through(product, rounded), pack(is_second)


def divide(y: jax.Array, residue: Any, scale: jax.Array, grid: Grid | None) -> jax.Array:
    """Undoes `multiply`, bit for bit while |x| and |y| are below the grid's limit."""
    if grid is None:
        return y / scale
    scale = jnp.broadcast_to(scale, y.shape)
    first = _first_preimage(_to_integer(y, grid.bits), _to_integer(scale, SCALE_BITS))
    x = _to_float(first + unpack(residue, y.shape).astype(first.dtype), y.dtype, grid.bits)
    quotient = y / scale
    # A larger quotient comes from no x in range, and its integer may have overflowed.
    in_range = jnp.abs(quotient) <= grid.limit(y.dtype)
    x = jnp.where(in_range, x, lax.stop_gradient(quotient))
    # The derivative is that of the inverse at x, not at the quotient, which differs from x by the
    # rounding of the product. Compiled only where second derivatives are taken.
    rounded_by = jnp.where(in_range, lax.stop_gradient(x * scale - y), jnp.zeros_like(y))
    return straight_through((y + rounded_by) / scale, x)


def pack(bits: jax.Array) -> jax.Array:
    """Packs booleans into uint8, eight to a byte, padding each row to whole bytes.

    A leading batch axis is kept, so that the result can be sharded over it. All axes are kept where
    another is split by its type, as JAX refuses to reshape it.
    """
    if any(n > 1 for n in trees.parts(bits)[1:]):
        return jnp.packbits(bits, axis=-1)
    # The row size is computed: reshape cannot infer -1 for an empty batch.
    shape = (bits.shape[0], math.prod(bits.shape[1:])) if bits.ndim > 1 else (bits.size,)
    return jnp.packbits(bits.reshape(shape), axis=-1)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack`: uint8 zeros and ones, of this shape."""
    row = shape[-1] if packed.ndim == len(shape) else math.prod(shape[1:])
    if not packed.size:
        return jnp.zeros(shape, jnp.uint8)
    return jnp.unpackbits(packed, axis=-1, count=row).reshape(shape)


def _first_preimage(m, p):
    """The smallest integer n with round(n * p / 2**12) == m, if there is one (a ceiling)."""
    # A scale of 0, as bdia has at inference, has no inverse, but must not divide by zero.
    p = jnp.maximum(p, 1)
    # round(n p / 2**12) = m means m 2**12 - 2**11 <= n p < m 2**12 + 2**11. So n is the ceiling of
    # (m 2**12 - 2**11) / p. Dividing m by p first avoids m 2**12, which may overflow.
    return (m // p) * _ONE + ((m % p) * _ONE - _HALF + p - 1) // p


def _to_integer(x, bits):
    """Grid points as integers. int32 holds the whole range of float32 streams, int64 of float64."""
    # Beyond the grid's range the conversion may give any integer, which callers discard.
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    return (lax.stop_gradient(x) * jnp.asarray(2.0**bits, x.dtype)).astype(integer)


def _to_float(n, dtype, bits):
    return n.astype(dtype) / jnp.asarray(2.0**bits, dtype)
