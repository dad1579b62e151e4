"""Published peaks of chips, and the roofline: the least time that a step takes on them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from revnet_jax.errors import UserError
from revnet_jax.planning.gpus import GPUS

GIB = 2**30
_TPU_PAGES = "https://cloud.google.com/tpu/docs/"
_NVIDIA_PAGES = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a chip, or half of a tpu7x chip.

    Attributes:
      device_kind: JAX's name; of a GPU, the start of its name.
      peak_flops: of bfloat16 matrix products, FLOP/s. TPUs compute float32 products from these.
      hbm_bytes: on TPUs the memory that a program may fill, according to their compiler; on GPUs
        all memory that the driver reports, which JAX takes a share of: `fillable_bytes`.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it can send within its slice or host, all links together (NVLink
        on GPUs): half of the published bidirectional figure.
      host_bandwidth: bytes/s in each direction between host and device: PCI Express, by generation.
      dcn_bandwidth: bytes/s through the data center's network: the chip's share of its host's or
        pod's bandwidth, None if not published. Each GPU has an InfiniBand or Ethernet adapter.
      source: page with the published figures.
    """

    device_kind: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    dcn_bandwidth: float | None
    source: str


CHIPS = {
    # Google publishes no bandwidth of v4 pods in the data center, hence the None.
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, 16e9, None, f"{_TPU_PAGES}v4"),
    # A pod of 256 chips has 6.4 Tbit/s of data-center network.
    "v5e": Chip(
        "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 16e9, 3.125e9, f"{_TPU_PAGES}v5e"
    ),
    "v5p": Chip(
        "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, 16e9, 6.25e9, f"{_TPU_PAGES}v5p"
    ),
    "v6e": Chip(
        "TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 400e9, 32e9, 12.5e9, f"{_TPU_PAGES}v6e"
    ),
    # A chip is two devices: each has half of 2307 TFLOP/s, 7380 GB/s, 1200 GB/s and 100 Gbit/s.
    "tpu7x": Chip(
        "TPU7x", 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, 32e9, 6.25e9, f"{_TPU_PAGES}tpu7x"
    ),
    # The SXM modules; peaks without sparsity. Network adapters are those of NVIDIA's DGX systems,
    # one for each GPU: ConnectX-6 of 200 Gbit/s in DGX A100
    # (https://developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100), ConnectX-7 of 400
    # in DGX H100, H200 and B200 (https://docs.nvidia.com/dgx-basepod/, core components).
    "a100": Chip(
        "NVIDIA A100", 312e12, GPUS["a100"].memory_bytes, 2039e9, 300e9, 32e9, 25e9,
        f"{_NVIDIA_PAGES}a100",
    ),
    "h100": Chip(
        "NVIDIA H100", 989e12, GPUS["h100"].memory_bytes, 3350e9, 450e9, 64e9, 50e9,
        f"{_NVIDIA_PAGES}h100",
    ),
    "h200": Chip(
        "NVIDIA H200", 989e12, GPUS["h200"].memory_bytes, 4800e9, 450e9, 64e9, 50e9,
        f"{_NVIDIA_PAGES}h200",
    ),
    # A DGX B200 has eight, together with 64 TB/s of HBM and 14.4 TB/s of bidirectional NVLink.
    "b200": Chip(
        "NVIDIA B200", 2250e12, GPUS["b200"].memory_bytes, 8000e9, 900e9, 64e9, 50e9,
        f"{_NVIDIA_PAGES}dgx-b200",
    ),
}  # fmt: skip
_MEM_FRACTION = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # new and old name


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `device.device_kind` names; None for a chip that is not in the table."""
    # TPUs by their whole name: "TPU v5" (v5p) is also the beginning of "TPU v5 lite" (v5e).
    exact = [chip for chip in CHIPS.values() if chip.device_kind == device_kind]
    gpus = [
        chip
        for chip in CHIPS.values()
        if chip.device_kind.startswith("NVIDIA")
        and device_kind.startswith(chip.device_kind)
        # Variants with other bandwidths or less memory than the SXM modules of the table.
        and not any(other in device_kind for other in ("PCI", "NVL", "40GB"))
    ]
    return (exact or gpus or [None])[0]


def fillable_bytes(chip: Chip) -> int:
    """The memory of a device that a program may fill.

    On GPUs, JAX limits itself to 75 % of the memory, with or without preallocation, and leaves the
    rest to CUDA, NCCL and others. XLA_CLIENT_MEM_FRACTION sets another share, for runs and plans
    alike (https://docs.jax.dev/en/latest/gpu_memory_allocation.html).

    Raises UserError if that is not a number between 0 and 1.
    """
    if not chip.device_kind.startswith("NVIDIA"):
        return chip.hbm_bytes
    name, share = next(
        ((name, os.environ[name]) for name in _MEM_FRACTION if os.environ.get(name)),
        (_MEM_FRACTION[0], "0.75"),
    )
    try:
        fraction = float(share)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(f"{name}: got {share!r}, expected a share of memory, as 0.9")
    return int(fraction * chip.hbm_bytes)


class StepSeconds(NamedTuple):
    """Seconds that each resource of a chip needs for a step at its published peak.

    Attributes:
      busy: the longest of arithmetic, HBM traffic and host transfers, which overlap.
      ici: sending within a slice.
      dcn: sending between slices.
    """

    busy: float
    ici: float
    dcn: float

    @property
    def overlapped(self) -> float:
        """A lower bound on the time of a step: communication overlaps with computation."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """The time without any overlap of communication and computation."""
        return sum(self)


def step_seconds(
    chip: Chip,
    *,
    flops: float,
    hbm_bytes: float,
    host_bytes: float,
    ici_bytes: Mapping[str, float],
    dcn_bytes: Mapping[str, float],
) -> StepSeconds | None:
    """The roofline of one step, a lower bound; None if a bandwidth that it needs is unknown.

    Arguments are of one device, as `traffic` counts them. Assumes that all links of a chip send at
    once, although a collective along one mesh axis may use only some of them.
    """
    busy = max(
        flops / chip.peak_flops,
        hbm_bytes / chip.hbm_bandwidth,
        host_bytes / chip.host_bandwidth,
    )
    between = sum(dcn_bytes.values())
    dcn = 0.0
    # What sends nothing between slices needs no figure of that network.
    if between:
        if chip.dcn_bandwidth is None:
            return None
        dcn = between / chip.dcn_bandwidth
    return StepSeconds(busy, sum(ici_bytes.values()) / chip.link_bandwidth, dcn)
