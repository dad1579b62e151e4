"""Names of the devices that a program is compiled for: v5e:2x4, 4xh100:8, or local."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any, NamedTuple

from revnet_jax.errors import UserError
from revnet_jax.memory import gpus

LOCAL = "local"
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x16", "8x16x16", "16x16x16"),
)
_GPUS_PER_HOST = ("1", "2", "4", "8")
# Of TPUs what libtpu knows, as tried by compiling; larger squares it does not.
TOPOLOGIES = {
    "v4": _CUBES,
    "v5e": _SQUARES,
    "v5p": (*_CUBES, "16x16x24"),
    "v6e": _SQUARES,
    "tpu7x": _CUBES,
    **dict.fromkeys(gpus.GPUS, _GPUS_PER_HOST),
}


class TopologyError(UserError, ValueError):
    """An unknown topology, or one whose compiler is not installed; says which are known."""


class Topology(NamedTuple):
    """name: as the user gave it; chip: a name in `CHIPS`, or None for this machine's devices.

    shape: of one slice: chips along each axis of a TPU's network, or the GPUs of a host.
    slices: how many of these, with the data center's network between them; of GPUs, hosts.
    """

    name: str
    chip: str | None
    shape: str
    slices: int = 1

    @property
    def is_gpu(self) -> bool:
        """Whether these are NVIDIA GPUs that need not be here."""
        return self.chip in gpus.GPUS

    @property
    def num_devices(self) -> int:
        """As JAX counts them; of this machine's, which takes importing it, all that it has."""
        if self.chip is None:
            return len(devices(self))
        chips = self.slices * math.prod(map(int, self.shape.split("x")))
        return chips * (2 if self.chip == "tpu7x" else 1)

    @property
    def environment(self) -> dict[str, str]:
        """Of the process that compiles for it, to be set before JAX is imported."""
        if self.chip is None:
            return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if self.is_gpu:
            return gpus.environment()
        return {
            "JAX_PLATFORMS": "cpu",
            # libtpu looks for neither a TPU nor other processes that use it.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }


def parse_topology(name: str) -> Topology:
    """Raises TopologyError, at once, for what cannot be compiled for here."""
    if name == LOCAL:
        return Topology(name, None, "")
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


def devices(topology: Topology) -> list[Any]:
    """Its devices, which need not exist. Imports JAX; see `Topology.environment`."""
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices()
    if topology.is_gpu:
        return gpus.devices(topology.chip, hosts=topology.slices, gpus_per_host=int(topology.shape))
    settings: dict[str, Any] = {}
    if set(topology.shape) <= set("1x"):
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip == "v4":
        settings["chip_config_name"] = "megacore"  # two cores as one device
    if topology.slices > 1:
        settings["num_slices"] = topology.slices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology.chip}:{topology.shape}", **settings
    ).devices
