"""A mesh of devices, and what lies where on it. `models/partition.py` says how models are split."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from revnet_jax.config import ConfigError
from revnet_jax.models.partition import BATCH, Rules, batch_axes, spec_of

AXES = (*BATCH, "tensor")


def make_mesh(
    devices: Sequence[jax.Device], *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """The devices along the axes of `AXES`; one size may be -1: as many as are left.

    Neighbours on "tensor" are nearest to each other, then those on "fsdp". Of several TPU slices,
    each has whole copies of both: only "data" goes through the network between them.

    Raises ConfigError for sizes that do not make up the number of devices.
    """
    sizes, n = [data, fsdp, tensor], len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and n % known == 0:
        sizes[sizes.index(-1)] = n // known
    if min(sizes) < 1 or math.prod(sizes) != n:
        raise ConfigError(
            f"config.mesh: got data={data}, fsdp={fsdp}, tensor={tensor} for {n} devices, expected "
            f"sizes whose product is {n}; one may be -1, for what is left"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ConfigError(
            f"config.mesh.data: got {sizes[0]} for {slices} slices, expected a multiple"
        )
    if slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside = [sizes[0] // slices, *sizes[1:]]
        array = mesh_utils.create_hybrid_device_mesh(
            inside, [slices, 1, 1], devices, allow_split_physical_axes=True
        )
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, traced where `jax.sharding.get_abstract_mesh` says what mesh it runs on."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def placed(init: Callable[[], Any], rules: Rules, mesh: Mesh) -> Any:
    """The shapes of what `init` returns, and where they lie: what a checkpoint is restored to.

    rules: of the model, by the path of its parameters. What optimizers keep of a parameter has its
    path after their own, and so lies with it.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = NamedSharding(mesh, spec_of(rules, name, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many): the part of every batch that this process reads.

    Processes whose devices differ along "tensor" alone read the same part.
    """
    parts = batch_parts(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    rows = {index[0].indices(parts)[0] for index in indices}
    if parts % len(rows) or max(rows) - min(rows) + 1 != len(rows) or min(rows) % len(rows):
        raise ConfigError(
            f"config.mesh: got sizes {dict(mesh.shape)} that give process {jax.process_index()} "
            f"the parts {sorted(rows)} of a batch, expected neighbours: take a larger data axis"
        )
    return min(rows) // len(rows), parts // len(rows)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a global batch, as global arrays split along their first axis."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
