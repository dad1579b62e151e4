"""Numbers in 16 and in 8 bits, rounded up or down at random so that their mean is kept.

Stochastic rounding: Gupta et al. 2015, arXiv:1502.02551. What decides is a hash of the number and
the step: no key is needed, and layers that are stacked, split over devices or updated one by one
are all rounded alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

FLOAT8 = jnp.float8_e4m3fn  # a sign, 4 bits of exponent, 3 of mantissa; up to 448, no infinity
SMALLEST_NORMAL = 2.0**-6  # numbers below it have all the same gap, 2**-9
BLOCK_SIZES = (16, 128)


def round_to_bfloat16(x: jax.Array, step: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 next to it, each the likelier the nearer it is."""
    bits = _bits(x)
    noise = _random_bits(bits, step) >> 16
    # What is cut off is 16 bits: with as many random ones added, it carries as often as it should.
    rounded = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def round_to_float8(x: jax.Array, step: jax.Array, *, roots: bool = False) -> jax.Array:
    """float32 of at most 448 to one of the two float8_e4m3fn next to it; beyond 448 undefined.

    roots: x is not negative, and it is the mean of its square that is kept. What is not 0 does not
      become 0 then, as it may be divided by: it becomes at least 2**-9, the smallest float8.
    """
    bits = _bits(x)
    size = jnp.abs(x.astype(jnp.float32))
    gap = jnp.maximum(_power_of_two(size), SMALLEST_NORMAL) / 8
    gaps = size / gap  # exact; below 8 for subnormal numbers, from 8 to 16 for others
    low = jnp.floor(gaps)
    chance = gaps - low
    if roots:  # (gaps**2 - low**2) / ((low + 1)**2 - low**2)
        chance = chance * (gaps + low) / (2 * low + 1)
        chance = jnp.where((low == 0) & (gaps > 0), 1.0, chance)
    drawn = (_random_bits(bits, step) >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
    rounded = jnp.where(drawn < chance, low + 1, low) * gap
    return jnp.where(jnp.isfinite(x), jnp.copysign(rounded, x), jnp.nan).astype(FLOAT8)


def block_size(shape: Sequence[int]) -> int | None:
    """How many neighbours along the last axis share a scale: its largest divisor up to 128.

    None for arrays whose last axis has no divisor from 16: a scale for fewer would save little.
    """
    smallest, largest = BLOCK_SIZES
    sizes = range(largest, smallest - 1, -1) if shape and shape[-1] else ()
    return next((size for size in sizes if shape[-1] % size == 0), None)


def compressed_zeros(shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """(values, scales) of zeros. Compilers evaluate `compress` of a constant for minutes."""
    scales = jnp.zeros((*shape[:-1], shape[-1] // block_size(shape)), jnp.bfloat16)
    return jnp.zeros(shape, FLOAT8), scales


def compress(
    x: jax.Array, step: jax.Array, *, squares: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Numbers [.., n] in blockwise 8 bits (Dettmers et al. 2021, arXiv:2110.02861).

    squares: x is not negative, and spread widely: square roots of it are kept.

    Returns:
      values: float8_e4m3fn [.., n]; numbers of less than about 2**-16 of the largest in their block
        are rounded to multiples of that.
      scales: bfloat16 [.., n / block_size], powers of two. Scaling therefore rounds nothing: what
        did not change is rounded to itself, and what changed little is seldom moved. With the usual
        largest / 448 all numbers would be rounded anew in every step: noise that an average over
        1,000 steps, as Adam's of squares, adds up to several times itself.
    """
    kept = jnp.sqrt(x) if squares else x
    blocks = kept.astype(jnp.float32).reshape(*x.shape[:-1], -1, block_size(x.shape))
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    # The largest comes to lie in [128, 256], from where it can be rounded up.
    scales = jnp.maximum(_power_of_two(largest) * 2.0**-7, 2.0**-126)
    values = round_to_float8(blocks / scales, step, roots=squares)
    return values.reshape(x.shape), scales[..., 0].astype(jnp.bfloat16)


def expand(values: jax.Array, scales: jax.Array, *, squares: bool = False) -> jax.Array:
    """The float32 numbers that `compress` kept, as it rounded them. Exact."""
    blocks = values.astype(jnp.float32).reshape(*scales.shape, -1)
    x = (blocks * scales.astype(jnp.float32)[..., None]).reshape(values.shape)
    return jnp.square(x) if squares else x


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _power_of_two(size: jax.Array) -> jax.Array:
    """The largest that is not larger than a positive float32: its exponent alone."""
    return lax.bitcast_convert_type(_bits(size) & jnp.uint32(0x7F800000), jnp.float32)


def _random_bits(bits: jax.Array, step: jax.Array) -> jax.Array:
    return _hash(bits ^ _hash(step.astype(jnp.uint32)))


def _hash(bits: jax.Array) -> jax.Array:
    """uint32: every bit of the result depends on all (the finalizer of MurmurHash3, Appleby)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
