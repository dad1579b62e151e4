"""The ways to train one config that a plan compares: each a name and settings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from revnet_jax.errors import UserError
from revnet_jax.families import build_task, family_of
from revnet_jax.models import Model


def variants(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those that the model can be trained in, by name.

    config: settings by dotted key, as all in this package.

    `reverse+3` stores the last 3 layers of the chains and reverses the others; `remat/lockstep`
    updates each layer in the backward sweep. All else is the config's.
    """
    found = {name: (name, 0) for name in ("store", "remat_dots", "remat", "offload")}
    model = model_of(config)
    if model.invertible:
        found["reverse"] = ("reverse", 0)
        layers = model.most_stored_layers
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


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of these settings under remat, in which no chain stores.

    As on a CPU, whatever the devices are: asking JAX for those that are here would take them away
    from the processes that compile.
    """
    known = as_config(config)
    known.model.update({"backprop": "remat", "stored_layers": "0"})
    if "attention" in known.model:
        known.model.attention = "auto"
    return build_task(known, platform="cpu").network


def depth(config: Mapping[str, Any]) -> int:
    """Layers of a decoder, residual units of other networks."""
    known = as_config(config)
    return family_of(known).depth.of(known.model)


def deeper(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Settings for a model this many times as deep."""
    known = as_config(config)
    found = family_of(known).depth.times(known.model, times)
    return {f"model.{name}": value for name, value in found.items()}


def as_config(settings: Mapping[str, Any]) -> ConfigDict:
    """A config from settings by dotted key, its tuples restored from JSON's lists."""
    config = ConfigDict()
    for key, value in settings.items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            if group not in node:
                node[group] = ConfigDict()
            node = node[group]
        node[name] = tuple(value) if isinstance(value, list) else value
    return config


def chosen(names: list[str] | None, known: Mapping[str, Any]) -> dict[str, Any]:
    """The variants of these names, all where none is given; UserError for one there is not."""
    for name in names or []:
        if name not in known:
            raise UserError(f"got strategy {name!r}, expected some of {', '.join(known)}")
    return {name: known[name] for name in names or known}
