"""NVIDIA GPUs for which programs are compiled on a machine that has none.

XLA's compiler for NVIDIA GPUs is in the wheels of the extra `gpu_compiler`. It asks the driver
nothing: all that it needs to know about a GPU is a `GpuTargetConfigProto`, written here as text.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, NamedTuple

_EXTRA = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # the first is the extra's; either will do


class Gpu(NamedTuple):
    """What XLA asks of a GPU.

    name: as the driver calls it. capability: (major, minor) of the instruction set.
    cores: streaming multiprocessors. float32_units: of each. shared_memory: bytes of each.
    clock_ghz: at most. l2_bytes: cache. bytes_per_second: of its memory.
    memory_bytes: as the driver reports them.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    float32_units: int
    shared_memory: int
    clock_ghz: float
    l2_bytes: int
    bytes_per_second: int
    memory_bytes: int


# The SXM modules. Units, cores, shared memory and clocks are NVIDIA's: the architecture white
# papers of A100 (table 5), H100 (table 3) and the CUDA C++ Programming Guide (technical
# specifications per compute capability). Memory sizes are what the driver reports and XLA records:
# github.com/openxla/xla, xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200,b200}.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 2**10, 1.41, 40 * 2**20,
        2_039_040_000_000, 85_100_068_864,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * 2**10, 1.98, 50 * 2**20,
        3_352_320_000_000, 84_942_979_072,
    ),
    "h200": Gpu(
        "NVIDIA H200", (9, 0), 132, 128, 228 * 2**10, 1.98, 50 * 2**20,
        4_800_000_000_000, 151_397_597_184,
    ),
    "b200": Gpu(
        "NVIDIA B200", (10, 0), 148, 128, 228 * 2**10, 1.965, 132_644_864,
        7_672_320_000_000, 191_514_411_008,
    ),
}  # fmt: skip
CUDNN_VERSION = (9, 10, 0)  # of the machine that is planned for


def has_compiler() -> bool:
    """Whether the extra `gpu_compiler` (or JAX with CUDA) is installed."""
    return any(importlib.util.find_spec(name) for name in _EXTRA)


def environment() -> dict[str, str]:
    """Variables for a process that compiles for GPUs, set before JAX is imported."""
    # Tuning would run kernels on the GPU, to choose the fastest.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return {
        "JAX_PLATFORMS": "cpu",  # else JAX looks for CUDA's libraries and a driver
        "XLA_FLAGS": flags.strip(),
    }


def devices(chip: str, *, hosts: int, gpus_per_host: int) -> list[Any]:
    """GPUs to compile for, those of a host together; `process_index` is the number of the host.

    chip: a name in `GPUS`. Imports JAX, in a process with `environment`.
    """
    from jax.experimental import topologies

    _tell_cudnn_version()
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip,
        topology=f"1x{hosts}x{gpus_per_host}",  # partitions, hosts in each, GPUs in each
        target_config=target_config(GPUS[chip]),
    ).devices


def target_config(gpu: Gpu) -> str:
    """The text of XLA's `GpuTargetConfigProto`."""
    major, minor = gpu.capability
    # sm_90a and sm_100a: instructions of this very chip, which XLA uses where they exist.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    cudnn_major, cudnn_minor, cudnn_patch = CUDNN_VERSION
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_memory - 2**10}
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.float32_units}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {gpu.bytes_per_second}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} patch: {cudnn_patch} }}
device_description_str: "{gpu.name}"
"""


def _tell_cudnn_version() -> None:
    """Answers JAX's question for the version of cuDNN with the one that is planned for.

    JAX asks the library that is loaded, and fails where there is none. The program needs only the
    number: cuDNN's kernels are called when it runs. The function is private: a new JAX may
    have it elsewhere, which tests/memory/test_gpus.py would tell.
    """
    fused_attention = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    major, minor, patch = CUDNN_VERSION
    version = 10_000 * major + 100 * minor + patch
    fused_attention.check_cudnn_version = lambda: version
