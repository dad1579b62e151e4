"""What training asks of a model: the protocol, and what goes in and out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from revnet_jax.core import Exactness, Grid
from revnet_jax.models.partition import Rules
from revnet_jax.models.strategies import Strategy


class Variables(NamedTuple):
    """Trees by group: trainable parameters, and the running averages of batch statistics."""

    params: Any
    stats: Any


class Lockstep(NamedTuple):
    """An update of every chain's layers inside the backward sweep: see `chain`.

    update: `(dparams, state, params) -> (params, state)` of one layer.
    states: what it carries, stacked, by group.
    """

    update: Any
    states: Mapping[str, Any]


class Model(Protocol):
    """A model as pure functions of its variables. Building one computes nothing: `init` does.

    How a model is applied is between it and its task, see `training/task.py`. A model that is one
    chain of equal layers inherits all of this but `init` from `ChainModel`.

    rules: how parameters are split over a mesh (`models/partition.py`); () leaves them whole.
    grid: where streams live; None for free floats.
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
        """How many layers there are in chains that do not store anyway."""
        ...

    @property
    def stacked(self) -> Sequence[str]:
        """The groups of `params` whose leaves have a leading axis of one per layer of a chain."""
        ...

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables; `params` is a dictionary of groups."""
        ...

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain whose input is rebuilt and checked, by name; None without any."""
        ...


def num_params(variables: Variables) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.params))
