"""Exact streams: round every update to a power-of-two grid, so that undoing it loses no bit.

In floating point `(x + u) - u` is not `x`, and over many layers the difference grows until the
gradient computed from reconstructed activations is wrong. On a grid of spacing `2**-bits`, sums
and differences of floats are exact as long as they stay inside the range where floats are spaced
no more coarsely than the grid. Then inverse(forward(x)) == x, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from revnet_jax.core import trees
from revnet_jax.core.constants import is_whole

# 2**-12 is 32 times finer than bfloat16 is near 1 (2**-7), and leaves float32 streams +-2**12.
DEFAULT_BITS = 12


@dataclass(frozen=True)
class Grid:
    """The multiples of `2**-bits`; addition on them is exact while `|x| < limit(dtype)`.

    Attributes:
      bits: the default, 12, gives float32 streams a resolution of 2.4e-4 and a range of +-4096.
        Updates smaller than half of the resolution round to zero: if all of them are (an ODE with
        steps of 1e-4, for example), the state does not move. Then take more bits (20: 9.5e-7 and
        +-16); `check_reversible` counts the updates that round to zero.

    Rounding makes a layer a step function, while its gradient is that of the function before
    rounding. To check a gradient by numerical differentiation, build the block with `grid=None`.
    """

    bits: int = DEFAULT_BITS

    def __post_init__(self):
        # At 22 bits a float32 stream, of 24 binary digits, still reaches +-4; at 24 it would reach
        # +-1.
        if not is_whole(self.bits) or not 0 <= self.bits <= 22:
            raise ValueError(f"got a grid of {self.bits!r} bits, expected a whole number, 0 to 22")

    def snap(self, tree: Any) -> Any:
        """Rounds every array to the nearest grid point; the gradient passes straight through.

        Beyond `limit(dtype)` a float has no digits finer than the grid: nothing is rounded here,
        and arithmetic degrades to ordinary floating point. Negative zero becomes zero, because
        `(-0.0 + u) - u` is `+0.0`. Cost: elementwise, fused into the update.
        """
        return jax.tree.map(lambda x: _snap(x, self.bits), tree)

    def limit(self, dtype: Any) -> float:
        """The range inside which streams of `dtype` are exact: 4096.0 for float32 at 12 bits."""
        # The leading 1 of a mantissa is not stored. A float of p digits holds every integer up to
        # 2**p, and so every multiple of 2**-bits up to 2**(p - bits).
        precision = jnp.finfo(dtype).nmant + 1
        return 2.0 ** (precision - self.bits)

    def check(self, streams: Any) -> None:
        """Raises TypeError for streams too narrow to hold the grid."""
        for leaf in jax.tree.leaves(streams):
            dtype = trees.dtype_of(leaf)
            if dtype not in (jnp.float32, jnp.float64):
                raise TypeError(
                    f"got a {dtype} stream, expected float32 (or float64): a narrower stream has "
                    "too few digits to be undone exactly. Cast the chain's input to float32 and "
                    "let the branches compute in their own dtype, or build the block with grid=None"
                )


def _snap(x: jax.Array, bits: int) -> jax.Array:
    # Rounding is not differentiated: `straight_through` takes the tangent of x alone.
    constant_x = lax.stop_gradient(x)
    scale = jnp.asarray(2.0**bits, x.dtype)
    # The scale is a power of two, so product and quotient are exact, and only `round` rounds.
    snapped = jnp.round(constant_x * scale) / scale
    # -0.0 == 0 holds, so this replaces both zeros by +0.0.
    snapped = jnp.where(snapped == 0, jnp.zeros_like(snapped), snapped)
    # If x * scale overflows, x is so large that it is on the grid already.
    return straight_through(x, jnp.where(jnp.isinf(snapped), constant_x, snapped))


def straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """Returns `value` with the derivatives of `x`, of any order (straight-through estimator).

    Args:
      x: an array.
      value: an array of the same shape and dtype.
    """
    return _straight_through_p.bind(x, value)


# A primitive rather than a custom_jvp: when `lax.scan` is differentiated twice, JAX drops custom
# rules after the first time, and rounding would then have derivative 0. It is lowered to `value`,
# so the compiled program contains no operation for it.
_straight_through_p = Primitive("straight_through")
_straight_through_p.def_impl(lambda x, value: value)
_straight_through_p.def_abstract_eval(lambda x, value: x)
mlir.register_lowering(_straight_through_p, lambda context, x, value: [value])
# The tangent of x passes unchanged, also where it is a symbolic zero. No transpose rule is needed,
# because tangents never go through the primitive itself.
ad.primitive_jvps[_straight_through_p] = lambda primals, tangents: (
    _straight_through_p.bind(*primals),
    tangents[0],
)


def _batch_straight_through(arrays, axes):
    pairs = list(zip(arrays, axes, strict=True))
    (size,) = {a.shape[i] for a, i in pairs if i is not None}
    # Both get the batch as axis 0: the primitive takes two arrays of equal shape.
    x, value = (
        jnp.broadcast_to(a, (size, *a.shape)) if i is None else jnp.moveaxis(a, i, 0)
        for a, i in pairs
    )
    return _straight_through_p.bind(x, value), 0


batching.primitive_batchers[_straight_through_p] = _batch_straight_through


def snap(grid: Grid | None, tree: Any) -> Any:
    """`grid.snap(tree)`, or `tree` itself if `grid` is None. For use in couplings."""
    return tree if grid is None else grid.snap(tree)
