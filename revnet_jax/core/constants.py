"""Checks for the constants that a layer is built with, such as `step` or `bits`."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from jax.core import Tracer

from revnet_jax.core import trees


def is_whole(value: Any) -> bool:
    """Whether the value is a Python or NumPy integer; booleans do not count."""
    # A bool is an integer to Python: without the second test True would pass as 1 bit or 1 layer.
    return isinstance(value, Integral) and not isinstance(value, bool)


def constant(name: str, value: Any) -> float:
    """Returns the value as a float; raises TypeError or ValueError unless it is a finite number.

    Args:
      name: of the argument, for the error message.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"got {name}=a traced {trees.describe_array(value)}, expected a constant, which is "
            "compiled into the layer. Let a branch multiply by what is learnt (in its params), or "
            "by what differs from layer to layer (in `data_L`)"
        )
    try:
        # `float` would also parse a string like "0.5". NaN stands for all that is no number, so
        # that one message covers it and infinity.
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"got {name}={value!r}, expected a finite number")
    return number
