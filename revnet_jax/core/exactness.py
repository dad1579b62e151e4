"""The run-time check that a chain was undone exactly.

Exactness requires that a branch gives the same bits in the forward and in the backward loop. A
compiler may break that (other fusions, autotuned kernels, atomics), so it is measured, not assumed.
A backward pass can return nothing but cotangents, so the result is the cotangent of a dummy
argument, the probe:

    def loss(params, probe):
        y, aux = chain(block, params, x, probe=probe)
        ...
    dparams, exactness = jax.grad(loss, argnums=(0, 1))(params, Exactness.probe())
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A bin is the bits of a float32 without the lowest 20: the exponent and 3 bits of the mantissa.
_CUT = 20
# 31 bits and not 32, because sizes have no sign.
_BINS = 2 ** (31 - _CUT)


class Exactness(NamedTuple):
    """The result of the exactness check of a chain's rewinds; float32.

    Attributes:
      mismatches: number of elements of the reconstructed chain input that differ from the true one
        (NaNs count; exact up to 2**24, rounded above, never rounded to 0).
      differences: [2048], a histogram over rewinds of the largest difference.
      magnitudes: [2048], a histogram over rewinds of the largest |x|.
      updates: number of updates of single elements on a grid, of those looked at: eight elements of
        each example at most, in every stream that a half-step updates.
      lost_updates: number of those that rounded to nothing.

    JAX sums cotangents wherever a probe is used more than once: in several chains, in the
    iterations of a loop, in the examples of a `vmap`, on the devices of a `shard_map`. A maximum
    would not survive a sum. So all are counts, which may be summed or averaged, and the
    maxima are read from the histograms. All are 0 if nothing was reconstructed (`store`, `remat`).
    """

    mismatches: jax.Array
    differences: jax.Array
    magnitudes: jax.Array
    updates: jax.Array
    lost_updates: jax.Array

    @property
    def max_difference(self) -> jax.Array:
        """The largest absolute difference, truncated to four significant bits."""
        return _largest_counted(self.differences)

    @property
    def max_abs(self) -> jax.Array:
        """The largest |x| of any stream between layers, to be compared with `Grid.limit`.

        Truncated to four significant bits: below a power of two if and only if |x| is.
        """
        return _largest_counted(self.magnitudes)

    @property
    def lost_share(self) -> jax.Array:
        """The share of updates that rounded to nothing; 0 without a grid."""
        return self.lost_updates / jnp.maximum(self.updates, 1)

    @classmethod
    def probe(cls) -> Exactness:
        """Zeros to pass as a chain's `probe` and to differentiate with respect to."""
        return cls(*(jnp.zeros(shape, jnp.float32) for shape in ((), _BINS, _BINS, (), ())))


class Tracked(NamedTuple):
    """What the sweep finds out about the streams of reversed layers.

    Attributes:
      max_abs: float32, the largest |x| of any stream that a layer returned.
      updates: int32, see `Exactness`; in integers, as checksums are, so that one all-reduce can sum
        all three over devices.
      lost_updates: int32, see `Exactness`.
    """

    max_abs: jax.Array
    updates: jax.Array
    lost_updates: jax.Array

    @classmethod
    def nothing(cls) -> Tracked:
        """Before the first layer."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def after(self, y: Any, updates: Any, lost_updates: Any) -> Tracked:
        """After a layer that returned the streams y."""
        return Tracked(
            jnp.maximum(self.max_abs, largest(y)),
            self.updates + updates,
            self.lost_updates + lost_updates,
        )


def compare_inputs(
    rebuilt: Any, true: Any, tracked: Tracked, checksums: tuple[Any, Any] = (0, 0)
) -> Exactness:
    """Compares a reconstructed chain input with the true one.

    Args:
      tracked: of the streams after the input.
      checksums: of the branches' outputs and residuals, forward and in the rewind; counts as one
        more mismatch if they differ.
    """
    pairs = list(zip(jax.tree.leaves(rebuilt), jax.tree.leaves(true), strict=True))
    # NaN differs from NaN, so it counts. Counts are float32, because cotangents are floats.
    # `initial` is for empty streams, which have no maximum.
    mismatches = [jnp.sum(a != b, dtype=jnp.float32) for a, b in pairs]
    differences = [jnp.max(jnp.abs(a - b), initial=0).astype(jnp.float32) for a, b in pairs]
    forward, rewind = checksums
    mismatches.append(jnp.asarray(forward != rewind, jnp.float32))
    largest_difference = jnp.max(jnp.stack(differences))
    return Exactness(
        jnp.sum(jnp.stack(mismatches)),
        _counted(largest_difference),
        _counted(jnp.maximum(tracked.max_abs, largest(rebuilt))),
        tracked.updates.astype(jnp.float32),
        tracked.lost_updates.astype(jnp.float32),
    )


def largest(streams: Any) -> jax.Array:
    """Returns max |x| over all streams, as a float32 scalar."""
    leaves = jax.tree.leaves(streams)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves]))


def _counted(value: jax.Array) -> jax.Array:
    """float32 [2048]: 1 in the bin of a value > 0, eight bins per power of two; all 0 for 0."""
    # The bits of positive floats are ordered like the floats. The mask removes the sign of a NaN.
    found = (lax.bitcast_convert_type(value, jnp.int32) >> _CUT) & (_BINS - 1)
    return ((jnp.arange(_BINS, dtype=jnp.int32) == found) & (found > 0)).astype(jnp.float32)


def _largest_counted(counts: jax.Array) -> jax.Array:
    """The lower edge of the last nonempty bin, over the last axis; 0 if all bins are empty."""
    # Counts may have been summed or averaged over devices and steps; any positive one marks a bin.
    found = jnp.where(counts > 0, jnp.indices(counts.shape, jnp.int32)[-1], 0)
    return lax.bitcast_convert_type(jnp.max(found, axis=-1) << _CUT, jnp.float32)


def varying_axes(tree: Any) -> frozenset[str]:
    """The `shard_map` axes over which any array of the tree varies, according to its type."""
    axes = (jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary_over(axes: Iterable[str], tree: Any) -> Any:
    """Casts the arrays to vary over these `shard_map` axes, keeping their values.

    JAX then sums the cotangents of an array that did not vary over the devices.
    """

    def cast(leaf):
        # Only those that are missing: `pcast` refuses axes over which an array varies already.
        missing = sorted(set(axes) - varying_axes(leaf))
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
