"""The mesh of devices, and the sharding of states and batches.

`models/partition.py` says how models are split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from revnet_jax.config import ConfigError
from revnet_jax.models.partition import BATCH, Rules, batch_axes, spec_of

AXES = (*BATCH, "sequence", "tensor")


def mesh_sizes(
    num_devices: int,
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    slices: int = 1,
) -> tuple[int, ...]:
    """The sizes of a mesh along `AXES`. One of them may be -1: all devices that are left.

    Args:
      slices: number of TPU slices; "data" must be a multiple of it.

    Raises ConfigError if the product of the sizes is not the number of devices.
    """
    for name, count in (("devices", num_devices), ("slices", slices)):
        if count < 1:
            raise ConfigError(f"config.mesh: got {count} {name}, expected at least 1")
    sizes = [data, fsdp, sequence, tensor]
    known = math.prod(size for size in sizes if size != -1)
    # Otherwise -1 stays, and is refused with the other sizes below.
    if sizes.count(-1) == 1 and known > 0 and num_devices % known == 0:
        sizes[sizes.index(-1)] = num_devices // known
    if min(sizes) < 1 or math.prod(sizes) != num_devices:
        raise ConfigError(
            f"config.mesh: got data={data}, fsdp={fsdp}, sequence={sequence}, tensor={tensor} for "
            f"{num_devices} devices, expected sizes whose product is {num_devices}; one may be -1, "
            "for what is left"
        )
    if sizes[0] % slices:
        raise ConfigError(
            f"config.mesh.data: got {sizes[0]} for {slices} slices, expected a multiple"
        )
    return tuple(sizes)


def make_mesh(
    devices: Sequence[jax.Device],
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
) -> Mesh:
    """Arranges devices along the axes of `AXES`. Sizes and errors: see `mesh_sizes`.

    Neighbours along "tensor" are nearest to each other, then those along "sequence", then "fsdp".
    With several TPU slices these three axes stay inside a slice, and only "data" uses the slower
    network between slices.
    """
    # JAX reports each host of GPUs as a slice. That needs no hybrid mesh.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    sizes = mesh_sizes(
        len(devices), data=data, fsdp=fsdp, sequence=sequence, tensor=tensor, slices=slices
    )
    if slices == 1:
        # Axes of the torus may be split, so sizes need not be those of its axes.
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        # The mesh of one slice. Slices are laid out along "data" alone.
        inside = [sizes[0] // slices, *sizes[1:]]
        array = mesh_utils.create_hybrid_device_mesh(
            inside, [slices, 1, 1, 1], devices, allow_split_physical_axes=True
        )
    # Auto: XLA spreads shardings from a few constraints. With Explicit, types would have them.
    return Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """Sets the mesh that `jax.sharding.get_abstract_mesh` returns while `function` is traced."""

    @functools.wraps(function)
    def traced(*args):
        # Runs while tracing only. Abstract, because the devices need not be there.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def shapes_on_mesh(init: Callable[[], Any], rules: Rules, mesh: Mesh) -> Any:
    """The shapes and shardings of what `init` returns, as a checkpoint is restored to them.

    Args:
      rules: the model's sharding rules, by the path of a parameter. Paths in an optimizer's state
        end in the path of the parameter, so moments are sharded like their parameter.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = NamedSharding(mesh, spec_of(rules, name, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, ascending.

    They need not be contiguous, because a mesh is ordered by the network of the devices and not by
    host. Processes whose devices differ only along "sequence" or "tensor" hold the same rows.
    """
    # A slice of rows per device. Devices along "sequence" and "tensor" repeat it.
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch, as global arrays split along their first axis."""
    sharding, parts = batch_sharding(mesh), batch_parts(mesh)
    # As if a batch had one row per part: the numbers of the parts that this process holds.
    held = local_rows(mesh, parts)

    def put(array):
        rows = len(array) // len(held)  # rows per part

        def part(index):
            # `index` counts rows of the global batch; the array has the parts held, in order.
            at = rows * np.searchsorted(held, index[0].indices(rows * parts)[0] // rows)
            return array[at : at + rows]

        return jax.make_array_from_callback((rows * parts, *array.shape[1:]), sharding, part)

    return jax.tree.map(put, batch)
