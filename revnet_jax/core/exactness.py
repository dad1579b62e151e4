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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Exactness(NamedTuple):
    """What the rewind of a chain found; float32 scalars.

    mismatches: elements of the reconstructed chain input that differ from the true one (NaNs
      count; exact up to 2**24, rounded above, never rounded to 0).
    max_difference: the largest absolute difference among them.
    max_abs: the largest |x| of any stream between layers, to be held against `Grid.limit`.

    All are 0 where nothing was reconstructed (`store`, `remat`).
    """

    mismatches: jax.Array
    max_difference: jax.Array
    max_abs: jax.Array

    @classmethod
    def probe(cls) -> Exactness:
        """The zeros to pass as a chain's `probe`, one probe per chain, and differentiate."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))


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
    max_abs = jnp.maximum(max_abs, largest(rebuilt))
    return Exactness(jnp.sum(jnp.stack(mismatches)), jnp.max(jnp.stack(differences)), max_abs)


def largest(streams: Any) -> jax.Array:
    """max |x| over all streams, as a float32 scalar."""
    leaves = jax.tree.leaves(streams)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in leaves]))
