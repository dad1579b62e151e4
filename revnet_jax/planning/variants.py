"""The variants of a config that a plan or a benchmark compares: names and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from revnet_jax.config import references
from revnet_jax.core import STRATEGIES, Backprop
from revnet_jax.errors import UserError
from revnet_jax.families import build_task, family_of
from revnet_jax.models import Model


class Variant(NamedTuple):
    """One way to train a model, written as `BACKPROP[+STORED][/lockstep or /unroll]`.

    `reverse+3` stores the last 3 layers of the chains and reverses the others; `remat/lockstep`
    updates each layer's parameters in the backward sweep; `store/unroll` unrolls the loop over
    layers completely; `twin` is `store` for the irreversible model in place of the reversible one.
    The last two are for the benchmark.
    """

    backprop: Backprop
    stored_layers: int = 0
    lockstep: bool = False
    unrolled: bool = False
    is_twin: bool = False

    @property
    def name(self) -> str:
        """The notation that `parse_variant` reads."""
        mixture = f"+{self.stored_layers}" if self.stored_layers else ""
        suffix = "/lockstep" * self.lockstep + "/unroll" * self.unrolled
        return ("twin" if self.is_twin else self.backprop + mixture) + suffix

    def settings(self) -> dict[str, Any]:
        """Settings by dotted key that override those of a config of the same layers and streams."""
        return {
            "model.backprop": self.backprop,
            "model.stored_layers": self.stored_layers,
            "optimizer.lockstep": self.lockstep,
        }


def parse_variant(name: str, layers: int | None = None) -> Variant:
    """Parses the name of a `Variant`.

    Args:
      layers: of the model, if known.

    Raises UserError for an unknown variant, or one that stores more layers than the model has.
    """
    mixture, slash, suffix = name.partition("/")
    is_twin = mixture == "twin"
    strategy, plus, stored = ("store" if is_twin else mixture).partition("+")
    # The same string, but taken from STRATEGIES, whose type is that of the literals.
    backprop = next((each for each in STRATEGIES if each == strategy), None)
    suffixes = ("unroll",) if is_twin else ("lockstep", "unroll")
    suffix_fits = not slash or suffix in suffixes
    # A plus needs a number, and a number a plus.
    mixture_fits = bool(plus) == bool(re.fullmatch("[0-9]{1,6}", stored))
    if backprop is None or not mixture_fits or not suffix_fits:
        raise UserError(
            f"got strategy {name!r}, expected one of {', '.join(STRATEGIES)}, with or without +m "
            "and then /lockstep or /unroll; or twin, with or without /unroll"
        )
    stored_layers = int(stored or 0)
    if layers is not None and stored_layers > layers:
        raise UserError(f"got strategy {name!r} for {layers} layers, expected +0 to +{layers}")
    return Variant(
        backprop, stored_layers, suffix == "lockstep", suffix == "unroll", is_twin=is_twin
    )


def variants(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that the model can be trained in, by name, as settings that override the config.

    Args:
      config: settings by dotted key.
    """
    mixtures: list[tuple[Backprop, int]] = [(name, 0) for name in STRATEGIES if name != "reverse"]
    model = model_of(config)
    if model.invertible:
        layers = model.most_stored_layers
        # Without all layers, which would be `store` again. A model without chains keeps the 0.
        stored = {0, layers // 4, layers // 2, 3 * layers // 4} - ({layers} if layers else set())
        mixtures += [("reverse", number) for number in sorted(stored)]
    found = [Variant(*mixture, lockstep) for lockstep in (False, True) for mixture in mixtures]
    return {variant.name: variant.settings() for variant in found}


def model_of(config: Mapping[str, Any]) -> Model:
    """The model of a config under remat, where no chain stores layers.

    Built as for a CPU: asking JAX for this machine's devices would reserve them, and the processes
    that compile could not use them.
    """
    nested = as_config(config)
    # Kernels of accelerators are refused for a CPU. They change neither layers nor shapes.
    nested.model.update({"backprop": "remat", "stored_layers": 0})
    if "attention" in nested.model:
        nested.model.attention = "auto"
    return build_task(nested, platform="cpu").network


def model_depth(config: Mapping[str, Any]) -> int:
    """Number of layers of a decoder, or of residual units of other networks.

    Raises ConfigError for a model of one's own that has no setting `layers`.
    """
    nested = as_config(config)
    return family_of(nested).depth.of(nested.model)


def has_depth(config: Mapping[str, Any]) -> bool:
    """Whether the model has a setting that says how deep it is."""
    return not references.is_reference(config["model.family"]) or "model.layers" in config


def deeper(config: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Settings that make the model `times` times as deep."""
    nested = as_config(config)
    found = family_of(nested).depth.times(nested.model, times)
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
