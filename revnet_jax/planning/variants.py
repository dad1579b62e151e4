"""The variants of a config that a plan compares: a name each, and settings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from revnet_jax.errors import UserError
from revnet_jax.families import build_task, family_of
from revnet_jax.models import Model


def variants(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that the model can be trained in, by name, as settings that override the config.

    config: settings by dotted key.

    `reverse+3` stores the last 3 layers of the chains and reverses the others; `remat/lockstep`
    updates each layer's parameters in the backward sweep.
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
    """The model of a config under remat, where no chain stores layers.

    Built as for a CPU: asking JAX for this machine's devices would reserve them, and the processes
    that compile could not use them.
    """
    known = as_config(config)
    known.model.update({"backprop": "remat", "stored_layers": "0"})
    if "attention" in known.model:
        known.model.attention = "auto"
    return build_task(known, platform="cpu").network


def depth(config: Mapping[str, Any]) -> int:
    """Number of layers of a decoder, or of residual units of other networks."""
    known = as_config(config)
    return family_of(known).depth.of(known.model)


def deeper(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Settings that make the model `times` times as deep."""
    known = as_config(config)
    found = family_of(known).depth.times(known.model, times)
    return {f"model.{name}": value for name, value in found.items()}


def as_config(settings: Mapping[str, Any]) -> ConfigDict:
    """A nested config from settings by dotted key; lists, as from JSON, become tuples."""
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
    """The variants with these names, all if none are given; UserError for an unknown name."""
    for name in names or []:
        if name not in known:
            raise UserError(f"got strategy {name!r}, expected some of {', '.join(known)}")
    return {name: known[name] for name in names or known}
