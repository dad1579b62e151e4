"""What chips can do, from their makers' pages; and the least time that work takes on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

GIB = 2**30
_TPU_PAGES = "https://cloud.google.com/tpu/docs/"
_NVIDIA_PAGES = "https://www.nvidia.com/en-us/data-center/"


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them, which is a chip, or half of a tpu7x.

    device_kind: how JAX names it; a GPU's name begins with it.
    peak_flops: of bfloat16 matrix products, FLOP/s. On a TPU float32 ones are made of these.
    hbm_bytes: what a program may fill: on TPUs as their compiler says, on GPUs all there is.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s that it can send to the others, all links together: half of what is
      published as bidirectional.
    host_bandwidth: bytes/s from the host's memory, or to it: PCI Express, by generation.
    dcn_bandwidth: bytes/s through the data center's network, a chip's share of what its host or
      pod has; None where that is not published.
    source: of the published figures.
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
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, 16e9, None, f"{_TPU_PAGES}v4"),
    # 6.4 Tbit/s a pod of 256.
    "v5e": Chip(
        "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 16e9, 3.125e9, f"{_TPU_PAGES}v5e"
    ),
    "v5p": Chip(
        "TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, 16e9, 6.25e9, f"{_TPU_PAGES}v5p"
    ),
    "v6e": Chip(
        "TPU v6 lite", 918e12, int(31.25 * GIB), 1638e9, 400e9, 32e9, 12.5e9, f"{_TPU_PAGES}v6e"
    ),
    # Two devices a chip: each has half of 2307 TFLOP/s, 7380 GB/s, 1200 GB/s and 100 Gbit/s.
    "tpu7x": Chip(
        "TPU7x", 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, 32e9, 6.25e9, f"{_TPU_PAGES}tpu7x"
    ),
    # The SXM modules; peaks without sparsity.
    "a100": Chip(
        "NVIDIA A100", 312e12, 80 * GIB, 2039e9, 300e9, 32e9, None, f"{_NVIDIA_PAGES}a100"
    ),
    "h100": Chip(
        "NVIDIA H100", 989e12, 80 * GIB, 3350e9, 450e9, 64e9, None, f"{_NVIDIA_PAGES}h100"
    ),
    "h200": Chip(
        "NVIDIA H200", 989e12, 141 * 10**9, 4800e9, 450e9, 64e9, None, f"{_NVIDIA_PAGES}h200"
    ),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that `device.device_kind` names; None for one that is not in the table."""
    exact = [chip for chip in CHIPS.values() if chip.device_kind == device_kind]
    gpus = [
        chip
        for chip in CHIPS.values()
        if chip.device_kind.startswith("NVIDIA")
        and device_kind.startswith(chip.device_kind)
        and not any(other in device_kind for other in ("PCI", "NVL", "40GB"))
    ]
    return (exact or gpus or [None])[0]


class StepSeconds(NamedTuple):
    """What each part of a chip would need alone, at what its maker says is its full speed.

    busy: arithmetic, its memory and the host's, which overlap.
    ici: sending within a slice. dcn: between slices.
    """

    busy: float
    ici: float
    dcn: float

    @property
    def overlapped(self) -> float:
        """A lower bound on the time of a step: all that is sent is sent beside what is computed."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """Where nothing is computed while anything is sent."""
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
    """The roofline of one step, which nothing real quite reaches; None where a speed is unknown.

    Arguments are of one device, as `traffic` counts them. All links of a chip send at once, though
    a collective along one axis of a mesh may use a few of them.
    """
    busy = max(
        flops / chip.peak_flops,
        hbm_bytes / chip.hbm_bandwidth,
        host_bytes / chip.host_bandwidth,
    )
    between = sum(dcn_bytes.values())
    if between and chip.dcn_bandwidth is None:
        return None
    dcn = between / chip.dcn_bandwidth if between else 0.0
    return StepSeconds(busy, sum(ici_bytes.values()) / chip.link_bandwidth, dcn)
