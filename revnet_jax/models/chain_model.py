"""A model that is one chain of equal layers, with whatever comes before and after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import STRATEGIES, Backprop, Exactness, Grid, Layer, chain
from revnet_jax.models.model import Lockstep, Variables
from revnet_jax.models.partition import Rules, on_batch
from revnet_jax.models.strategies import Strategy


class ChainModel(ABC):
    """The chain, and how its gradient is computed; see `Model`.

    A subclass adds `init`, whose parameters have the chain's under "layers", stacked, and functions
    that call `run_chain`.

    invertible: whether layers have an inverse: blocks have, a `PlainLayer` has none.
    backprop, stored_layers, unroll: what the gradient costs (see `chain`).
    compute_dtype: of the branches; streams, normalisations and logits are float32.
    param_dtype: of kernels and embeddings; other parameters are float32.
    grid: where streams live, for the block to be built with; None for free floats.
    check_exactness: whether `probes` has any: the check keeps the chain's input.

    Raises ValueError for what does not go together.
    """

    rules: Rules = ()
    stacked: Sequence[str] = ("layers",)

    def __init__(
        self,
        *,
        layers: int,
        invertible: bool = True,
        backprop: Backprop = "reverse",
        stored_layers: int = 0,
        unroll: int = 1,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        grid: Grid | None = Grid(),
        check_exactness: bool = True,
    ):
        if backprop not in STRATEGIES:
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
        self.layers, self.invertible, self.grid = layers, invertible, grid
        self.compute_dtype, self.param_dtype = compute_dtype, param_dtype
        self.check_exactness = check_exactness
        self._unroll = unroll
        self._strategy = Strategy(backprop, stored_layers, layers)

    @property
    def strategies(self) -> dict[str, Strategy]:
        """Of the one chain there is."""
        return {"layers": self._strategy}

    @property
    def most_stored_layers(self) -> int:
        """How many there are in chains that do not store anyway."""
        return 0 if self._strategy.backprop == "store" else self._strategy.layers

    @abstractmethod
    def init(self, key: jax.Array) -> Variables:
        """Fresh variables."""

    def probes(self) -> dict[str, Exactness] | None:
        """What takes the check that the chain was undone exactly; None where there is none."""
        checked = self._strategy.rebuilds and self.check_exactness
        return {"layers": Exactness.probe()} if checked else None

    def run_chain(
        self,
        layer: Layer,
        params_L: Any,
        x: tuple[jax.Array, ...],
        *,
        probes: dict[str, Exactness] | None = None,
        lockstep: Lockstep | None = None,
        **data: Any,
    ) -> tuple[tuple[jax.Array, ...], Any]:
        """(the streams after all layers, what the branches return besides, stacked).

        x: the streams, with the batch as their first axis.
        probes, lockstep: as the task's `loss` was given them.
        data: `shared` and `data_L` of `chain`.
        """
        return chain(
            layer,
            params_L,
            on_batch(x),
            backprop=self._strategy.backprop,
            stored_layers=self._strategy.stored_layers,
            unroll=self._unroll,
            update=lockstep and lockstep.update,
            state_L=lockstep and lockstep.states["layers"],
            probe=probes and probes["layers"],
            **data,
        )
