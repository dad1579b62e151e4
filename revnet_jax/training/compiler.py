"""`jax.jit` with the compiler options that a run needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# The level of XLA's code generation. At 0, tests compile in about three quarters of the time.
_QUICKLY = {"xla_backend_optimization_level": 0}
_ON_CPU = {
    # No fusions by YNNPACK, which round in another way: see `compiler_options`.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # The pass that ends the process where sums between devices are in bfloat16.
    "xla_disable_hlo_passes": "all-reduce-promotion",
}
_DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True}


def compiler_options(
    platform: str, *, deterministic: bool = False, quickly: bool = False
) -> dict[str, Any] | None:
    """Options that make a branch give the same bits wherever it is evaluated.

    On CPU, XLA may hand a convolution together with the arithmetic around it to a library (YNNPACK)
    that rounds differently, without fused multiply-add. Whether it does depends on which
    intermediates are kept, so `store` and `reverse` would diverge: by 7e-7 of the loss after one
    step of RevNet-38, and by percents after ten, as ReLUs and the grid turn rounding differences
    into discrete ones. An empty fusion type turns this off.

    Also on CPU, a pass of XLA that widens sums of bfloat16 between devices ends the process
    ("Invalid binary instruction opcode copy") where weights in bfloat16 are sharded. The sums work
    without it.

    Args:
      platform: of the devices that the program is compiled for: "cpu", "tpu", "gpu" or, of a GPU
        that is not there, "cuda".
      deterministic: on GPUs, take kernels that sum in a fixed order for attention, convolutions and
        scatters, so that a program gives the same bits whenever it runs. For products XLA then
        takes the first kernel that it knows rather than the fastest of several, so that a program
        that is compiled again is the same. Slower: see docs/exactness.md.
      quickly: on CPU, compile fast rather than to fast code.
    """
    if platform == "cpu":
        return _ON_CPU | (_QUICKLY if quickly else {})
    if platform in ("gpu", "cuda") and deterministic:
        return _DETERMINISTIC
    return None


def exact_jit(
    function: Callable,
    *,
    platform: str | None = None,
    deterministic: bool = False,
    quickly: bool = False,
    **kwargs: Any,
) -> jax.stages.Wrapped:
    """`jax.jit` with `compiler_options`, by default of the platform that JAX takes by default."""
    platform = platform or jax.default_backend()
    options = compiler_options(platform, deterministic=deterministic, quickly=quickly)
    # Options of this program alone: XLA_FLAGS would hold for all programs of the process.
    return jax.jit(function, compiler_options=options, **kwargs)


def jit_initialization(init: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once: on CPU, compile fast rather than to fast code."""
    options = _QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)


def initialized(init: Callable[..., Any], abstract_state: Any, *args: Any) -> Any:
    """Computes `init(*args)` directly with the shardings of `abstract_state`.

    So no array that is sharded ever has to fit on one device.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jit_initialization(init, shardings)(*args)
