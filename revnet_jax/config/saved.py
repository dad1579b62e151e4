"""Settings as config.json has them, turned into those of today."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def todays(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, read from its config.json, with the types that settings have today.

    - JSON has no tuples: a list is a tuple of settings here.
    - `model.stored_layers` was a string once, a number or "auto". It is a whole number, -1 for
      "auto", and a run from then goes on as it was.

    Args:
      saved: by section. What it lacks is still absent in the result, and what is of no known type
        is left to the caller to refuse.
    """
    found = _tuples(saved)
    model = found.get("model")
    if isinstance(model, dict) and isinstance(stored := model.get("stored_layers"), str):
        if stored == "auto":
            model["stored_layers"] = -1
        elif re.fullmatch(r"\d{1,9}", stored):  # Python refuses thousands of digits
            model["stored_layers"] = int(stored)
    return found


def _tuples(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(value) for value in tree) if isinstance(tree, list) else tree
