"""Exact multiplication of a stream on the grid: what rounding loses is kept as one bit.

A coupling that multiplies a stream by less than 1 maps several grid points to one, so no inverse
can tell which it was. For a scale of at least 1/2 there are at most two, and one bit says which:
the **residue**. After Maclaurin et al. 2015 (arXiv:1502.03492, algorithm 3) and MacKay et al. 2018
(arXiv:1810.10999), who keep the remainders of such divisions too; here every scale is a fraction
with denominator 2**12 and the arithmetic is that of integers, so nothing is left to rounding modes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core.grid import Grid, straight_through

SCALE_BITS = 12
_ONE = 2**SCALE_BITS  # the denominator of every scale
_HALF = _ONE // 2


def multiply(x: jax.Array, scale: jax.Array, grid: Grid | None) -> tuple[jax.Array, Any]:
    """`scale * x`, rounded to the grid: (y, residue).

    scale: a multiple of 2**-12 in [1/2, 2], of a shape that broadcasts to x's; differentiated.
    residue: uint8, one bit for each element of x (see `pack`); None where `grid` is None, and then
      y is not rounded either.

    Beyond the grid's range nothing is exact: y is the ordinary product and the residue is 0.
    """
    if grid is None:
        return x * scale, None
    scale = jnp.broadcast_to(scale, x.shape)
    product = x * scale
    in_range = (jnp.abs(x) < grid.limit(x.dtype)) & ~jnp.isnan(scale)  # integers know no NaN
    n, p = _to_integer(x, grid.bits), _to_integer(scale, SCALE_BITS)
    # round(n * p / 2**12), taking n apart so that no product leaves the integers' range.
    m = (n >> SCALE_BITS) * p + (((n & (_ONE - 1)) * p + _HALF) >> SCALE_BITS)
    rounded = jnp.where(in_range, _to_float(m, x.dtype, grid.bits), lax.stop_gradient(product))
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
    # Larger ones belong to no x in range, and their integers may have overflowed.
    in_range = jnp.abs(quotient) <= grid.limit(y.dtype)
    x = jnp.where(in_range, x, lax.stop_gradient(quotient))
    # The derivative is that of the inverse at x, not at the quotient, which is off by what the
    # product was rounded by. Compiled where second derivatives are taken, and nowhere else.
    rounded_by = jnp.where(in_range, lax.stop_gradient(x * scale - y), jnp.zeros_like(y))
    return straight_through((y + rounded_by) / scale, x)


def pack(bits: jax.Array) -> jax.Array:
    """Booleans to uint8, eight to a byte; a leading batch axis is kept, so that it can be sharded.

    Rows are padded to whole bytes.
    """
    # Not -1, which no size can be told from where there are no rows.
    shape = (bits.shape[0], math.prod(bits.shape[1:])) if bits.ndim > 1 else (bits.size,)
    return jnp.packbits(bits.reshape(shape), axis=-1)


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `pack` for an array of this shape; uint8 zeros and ones."""
    row = math.prod(shape[1:] if len(shape) > 1 else shape)
    if not packed.size:
        return jnp.zeros(shape, jnp.uint8)
    return jnp.unpackbits(packed, axis=-1, count=row).reshape(shape)


def _first_preimage(m, p):
    """The smallest integer n with round(n * p / 2**12) == m, where there is one: a ceiling."""
    p = jnp.maximum(p, 1)
    return (m // p) * _ONE + ((m % p) * _ONE - _HALF + p - 1) // p


def _to_integer(x, bits):
    """Grid points to integers; int32 holds all of float32's range, int64 of float64's."""
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    return (lax.stop_gradient(x) * jnp.asarray(2.0**bits, x.dtype)).astype(integer)


def _to_float(n, dtype, bits):
    return n.astype(dtype) / jnp.asarray(2.0**bits, dtype)
