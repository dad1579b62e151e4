"""The optimizer inside the backward sweep: each layer is updated as soon as its gradient is known.

The gradients of a whole chain then never exist at once, and its parameters and moments are written
in place. Parameters outside chains (stem, transitions, head) are updated in the ordinary way, in
the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import Exactness, trees
from revnet_jax.models.model import Sweep, Variables
from revnet_jax.optimizers.optimizer import Loss, StepResult, first_moments
from revnet_jax.optimizers.rounding import apply_updates, widened
from revnet_jax.optimizers.trainable import Trainable


class LayerState(NamedTuple):
    """The optimizer state of all layers of one group.

    Attributes:
      floats_L: the floating-point leaves, stacked like the parameters, with None in place of
        counters.
      counters: the step counters, which are the same for every layer and group.
    """

    floats_L: Any
    counters: list[jax.Array]


class LockstepState(NamedTuple):
    """The optimizer state of a whole network.

    Attributes:
      outside: the ordinary state of all groups outside chains.
      layers: the state of each group in a chain, by its name.
    """

    outside: Any
    layers: dict[str, LayerState]


class Carried(NamedTuple):
    """What the backward sweep carries for each layer: optimizer state, squared gradient norm."""

    floats: Any
    squared_norm: jax.Array


class LockstepOptimizer(NamedTuple):
    """An optimizer for networks whose chains are updated in the backward sweep. See `Optimizer`.

    Attributes:
      outside: the optimizer of the groups outside chains.
      layer: the optimizer of the tree of one layer.
      stacked: the groups in chains, whose leaves have a leading axis of layers.
      trainable: the parameters that are trained.

    Correct only for optimizers that pass `check_layerwise`. Others mix layers (by a global norm,
    for example) and would compute a different update.
    """

    outside: optax.GradientTransformation
    layer: optax.GradientTransformation
    stacked: tuple[str, ...]
    trainable: Trainable = Trainable()

    def init(self, params: Mapping[str, Any]) -> LockstepState:
        """The state before the first step."""
        outside, layers = self._split(self.trainable.divide(params)[0])
        state = {name: self._init_layers(params_L) for name, params_L in layers.items()}
        return LockstepState(self.outside.init(outside), state)

    def step(
        self,
        loss: Loss,
        variables: Variables,
        state: LockstepState,
        batch: dict[str, jax.Array],
        key: jax.Array,
        probes: dict[str, Exactness] | None,
    ) -> StepResult:
        """Makes one step; see `Optimizer`. Needs the whole batch at once: it keeps no gradients."""
        params, stats = variables
        params, frozen = self.trainable.divide(params)
        update, carried = self._start(params, state)

        def of_params(params, probes, carried):
            variables = Variables(trees.join(params, frozen), stats)
            return loss(variables, batch, key, sweep=Sweep(probes, update, carried))

        # A backward pass can return nothing but cotangents. So the sweep, which has updated the
        # layers of chains by the time it ends, returns their new parameters as the cotangents of
        # the old ones, their new optimizer state as that of `carried`, and what the exactness check
        # found as that of `probes`. JAX does not ask what a cotangent stands for, only that it has
        # the shape and dtype of its argument. Outside of chains cotangents are gradients.
        grad = jax.value_and_grad(of_params, argnums=(0, 1, 2), has_aux=True)
        (value, (stats, others)), (cotangents, exactness, carried) = grad(params, probes, carried)
        with jax.named_scope("update"):
            params, state, norm = self._finish(params, state, cotangents, carried)
        variables = Variables(trees.join(params, frozen), stats)
        return StepResult(value, others, variables, state, exactness, norm)

    def moments(self, state: LockstepState) -> dict[str, Any]:
        """First moments by group of parameters."""
        layers = {name: first_moments(group.floats_L) for name, group in state.layers.items()}
        outside = first_moments(state.outside)
        return {group: [tree[group] for tree in outside] for group in outside[0]} | layers

    def _start(
        self, params: Mapping[str, Any], state: LockstepState
    ) -> tuple[Callable[..., tuple[Any, Carried]], dict[str, Carried]]:
        """Returns two fields of a `Sweep`: the update of one layer, and its states by group."""
        # The new optimizer state leaves the backward pass as a cotangent, which cannot be an
        # integer, so step counters are kept outside. All groups have made the same number of steps.
        counters = next(iter(state.layers.values())).counters

        def update(dparams, carried, params):
            layer_state = self._join(params, carried.floats, counters)
            updates, layer_state = self.layer.update(dparams, layer_state, params)
            # In the dtype of the placeholder below, because it returns as the cotangent of that.
            squared_norm = optax.tree.norm(widened(dparams), squared=True).astype(jnp.float32)
            floats, _ = trees.split(layer_state)
            return apply_updates(params, updates), Carried(floats, squared_norm)

        # The zeros are placeholders: the sweep returns the squared norms of gradients in their
        # place.
        carried = {
            name: Carried(layers.floats_L, jnp.zeros(_depth(params[name]), jnp.float32))
            for name, layers in state.layers.items()
        }
        return update, carried

    def _finish(
        self,
        params: Mapping[str, Any],
        state: LockstepState,
        cotangents: Mapping[str, Any],
        carried: Mapping[str, Carried],
    ) -> tuple[dict[str, Any], LockstepState, jax.Array]:
        """Returns (params, state, gradient norm) after the step.

        Args:
          cotangents: what the backward pass returned for `params`: gradients for the groups outside
            chains, but new parameters for the groups in chains, which the sweep has updated.
          carried: the new values of what the backward pass carried.
        """
        outside, layers = self._split(params)
        gradients, new_layers = self._split(cotangents)
        updates, outside_state = self.outside.update(gradients, state.outside, outside)
        squared_norm = optax.tree.norm(widened(gradients), squared=True)
        # |g|^2 is a sum over layers, so the gradients of a chain need not exist together.
        squared_norm += sum(jnp.sum(group.squared_norm) for group in carried.values())
        new_state = {
            name: LayerState(carried[name].floats, self._count(layers[name], state.layers[name]))
            for name in layers
        }
        # A group in neither part, a chain without trained parameters, stays as it is.
        new_params = {**params, **apply_updates(outside, updates), **new_layers}
        return new_params, LockstepState(outside_state, new_state), jnp.sqrt(squared_norm)

    def _init_layers(self, params_L):
        floats_L, counters_L = trees.split(jax.vmap(self.layer.init)(params_L))
        # `vmap` made a counter for each layer. All are equal, so one is kept.
        return LayerState(floats_L, [leaf[0] for leaf in jax.tree.leaves(counters_L)])

    def _count(self, params_L, state):
        """Returns the step counters after a step.

        They do not depend on the gradient, so this updates with zeros; XLA removes the rest.
        """
        params, floats = jax.tree.map(lambda leaf: leaf[0], (params_L, state.floats_L))
        gradient = jax.tree.map(jnp.zeros_like, params)
        _, new = self.layer.update(gradient, self._join(params, floats, state.counters), params)
        return jax.tree.leaves(trees.split(new)[1])

    def _join(self, params, floats, counters):
        # By shape alone, to learn where the state's tree has its counters.
        _, others = trees.split(jax.eval_shape(self.layer.init, params))
        return trees.join(floats, jax.tree.unflatten(jax.tree.structure(others), counters))

    def _split(self, groups):
        """Splits groups of trained parameters: those outside chains, and those in chains.

        A chain without trained parameters is in neither.
        """
        outside = {name: tree for name, tree in groups.items() if name not in self.stacked}
        layers = {name: groups[name] for name in self.stacked}
        return outside, {name: tree for name, tree in layers.items() if jax.tree.leaves(tree)}


def check_layerwise(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Raises ValueError if the update of layer 0 depends on the gradient of layer 1.

    Args:
      optimizer: the ordinary optimizer, for parameters stacked over layers.
      params: shapes are enough; every axis is cut to 2, so the check costs almost nothing.
    """

    @jax.jit
    def update(other):
        tiny = jax.tree.map(lambda leaf: jnp.ones([2] * leaf.ndim, leaf.dtype), params)
        gradient = jax.tree.map(lambda leaf: (0.5 * leaf).at[1].set(other), tiny)
        updates, state = optimizer.update(gradient, optimizer.init(tiny), tiny)
        return [leaf[0] for leaf in jax.tree.leaves(updates)], trees.split(state)[1]

    # NaN survives sums, norms and clipping. So if layer 0 or a counter has seen the gradient of
    # layer 1, it differs here, or is NaN, which equals nothing.
    pairs = zip(*(jax.tree.leaves(update(other)) for other in (0.5, jnp.nan)), strict=True)
    if not all(jnp.array_equal(a, b) for a, b in pairs):
        raise ValueError(
            "got lockstep and an optimizer that looks at all gradients at once (a global norm?), "
            "expected one that looks at a layer's: gradients of a chain never exist together. Clip "
            "each layer by its own norm: --config.optimizer.clip=layer"
        )


def _depth(params_L):
    return len(jax.tree.leaves(params_L)[0])
