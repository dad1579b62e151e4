"""What a training step asks of an optimizer, and the optimizer that updates after the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import Exactness, trees
from revnet_jax.models.model import Sweep, Variables
from revnet_jax.optimizers.rounding import apply_updates, widened
from revnet_jax.optimizers.trainable import Trainable


class Loss(Protocol):
    """The loss of a batch: `Task.loss` of `revnet_jax/models/task.py`."""

    def __call__(
        self, variables: Variables, batch: Any, key: jax.Array, *, sweep: Sweep
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]: ...


class StepResult(NamedTuple):
    """What one step of an optimizer returns.

    Attributes:
      loss: of the batch, before the update.
      others: the other means over the batch that the loss returned.
      variables: new parameters and running averages.
      state: the new state of the optimizer.
      exactness: of every chain that was checked, by name; None if none was.
      gradient_norm: L2 norm of the gradient of all trained parameters.
    """

    loss: jax.Array
    others: dict[str, jax.Array]
    variables: Variables
    state: Any
    exactness: dict[str, Exactness] | None
    gradient_norm: jax.Array


class Optimizer(Protocol):
    """Computes the gradient and applies it, after the backward pass or inside of it."""

    @property
    def trainable(self) -> Trainable:
        """The parameters that are trained."""
        ...

    def init(self, params: Any) -> Any:
        """The state before the first step."""
        ...

    def step(
        self,
        loss: Loss,
        variables: Variables,
        state: Any,
        batch: dict[str, jax.Array],
        key: jax.Array,
        probes: dict[str, Exactness] | None,
    ) -> StepResult:
        """Makes one step. probes: of the network, for the exactness check."""
        ...

    def moments(self, state: Any) -> dict[str, Any]:
        """First moments by group of parameters: SGD's momentum, Adam's average of gradients.

        Raises ValueError for an optimizer that has none.
        """
        ...


class OrdinaryOptimizer(NamedTuple):
    """Computes the gradient of all parameters, then updates them. See `Optimizer`.

    Attributes:
      transformation: the optimizer as one of optax.
      microbatches: gradient accumulation: the number of parts that a batch is split into. Only the
        activations of one part are in memory at a time, and batch statistics are taken over one
        part.
      trainable: the parameters that are trained.
    """

    transformation: optax.GradientTransformation
    microbatches: int = 1
    trainable: Trainable = Trainable()

    def init(self, params: Any) -> Any:
        """The state before the first step: that of the transformation."""
        return self.transformation.init(self.trainable.divide(params)[0])

    def step(
        self,
        loss: Loss,
        variables: Variables,
        state: Any,
        batch: dict[str, jax.Array],
        key: jax.Array,
        probes: dict[str, Exactness] | None,
    ) -> StepResult:
        """Makes one step; see `Optimizer`."""

        def gradient(params, stats, batch, key):
            def of_params(params, probes):
                variables = Variables(trees.join(params, frozen), stats)
                return loss(variables, batch, key, sweep=Sweep(probes))

            grad = jax.value_and_grad(of_params, argnums=(0, 1), has_aux=True)
            return grad(params, probes)

        params, stats = variables
        params, frozen = self.trainable.divide(params)
        (value, (stats, others)), (grads, exactness) = accumulate(
            gradient, params, stats, batch, key, self.microbatches
        )
        with jax.named_scope("update"):
            updates, state = self.transformation.update(grads, state, params)
            params = apply_updates(params, updates)
        # The gradient is the one before clipping, which is part of the transformation.
        norm = optax.tree.norm(widened(grads))
        variables = Variables(trees.join(params, frozen), stats)
        return StepResult(value, others, variables, state, exactness, norm)

    def moments(self, state: Any) -> dict[str, Any]:
        """First moments by group of parameters."""
        found = first_moments(state)
        return {group: [tree[group] for tree in found] for group in found[0]}


def first_moments(state: Any) -> list[Any]:
    """The trees of first moments in a state of optax: `trace` of SGD, `mu` of Adam and others.

    Muon has both, one for the matrices and one for the other parameters.

    Raises ValueError for a state that has none.
    """
    named = [optax.tree.get_all_with_path(state, name) for name in ("trace", "mu")]
    if not any(named):
        raise ValueError(
            "got an optimizer without first moments, expected a `trace` as SGD's with momentum, or "
            "a `mu` as Adam's: they stand for gradients when strategies are compared"
        )
    return [tree for found in named for _, tree in found]


def accumulate(
    gradient: Callable[..., Any],
    params: Any,
    stats: Any,
    batch: Any,
    key: jax.Array,
    microbatches: int,
) -> Any:
    """Gradient accumulation: what `gradient(params, stats, batch, key)` returns, part by part.

    Args:
      gradient: `-> ((loss, (stats, others)), (grads, exactness))`, where loss, others and grads are
        means over examples.
    """
    if microbatches == 1:
        return gradient(params, stats, batch, key)

    def parts(array):
        # Strided, not contiguous: every device keeps a share of each part, without communication.
        split = array.reshape(-1, microbatches, *array.shape[1:])  # [B / m, m, ...]
        return jnp.swapaxes(split, 0, 1)

    def body(carry, part):
        stats, total = carry
        (loss, (stats, others)), (grads, exactness) = gradient(params, stats, *part)
        # Running averages go from part to part. Gradients are added in float32, because a long sum
        # in bfloat16 loses its small terms.
        return (stats, jax.tree.map(jnp.add, total, widened(grads))), (loss, others, exactness)

    start = stats, jax.tree.map(jnp.zeros_like, widened(params))
    # A key for each part, so that dropout differs between them.
    inputs = jax.tree.map(parts, batch), jax.random.split(key, microbatches)
    (stats, total), (losses, others, exactness) = jax.lax.scan(body, start, inputs)
    # The check's figures are counts, which add up. Losses and gradients are means over parts of
    # equal size, so their mean is that of the batch.
    exactness = jax.tree.map(lambda counts: jnp.sum(counts, axis=0), exactness)
    grads = jax.tree.map(lambda leaf: leaf / microbatches, total)
    return (jnp.mean(losses), (stats, jax.tree.map(jnp.mean, others))), (grads, exactness)
