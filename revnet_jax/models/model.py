"""The protocol that training expects of a model, and the values that it passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

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
        # A transition stores 0 of 0 layers, which does not count as all of them.
        return self.backprop == "store" or 0 < self.layers == self.stored_layers

    @property
    def rebuilds(self) -> bool:
        """Whether the chain's input is rebuilt from its output."""
        return self.backprop == "reverse" and not self.stores


class Variables(NamedTuple):
    """Trainable parameters, and running averages of batch statistics, as trees by group."""

    params: Any
    stats: Any


@dataclass(frozen=True)
class ModelOptions:
    """How a model computes, whatever its shape: gradients of chains, dtypes, exactness.

    Attributes:
      backprop: the gradient's strategy (see `chain`), one of `STRATEGIES` for all chains. A
        `ConvNet` also takes a tuple with one per chain. "reverse" needs layers with an inverse.
      stored_layers: number of layers, counted from the last, that store instead.
      unroll: layers per iteration of the loop over layers (see `chain`).
      keep_operands: keep the operands of products for the derivative (see `keeping_operands`).
      compute_dtype: of the branches (mixed precision); streams, normalisations, batch statistics
        and logits are float32.
      param_dtype: of kernels and embeddings; other parameters are float32.
      grid: the grid that reversible layers keep their streams on; None for ordinary floats.
      check_exactness: whether `probes` returns probes. The check keeps each chain's input in
        memory.
    """

    backprop: Backprop | tuple[Backprop, ...] = "reverse"
    stored_layers: int = 0
    unroll: int = 1
    keep_operands: bool = False
    compute_dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    grid: Grid | None = Grid()
    check_exactness: bool = True


class Sweep(NamedTuple):
    """What the backward sweep of a network's chains does beside computing gradients.

    It goes from the optimizer through `Task.loss` and the network to `chain`. The sweep returns
    what it found as the cotangents of `probes`, new parameters as those of the parameters of
    chains, and new states as those of `states` (see `LockstepOptimizer.step`).

    Attributes:
      probes: as `Model.probes` returns them, for the exactness check; None for no check.
      update: `(dparams, state, params) -> (params, state)`, the optimizer's update of one layer;
        None for gradients.
      states: with `update`: the optimizer's state of each group of a chain, stacked over layers.
    """

    probes: Mapping[str, Exactness] | None = None
    update: Callable[..., tuple[Any, Any]] | None = None
    states: Mapping[str, Any] | None = None

    def state_L(self, group: str) -> Any:
        """The optimizer's state of a group, stacked over layers.

        None without `update`, and for a group without trained parameters.
        """
        return None if self.states is None or group not in self.states else self.states[group]


class Model(Protocol):
    """A model as pure functions of its variables. Constructing one computes nothing; `init` does.

    The protocol has no `apply`: the model's task calls it, see `models/task.py`. A model that is
    one chain of equal layers inherits all of this except `init` from `ChainModel`.

    Attributes:
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
