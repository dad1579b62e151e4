"""Topologies: names of the devices to compile for, as v5e:2x4, 4xh100:8 or local."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

from revnet_jax.errors import UserError
from revnet_jax.planning import gpus

LOCAL = "local"
# Several processes compile at a time: none may take a GPU's memory for itself.
_PRESENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_GPUS_PER_HOST = ("1", "2", "4", "8")
# The TPU shapes were found by compiling for them: libtpu does not know larger squares.
TOPOLOGIES = {
    "v4": _CUBES,
    "v5e": _SQUARES,
    "v5p": (*_CUBES, "16x16x24"),
    "v6e": _SQUARES,
    "tpu7x": _CUBES,
    **dict.fromkeys(gpus.GPUS, _GPUS_PER_HOST),
}


class TopologyError(UserError, ValueError):
    """Unknown topology, or its compiler is not installed; the message lists the valid names."""


class Topology(NamedTuple):
    """The devices that a program is compiled for.

    Attributes:
      name: as the user gave it.
      chip: a name in `CHIPS`, or None for this machine's devices.
      shape: of one slice: chips along each axis of a TPU's network, or the number of GPUs in a
        host.
      slices: number of TPU slices, or of hosts with GPUs, connected by the data center's network.
    """

    name: str
    chip: str | None
    shape: str
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether the topology names NVIDIA GPUs, which need not be present."""
        return self.chip in gpus.GPUS

    @property
    def num_devices(self) -> int:
        """The number of devices as JAX counts them; TopologyError if this machine has none."""
        if self.chip is None:
            return _local_devices()
        chips = self.slices * math.prod(map(int, self.shape.split("x")))
        return chips * (2 if self.chip == "tpu7x" else 1)  # a tpu7x chip is two devices

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a process that compiles for it, set before JAX is imported."""
        if self.chip is None:
            return _PRESENT
        if self.is_gpu:
            return gpus.environment()
        return {
            "JAX_PLATFORMS": "cpu",
            # With these, libtpu looks neither for a TPU nor for other processes that use it.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }


@functools.cache
def _local_devices():
    # In a process of its own, since one that has asked JAX keeps the devices until it ends, and
    # those that compile need them.
    command = [sys.executable, "-P", "-c", "import jax; print(len(jax.devices()))"]
    environment = {**os.environ, **_PRESENT, "JAX_TRACEBACK_FILTERING": "off"}
    asked = subprocess.run(command, capture_output=True, text=True, env=environment)
    if asked.returncode:
        said = [f"status {asked.returncode}", *asked.stderr.splitlines()]
        raise TopologyError(f"got topology {LOCAL!r}, but JAX finds no device here: {said[-1]}")
    return int(asked.stdout.split()[-1])


def parse_topology(name: str) -> Topology:
    """Parses a name; TopologyError if it is unknown or its compiler is not installed."""
    if name == LOCAL:
        return Topology(name, None, "")
    # 4xv5e:16x16 is 4 slices of the chip v5e in the shape 16x16.
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([\dx]+)", name)
    slices, chip, shape = found.groups() if found else (None, "", "")
    if shape not in TOPOLOGIES.get(chip, ()):
        known = "; ".join(f"{chip}:{{{', '.join(names)}}}" for chip, names in TOPOLOGIES.items())
        raise TopologyError(
            f"got topology {name!r}, expected one of {LOCAL}; {known}; or several such slices or "
            "hosts, as in 4xv5e:16x16 and 4xh100:8"
        )
    topology = Topology(name, chip, shape, int(slices or 1))
    extra = "gpu_compiler" if topology.is_gpu else "tpu"
    installed = gpus.has_compiler() if topology.is_gpu else importlib.util.find_spec("libtpu")
    if not installed:
        maker = "NVIDIA" if topology.is_gpu else "TPU"
        raise TopologyError(
            f"got topology {name!r}, but the {maker} compiler is not installed: run "
            f"scripts/setup.sh {extra}, or take --topology={LOCAL}"
        )
    return topology


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, which need not be present.

    Imports JAX: the process must have the variables of `Topology.environment`.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices()
    if topology.is_gpu:
        return gpus.gpu_devices(
            topology.chip, hosts=topology.slices, gpus_per_host=int(topology.shape)
        )
    settings: dict[str, Any] = {}
    if set(topology.shape) <= set("1x"):
        # Hosts have several chips by default, into which a slice of one cannot be divided.
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip == "v4":
        settings["chip_config_name"] = "megacore"  # two cores as one device
    if topology.slices > 1:
        settings["num_slices"] = topology.slices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.chip}:{topology.shape}", **settings
    ).devices
