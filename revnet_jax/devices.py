"""Memory and names of devices, and memory of compiled programs on them."""

from __future__ import annotations

import os
from typing import Any

import jax


def program_bytes(stats: Any, platform: str) -> int:
    """Bytes that a compiled program takes on one device, from its `memory_analysis()`."""
    if platform == "tpu":
        # On TPU the temporaries of some programs include the arguments and results. Their sum was
        # seen to exceed, by 1.9 GiB, the memory of a chip for which the compiler accepted the
        # program. The compiler's out-of-memory error counts this peak instead.
        return stats.peak_memory_in_bytes
    # A donated argument and the result in its place are one buffer (alias), counted in both.
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )


def memory_bytes(device: jax.Device) -> int | None:
    """Memory available to programs; None if unknown. CPU devices share the host's equally."""
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count("cpu")
    # What JAX's allocator may fill, which is less than the chip has: on GPUs 75 % by default.
    stats = device.memory_stats()
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else None


def peak_memory_bytes() -> int | None:
    """The largest peak memory of any local device; None if the backend does not report it (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def describe_device(device: jax.Device) -> str:
    """'2 CPU cores', or an accelerator's name."""
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


def out_of_memory(error: BaseException) -> bool:
    """Whether XLA or a device raised this error because memory is too small for a program."""
    # By the message, because XLA's errors are of one class, whatever went wrong.
    message = str(error)
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()
