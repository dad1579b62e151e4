"""Stochastic rounding to 16 and 8 bits: up or down at random, so that the mean is kept.

Gupta et al. 2015, arXiv:1502.02551. The random bits are a hash of the number and the step. So no
key is needed, and layers are rounded alike whether they are stacked, split over devices or updated
one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

FLOAT8 = jnp.float8_e4m3fn  # a sign, 4 bits of exponent, 3 of mantissa; up to 448, no infinity
SMALLEST_NORMAL = 2.0**-6  # smaller numbers are subnormal, with a gap of 2**-9
# The scale's 2 bytes add an eighth to the smallest block, and a sixty-fourth to the largest.
BLOCK_SIZES = (16, 128)


def round_to_bfloat16(x: jax.Array, step: jax.Array) -> jax.Array:
    """Rounds float32 to one of its two bfloat16 neighbours, more likely to the nearer one."""
    bits = _bits(x)
    noise = _random_bits(bits, step) >> 16
    # Truncation cuts off the low 16 bits. Adding 16 random bits before carries into the upper half
    # with exactly the probability of rounding up.
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    # A NaN would become a zero where its mantissa overflows, an infinity where it is cut off.
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_to_float8(x: jax.Array, step: jax.Array, *, roots: bool = False) -> jax.Array:
    """Rounds float32 to one of its two float8_e4m3fn neighbours. Undefined for |x| above 448.

    Args:
      roots: x holds square roots (not negative), and rounding keeps the mean of the square. Numbers
        above 0 become at least 2**-9, the smallest float8, because an optimizer may divide by them.
    """
    bits = _bits(x)
    size = jnp.abs(x.astype(jnp.float32))
    # 3 bits of mantissa are 8 steps from a power of two to the next.
    gap = jnp.maximum(_power_of_two(size), SMALLEST_NORMAL) / 8
    gaps = size / gap  # exact; below 8 for subnormal numbers, from 8 to 16 for others
    low = jnp.floor(gaps)
    chance = gaps - low
    if roots:  # (gaps**2 - low**2) / ((low + 1)**2 - low**2)
        chance = chance * (gaps + low) / (2 * low + 1)
        chance = jnp.where((low == 0) & (gaps > 0), 1.0, chance)
    # 24 bits, because float32 holds every integer of that length exactly.
    drawn = (_random_bits(bits, step) >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
    rounded = jnp.where(drawn < chance, low + 1, low) * gap
    # This dtype has no infinity, so what is not finite becomes NaN.
    return jnp.where(jnp.isfinite(x), jnp.copysign(rounded, x), jnp.nan).astype(FLOAT8)


def block_size(shape: Sequence[int]) -> int | None:
    """How many neighbours on the last axis share a scale: the largest divisor of it up to 128.

    None if there is no divisor of at least 16, because scales of smaller blocks would save little.
    """
    smallest, largest = BLOCK_SIZES
    sizes = range(largest, smallest - 1, -1) if shape and shape[-1] else ()
    return next((size for size in sizes if shape[-1] % size == 0), None)


def compressed_zeros(shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(values, scales) of zeros. XLA would spend minutes on folding `compress` of a constant."""
    size = block_size(shape)
    assert size is not None, shape  # callers compress only what has blocks
    scales = jnp.zeros((*shape[:-1], shape[-1] // size), jnp.bfloat16)
    return jnp.zeros(shape, FLOAT8), scales


def compress(
    x: jax.Array, step: jax.Array, *, squares: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Compresses numbers [.., n] to blockwise 8 bits (Dettmers et al. 2021, arXiv:2110.02861).

    Args:
      squares: x holds averages of squares (not negative, of a wide range); their roots are kept.

    Returns:
      values: float8_e4m3fn [.., n]. Numbers below about 2**-16 of the largest in their block are
        rounded to multiples of that.
      scales: bfloat16 [.., n / block_size], powers of two, so that scaling is exact. A number that
        did not change is then rounded to itself, and one that changed little seldom moves. With
        the usual scale, largest / 448, every step would round all numbers anew. An average over
        1,000 steps, such as Adam's average of squares, adds such noise up to several times itself.
    """
    kept = jnp.sqrt(x) if squares else x
    # [.., n / size, size]; the scales keep an axis of 1 to divide by.
    blocks = kept.astype(jnp.float32).reshape(*x.shape[:-1], -1, block_size(x.shape))
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    # The largest number is scaled into [128, 256), so that rounding up stays below 448.
    # 2**-126, the smallest normal number, is for blocks of zeros, which must not divide by zero.
    scales = jnp.maximum(_power_of_two(largest) * 2.0**-7, 2.0**-126)
    values = round_to_float8(blocks / scales, step, roots=squares)
    # bfloat16 has the exponents of float32, so it holds these powers of two exactly.
    return values.reshape(x.shape), scales[..., 0].astype(jnp.bfloat16)


def expand(values: jax.Array, scales: jax.Array, *, squares: bool = False) -> jax.Array:
    """Returns the float32 numbers that `compress` kept. Rounds nothing more."""
    blocks = values.astype(jnp.float32).reshape(*scales.shape, -1)
    x = (blocks * scales.astype(jnp.float32)[..., None]).reshape(values.shape)
    return jnp.square(x) if squares else x


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _power_of_two(size: jax.Array) -> jax.Array:
    """The largest power of two up to a positive float32: its exponent, with mantissa 0."""
    return lax.bitcast_convert_type(_bits(size) & jnp.uint32(0x7F800000), jnp.float32)


def _random_bits(bits: jax.Array, step: jax.Array) -> jax.Array:
    return _hash(bits ^ _hash(step.astype(jnp.uint32)))


def _hash(bits: jax.Array) -> jax.Array:
    """Hashes uint32, so that every bit affects all others (finalizer of MurmurHash3, Appleby)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
