"""The manifest of a checkpoint: shape, dtype and checksum of every leaf.

A state is any pytree of arrays. It is stored flat, as `{path: array}`, so restoring needs only an
abstract state with the same paths. Typed PRNG keys are stored as their uint32 words.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.errors import UserError

PyTree = Any
ABSTRACT = jax.ShapeDtypeStruct
ArrayRecord = dict[str, Any]  # shape, dtype, checksum and, for a PRNG key, key_impl


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved or restored."""


class Kind(NamedTuple):
    """Dtype and shape of a leaf, written like float32[64, 48]."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Difference(NamedTuple):
    """A leaf that differs between a checkpoint (got) and a state; None where there is no leaf."""

    path: str
    got: Kind | None
    expected: Kind | None

    def __str__(self) -> str:
        return f"{self.path}: got {self.got or 'nothing'}, expected {self.expected or 'nothing'}"


class OtherTree(CheckpointError):
    """A checkpoint has leaves other than the expected ones, which `differences` lists."""

    def __init__(self, message: str, differences: list[Difference]):
        super().__init__(message)
        self.differences = differences


class Damaged(Exception):
    """A checkpoint cannot be read back as it was written. An older one may be intact."""


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, such as `params/w`, in the order of the tree. Numbers become arrays."""
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # A state that is a single array has an empty path, so it gets this name.
        path = jax.tree_util.keystr(keys, simple=True, separator="/") or "."
        # A key with a '/' of its own can spell the path of another leaf.
        if path in leaves:
            raise CheckpointError(f"got two leaves of the path {path}: rename a key with a '/'")
        try:
            leaves[path] = leaf if isinstance(leaf, jax.Array | ABSTRACT) else jnp.asarray(leaf)
        except TypeError as error:
            message = f"got a {type(leaf).__name__} at {path}, expected an array: keep it elsewhere"
            raise CheckpointError(message) from error
    return leaves


def as_abstract(leaf: jax.Array | ABSTRACT) -> ABSTRACT:
    """Shape, dtype and sharding of a leaf; no sharding for an uncommitted array."""
    sharding = leaf.sharding if getattr(leaf, "committed", True) else None
    return ABSTRACT(leaf.shape, leaf.dtype, sharding=sharding)


def storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays (or shapes) to store: PRNG keys as uint32 words, leaves of size 0 left out."""
    # Orbax refuses arrays of size 0; their shape in the manifest is all there is to them.
    return {path: _words(leaf) for path, leaf in leaves.items() if leaf.size}


def from_storable(
    arrays: Mapping[str, jax.Array], wanted: dict[str, ABSTRACT], records: dict[str, ArrayRecord]
) -> list[jax.Array]:
    """The inverse of `storable`: the leaves of `wanted`, in its order, from stored arrays."""
    leaves = []
    for path, spec in wanted.items():
        if not spec.size:
            leaves.append(jnp.zeros(spec.shape, spec.dtype, device=spec.sharding))
        elif _is_key(spec):
            wrap = functools.partial(jax.random.wrap_key_data, impl=records[path]["key_impl"])
            # jit, because device_put refuses shardings over devices of other processes.
            leaves.append(jax.jit(wrap, out_shardings=spec.sharding)(arrays[path]))
        else:
            leaves.append(arrays[path])
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _words(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, ABSTRACT):  # no sharding: words have one axis more
        return jax.eval_shape(jax.random.key_data, ABSTRACT(leaf.shape, leaf.dtype))
    return jax.random.key_data(leaf)


def make(leaves: Mapping[str, jax.Array], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The sealed manifest of a checkpoint of these leaves, as JSON, with finite metrics only."""
    sums = checksums(storable(leaves))
    records: dict[str, ArrayRecord] = {}
    for path, x in leaves.items():
        records[path] = {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": sums.get(path)}
        if _is_key(x):
            # The words of a key do not tell which generator they belong to.
            records[path]["key_impl"] = str(jax.random.key_impl(x))
    return with_metrics({"format": 1, "leaves": records}, metrics)


def with_metrics(manifest: dict[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The manifest with its metrics replaced by the finite ones of `metrics`, sealed again."""
    # JSON has no NaN, and a score that is not finite ranks nothing.
    finite = {name: float(x) for name, x in metrics.items() if math.isfinite(x)}
    return _seal({**manifest, "metrics": finite})


def _seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the manifest's own checksum."""
    # Keys are sorted, so that the sum depends on the content and not on the order of keys.
    return {**manifest, "crc32": zlib.crc32(json.dumps(manifest, sort_keys=True).encode())}


def check_seal(sealed: Any) -> dict[str, Any]:
    """Returns the manifest without its checksum.

    Raises Damaged if it was changed. Otherwise a flipped byte would look like a checkpoint of
    another architecture, for which no older checkpoint is tried.
    """
    manifest = dict(sealed) if isinstance(sealed, dict) else {}
    manifest.pop("crc32", None)
    if sealed != _seal(manifest):
        raise Damaged("the manifest does not match its own checksum")
    return manifest


def check_same_tree(
    where: Any, records: dict[str, ArrayRecord], wanted: dict[str, ABSTRACT]
) -> None:
    """Raises OtherTree (a CheckpointError) unless a checkpoint has exactly the wanted leaves."""
    saved = {path: Kind(r["dtype"], tuple(r["shape"])) for path, r in records.items()}
    expected = {path: _kind(leaf) for path, leaf in wanted.items()}
    differences = [
        Difference(path, saved.get(path), expected.get(path))
        for path in {**expected, **saved}
        if saved.get(path) != expected.get(path)
    ]
    if differences and all(_only_of_another_key(each) for each in differences):
        path = differences[0].path
        raise OtherTree(
            f"checkpoint {where} was written with other random number generators: "
            f"{'; '.join(map(str, differences[:3]))}. Set JAX_DEFAULT_PRNG_IMPL to "
            f"{records[path]['key_impl']}, as it was then, or take another workdir.",
            differences,
        )
    if differences:
        raise OtherTree(
            f"checkpoint {where} was written by another architecture or optimizer; leaves that "
            f"differ: {len(differences)}, such as {'; '.join(map(str, differences[:3]))}. "
            "Use the config it was saved with, or another workdir.",
            differences,
        )


def _only_of_another_key(difference: Difference) -> bool:
    kinds = difference.got, difference.expected
    return all(kind is not None and kind.dtype.startswith("key<") for kind in kinds)


def _kind(leaf: Any) -> Kind:
    return Kind(str(leaf.dtype), tuple(leaf.shape))


def check_saved_arrays(arrays: Mapping[str, jax.Array], records: dict[str, ArrayRecord]) -> None:
    """Raises Damaged if the arrays differ from what was recorded when they were saved."""
    for path, got in checksums(arrays).items():
        if got != records[path]["checksum"]:
            raise Damaged(f"array {path} has another checksum than when it was saved")


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of every array, its dtype and its shape, computed on the devices.

    Arrays may have any sharding.

    Memory: on CPUs, the largest array once more, as uint32, which XLA does not fuse into the sum.
    """
    # One after the other: one program for all of them has the words of all in memory at once.
    return {path: _sum_on_devices(x) ^ _sum_of_kind(x) for path, x in arrays.items()}


def _sum_on_devices(x: jax.Array) -> int:
    out = None
    if isinstance(x.sharding, NamedSharding):
        # Replicated, so that every process can read it.
        out = NamedSharding(x.sharding.mesh, PartitionSpec())
    return int(np.asarray(jax.jit(checksum, out_shardings=out)(x)))


def _sum_of_kind(x: jax.Array) -> int:
    """Dtype and shape are part of the checksum: the same bits may stand for other numbers."""
    return zlib.crc32(str(_kind(x)).encode())


def checksum(x: jax.Array) -> jax.Array:
    """The sum, modulo 2^32, of the array's words, each hashed together with its position.

    The hash is one-to-one at every position, so a change within one word always changes the sum.
    Any other change goes unnoticed with a probability of about 2^-32. (If words were multiplied by
    odd weights only, changes of the top bits of two words, such as two signs, would cancel.)
    """
    # lax.bitcast_convert_type takes neither complex numbers nor bools.
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize <= 4):
        # Conversion keeps these apart: sign extension is one-to-one.
        words = x.astype(jnp.uint32)
    else:
        # Values of eight bytes become two words each, along a new last axis.
        word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # The flat position from one iota per axis, because flattening would gather a sharded array.
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
        # Modulo 2^32 by hand, because np.uint32 refuses larger integers. Positions wrap around in
        # the same way, on every device.
        stride = stride * words.shape[axis] % 2**32
    # The finalizer of MurmurHash3: xor-shifts and odd factors.
    # 0x9E3779B1 is a prime near 2^32 / golden ratio, which sets neighbouring positions apart.
    words = (words ^ (position * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> np.uint32(16)), dtype=jnp.uint32)
