"""The protocol that training expects of a model, and the values that it passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from revnet_jax.core import Backprop, Exactness, Grid
from revnet_jax.models.partition import Rules


class Strategy(NamedTuple):
    """The strategy of a chain of `layers` layers, or of a transition (0 layers)."""

    backprop: Backprop
    stored_layers: int
    layers: int

    @property
    def stores(self) -> bool:
        """Whether nothing is recomputed."""
        return self.backprop == "store" or 0 < self.layers == self.stored_layers

    @property
    def rebuilds(self) -> bool:
        """Whether the chain's input is rebuilt from its output."""
        return self.backprop == "reverse" and not self.stores


class Variables(NamedTuple):
    """Trainable parameters, and running averages of batch statistics, as trees by group."""

    params: Any
    stats: Any


class Lockstep(NamedTuple):
    """The optimizer's update of every chain's layers inside the backward sweep: see `chain`.

    update: `(dparams, state, params) -> (params, state)` of one layer.
    states: the optimizer's state of each group, stacked over layers.
    """

    update: Any
    states: Mapping[str, Any]


class Model(Protocol):
    """A model as pure functions of its variables. Constructing one computes nothing; `init` does.

    The protocol has no `apply`: the model's task calls it, see `models/task.py`. A model that is
    one chain of equal layers inherits all of this except `init` from `ChainModel`.

    rules: how parameters are split over a mesh (`models/partition.py`); () leaves them whole.
    grid: the grid that streams are kept on; None for ordinary floats.
    """

    rules: Rules
    grid: Grid | None

    @property
    def invertible(self) -> bool:
        """Whether its chains can be reversed."""
        ...

    @property
    def strategies(self) -> Mapping[str, Strategy]:
        """How the gradient of each chain is computed, by name."""
        ...

    @property
    def most_stored_layers(self) -> int:
        """The largest valid `stored_layers`: the layers of chains that do not store all anyway."""
        ...

    @property
    def stacked(self) -> Sequence[str]:
        """The groups of `params` whose leaves have a leading axis of one per layer of a chain."""
        ...

    def init(self, key: jax.Array) -> Variables:
        """Initialises the variables; `params` is a dictionary of groups."""
        ...

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain that is rebuilt and checked, by name; None if there is none."""
        ...


def num_params(variables: Variables) -> int:
    """The number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.params))
