"""Data parallelism by jit: batches are split over all devices, everything else is replicated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices along one axis, "data"."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, traced where `jax.sharding.get_abstract_mesh` says how batches are split.

    Compilers split all by themselves but kernels written by hand, which ask.
    """

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def abstract(init: Callable[[], Any], sharding: NamedSharding) -> Any:
    """The shapes of what `init` returns, placed: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init),
    )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a global batch, as global arrays split along their first axis."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
