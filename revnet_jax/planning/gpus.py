"""Describes NVIDIA GPUs to XLA, to compile for them on a machine without a GPU.

XLA's compiler for NVIDIA GPUs is in the wheels of the extra `gpu_compiler`. It needs no driver: a
`GpuTargetConfigProto`, written here as text, tells it all it needs to know about a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, NamedTuple

_EXTRA = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # the first is the extra's; either will do


class Gpu(NamedTuple):
    """The properties of a GPU that XLA's compiler uses.

    Attributes:
      name: as the driver reports it.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      float32_units: in each.
      shared_memory: bytes in each.
      clock_ghz: the maximum.
      l2_bytes: size of the L2 cache.
      bytes_per_second: memory bandwidth.
      memory_bytes: as the driver reports it.
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
CUDNN_VERSION = (9, 10, 0)  # assumed on the target machine


def has_compiler() -> bool:
    """Whether the extra `gpu_compiler` (or JAX with CUDA) is installed."""
    return any(importlib.util.find_spec(name) for name in _EXTRA)


def environment() -> dict[str, str]:
    """Environment variables of a process that compiles for GPUs, to be set before importing JAX."""
    # Autotuning would run kernels on the GPU to choose the fastest.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    return {
        "JAX_PLATFORMS": "cpu",  # else JAX would look for CUDA's libraries and a driver
        "XLA_FLAGS": flags.strip(),
    }


def gpu_devices(chip: str, *, hosts: int, gpus_per_host: int) -> list[Any]:
    """GPUs to compile for, ordered by host; `process_index` is the number of the host.

    Args:
      chip: a name in `GPUS`. Imports JAX: the process must have the variables of `environment`.
    """
    from jax.experimental import topologies

    # Before anything is traced: JAX asks for the version of cuDNN where it traces attention.
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
    # sm_90a and sm_100a add instructions of one architecture only, which XLA uses if available.
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    cudnn_major, cudnn_minor, cudnn_patch = CUDNN_VERSION
    # A block may ask for all shared memory but 1 KiB, which CUDA keeps for itself. The limits of
    # threads, blocks and registers are the same for all of `GPUS`.
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
    """Replaces JAX's check of the cuDNN version by one that returns `CUDNN_VERSION`.

    JAX asks the loaded cuDNN library, and fails without one. Compiling needs only the number,
    because cuDNN's kernels are called at run time. The replaced function is private to JAX: if a
    new version moves it, tests/planning/test_gpus.py fails.
    """
    fused_attention: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    major, minor, patch = CUDNN_VERSION
    # The encoding of cuDNN 9: version 9.10.0 is 91000.
    version = 10_000 * major + 100 * minor + patch
    fused_attention.check_cudnn_version = lambda: version
