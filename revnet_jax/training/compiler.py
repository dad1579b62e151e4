"""How the programs of a run are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

_QUICKLY = {"xla_backend_optimization_level": 0}


def jit(function: Callable, *, quickly: bool = False, **kwargs: Any) -> Callable:
    """`jax.jit`, such that a branch gives the same bits wherever the program evaluates it.

    On CPU XLA may hand a convolution together with the arithmetic around it to a library that
    rounds otherwise (no fused multiply-add). Whether it does depends on which intermediates are
    kept, so that `store` and `reverse` would train apart: by 7e-7 of the loss after one step of
    RevNet-38, by percents after ten, as ReLUs and the grid turn roundings into decisions.

    quickly: compile, on CPU, quickly rather than well.
    """
    options: dict[str, Any] | None = None
    if jax.default_backend() == "cpu":
        options = {"xla_cpu_experimental_ynn_fusion_type": ""} | (_QUICKLY if quickly else {})
    return jax.jit(function, compiler_options=options, **kwargs)


def jit_initialization(init: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once: on CPU, compiled quickly rather than well."""
    options = _QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)


def initialized(init: Callable[..., Any], abstract_state: Any, *args: Any) -> Any:
    """What `init(*args)` returns, made where it is to lie: nothing is ever whole on one device."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    return jit_initialization(init, shardings)(*args)
