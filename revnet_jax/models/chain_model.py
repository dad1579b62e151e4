"""The base class of models that are one chain of equal layers between an input and an output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import jax

from revnet_jax.core import (
    STRATEGIES,
    Block,
    Exactness,
    Layer,
    PlainLayer,
    chain,
    keeping_operands,
)
from revnet_jax.models.model import ModelOptions, Strategy, Sweep, Variables
from revnet_jax.models.partition import Rules, on_batch


class ChainModel(ABC):
    """A model with one chain of equal layers; see `Model`.

    A subclass adds `init`, which puts the chain's stacked parameters under "layers", and functions
    that call `run_chain`.

    Args:
      invertible: whether the layers have an inverse: a block has one, a `PlainLayer` does not.
      options: how it computes. Its dtypes, grid and check become attributes of the same names.

    Raises ValueError for settings that contradict each other.
    """

    rules: Rules = ()
    stacked: Sequence[str] = ("layers",)

    def __init__(
        self, *, layers: int, invertible: bool = True, options: ModelOptions = ModelOptions()
    ):
        backprop, stored_layers = options.backprop, options.stored_layers
        # A tuple is for networks of several chains, one strategy each.
        if isinstance(backprop, tuple) or backprop not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"got backprop={backprop!r}, expected one of {known}")
        if not 0 <= stored_layers <= (0 if backprop == "store" else layers):
            raise ValueError(
                f"got stored_layers={stored_layers}, expected 0 to {layers}, and 0 for "
                "backprop='store', which stores all"
            )
        if backprop == "reverse" and not invertible:
            raise ValueError(
                "got backprop='reverse' for a model of one stream, expected any other: "
                "its layers have no inverse. Take reversible=True to store nothing"
            )
        self.layers, self.invertible, self.grid = layers, invertible, options.grid
        self.compute_dtype, self.param_dtype = options.compute_dtype, options.param_dtype
        self.check_exactness = options.check_exactness
        self._unroll, self._keep_operands = options.unroll, options.keep_operands
        self._strategy = Strategy(backprop, stored_layers, layers)

    @property
    def strategies(self) -> dict[str, Strategy]:
        """The strategy of the one chain, under the name "layers"."""
        return {"layers": self._strategy}

    @property
    def most_stored_layers(self) -> int:
        """The largest valid `stored_layers`: the chain's layers, or 0 if it stores all anyway."""
        return 0 if self._strategy.backprop == "store" else self._strategy.layers

    @abstractmethod
    def init(self, key: jax.Array) -> Variables:
        """Initialises the variables."""

    def probes(self) -> dict[str, Exactness] | None:
        """The probe of the exactness check; None if the chain is not rebuilt or not checked."""
        checked = self._strategy.rebuilds and self.check_exactness
        return {"layers": Exactness.probe()} if checked else None

    def run_chain(
        self,
        layer: Layer,
        params_L: Any,
        x: tuple[jax.Array, ...],
        *,
        sweep: Sweep = Sweep(),
        **data: Any,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """Runs the chain: (the streams after all layers, stacked auxiliary outputs).

        Args:
          layer: one without an inverse is stored where the model's would be reversed: outside of
            training, where nothing is kept anyway.
          x: the streams, with the batch as their first axis.
          sweep: as passed to the task's `loss`.
          data: `shared` and `data_L` of `chain`.
        """
        backprop, stored_layers, _ = self._strategy
        if backprop == "reverse" and isinstance(layer, PlainLayer):
            backprop, stored_layers = "store", 0
        if self._keep_operands and isinstance(layer, Block):
            layer = keeping_operands(layer)
        return chain(
            layer,
            params_L,
            on_batch(x),
            backprop=backprop,
            stored_layers=stored_layers,
            unroll=self._unroll,
            update=sweep.update,
            state_L=sweep.state_L("layers"),
            # No `.get`: a probe of another name is an error, not a chain that is never checked.
            probe=None if sweep.probes is None else sweep.probes["layers"],
            **data,
        )
