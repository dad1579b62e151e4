"""The run-time check that a chain was undone exactly.

Exactness rests on a branch giving the same bits in the forward and in the backward loop, which a
compiler may break (other fusions, autotuned kernels, atomics). So it is measured, not assumed. A
backward pass can return nothing but cotangents; the figures leave it as the cotangent of a probe:

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

_CUT = 20  # bits of a float32 that its bin leaves out: of 23 of the mantissa three are left
_BINS = 2 ** (31 - _CUT)


class Exactness(NamedTuple):
    """What the rewinds of a chain found; float32.

    mismatches: elements of the reconstructed chain input that differ from the true one (NaNs
      count; exact up to 2**24, rounded above, never rounded to 0).
    differences: [2048], how many rewinds had their largest difference in each bin of magnitudes.
    magnitudes: [2048], likewise of the largest |x|.

    JAX adds cotangents up wherever a probe is used more than once: in several chains, in the
    iterations of a loop, in the examples of a `vmap`, on the devices of a `shard_map`. So all three
    are counts, which may be added up or averaged; the largest values are read off the bins.
    All are 0 where nothing was reconstructed (`store`, `remat`).
    """

    mismatches: jax.Array
    differences: jax.Array
    magnitudes: jax.Array

    @property
    def max_difference(self) -> jax.Array:
        """The largest absolute difference, cut (not rounded) to four significant bits."""
        return _largest_counted(self.differences)

    @property
    def max_abs(self) -> jax.Array:
        """The largest |x| of any stream between layers, to be held against `Grid.limit`.

        Cut to four significant bits: below a power of two if and only if |x| is.
        """
        return _largest_counted(self.magnitudes)

    @classmethod
    def probe(cls) -> Exactness:
        """The zeros to pass as a chain's `probe`, and differentiate."""
        return cls(*(jnp.zeros(shape, jnp.float32) for shape in ((), _BINS, _BINS)))


def compare(
    rebuilt: Any, true: Any, max_abs: jax.Array, checksums: tuple[Any, Any] = (0, 0)
) -> Exactness:
    """Compares a reconstructed chain input with the true one.

    max_abs: of the streams after the input.
    checksums: of what branches computed, forward and rewind; one more mismatch where they differ.
    """
    pairs = list(zip(jax.tree.leaves(rebuilt), jax.tree.leaves(true), strict=True))
    mismatches = [jnp.sum(a != b, dtype=jnp.float32) for a, b in pairs]
    differences = [jnp.max(jnp.abs(a - b), initial=0).astype(jnp.float32) for a, b in pairs]
    forward, rewind = checksums
    mismatches.append(jnp.asarray(forward != rewind, jnp.float32))
    largest_difference = jnp.max(jnp.stack(differences))
    return Exactness(
        jnp.sum(jnp.stack(mismatches)),
        _counted(largest_difference),
        _counted(jnp.maximum(max_abs, largest(rebuilt))),
    )


def largest(streams: Any) -> jax.Array:
    """max |x| over all streams, as a float32 scalar."""
    leaves = jax.tree.leaves(streams)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves]))


def _counted(value: jax.Array) -> jax.Array:
    """float32 [2048]: 1 in the bin of a value >= 0, eight bins for each power of two; 0s for 0."""
    found = (lax.bitcast_convert_type(value, jnp.int32) >> _CUT) & (_BINS - 1)
    return ((jnp.arange(_BINS, dtype=jnp.int32) == found) & (found > 0)).astype(jnp.float32)


def _largest_counted(counts: jax.Array) -> jax.Array:
    """The lower edge of the last bin that is not empty, over the last axis."""
    found = jnp.where(counts > 0, jnp.indices(counts.shape, jnp.int32)[-1], 0)
    return lax.bitcast_convert_type(jnp.max(found, axis=-1) << _CUT, jnp.float32)


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes of a `shard_map` over which any array differs from device to device, by its type."""
    axes = (jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary_over(axes: Iterable[str], tree: Any) -> Any:
    """The same values, typed to differ over these axes: their cotangents are added up over them."""

    def cast(leaf):
        missing = sorted(set(axes) - varying_axes(leaf))
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)
