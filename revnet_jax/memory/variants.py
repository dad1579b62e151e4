"""The ways to train one config that a plan compares: each a name and settings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnet_jax.config import settings
from revnet_jax.errors import UserError
from revnet_jax.models.architecture import Architecture, chains, groups


def variants(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that the model can be trained in, by name.

    config: settings by dotted key, as all in this package.

    `reverse+3` stores the last 3 layers of the chains and reverses the others; `remat/lockstep`
    updates each layer in the backward sweep. All else is the config's.
    """
    found = {name: (name, 0) for name in ("store", "remat_dots", "remat", "offload")}
    if has_inverse(config):
        found["reverse"] = ("reverse", 0)
        layers = layers_in_chains(config)
        for stored in sorted({layers // 4, layers // 2, 3 * layers // 4} - {0, layers}):
            found[f"reverse+{stored}"] = ("reverse", stored)
    return {
        name + suffix: {
            "model.backprop": backprop,
            "model.stored_layers": str(stored),
            "optimizer.lockstep": lockstep,
        }
        for suffix, lockstep in (("", False), ("/lockstep", True))
        for name, (backprop, stored) in found.items()
    }


def has_inverse(config: Mapping[str, Any]) -> bool:
    """Whether layers can be reversed: not those of ResNets and of transformers' twins."""
    if "model.reversible" in config:
        return config["model.reversible"]
    return config["model.family"] != "resnet"


def layers_in_chains(config: Mapping[str, Any]) -> int:
    """Those that are no transitions, which change the streams' shape and are not reversed."""
    if "model.layers" in config:
        return config["model.layers"]
    names = ("family", "units", "channels", "bottleneck", "stem")
    with settings("model"):
        architecture = Architecture(
            image_shape=config["data.image_shape"],
            num_classes=config["data.num_classes"],
            **{name: config[f"model.{name}"] for name in names},
        )
    return sum(group.depth for chain in chains(groups(architecture)).values() for group in chain)


def depth(config: Mapping[str, Any]) -> int:
    """Layers of a decoder, residual units of other networks."""
    return config["model.layers"] if "model.layers" in config else sum(config["model.units"])


def deeper(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Settings for so many times the depth."""
    if "model.layers" in config:
        return {"model.layers": times * config["model.layers"]}
    return {"model.units": tuple(times * units for units in config["model.units"])}


def chosen(names: list[str] | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of these names, all where none is given; UserError for one there is not."""
    for name in names or []:
        if name not in known:
            raise UserError(f"got strategy {name!r}, expected some of {', '.join(known)}")
    return {name: known[name] for name in names or known}
