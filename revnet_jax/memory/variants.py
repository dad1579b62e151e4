"""The ways to train one config that a plan compares: each a name and settings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnet_jax.errors import UserError

Settings = Mapping[str, Any]


def variants(config: Settings) -> dict[str, dict[str, Any]]:
    """Those that the network can be trained in; a ResNet has no inverse.

    config: settings by dotted key, as all in this package.
    """
    backprops = ["store", "remat"]
    if config["model.family"] != "resnet":
        backprops.append("reverse")
    return {name: {"model.backprop": name} for name in backprops}


def chosen(names: list[str] | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of these names, all where none is given; UserError for one there is not."""
    for name in names or []:
        if name not in known:
            raise UserError(f"got strategy {name!r}, expected some of {', '.join(known)}")
    return {name: known[name] for name in names or known}
