"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import trees
from revnet_jax.models import Variables
from revnet_jax.models.task import Batch, Model, Task
from revnet_jax.optimizers.optimizer import Optimizer
from revnet_jax.optimizers.rounding import widened
from revnet_jax.training.ema import first_average, next_average


class TrainState(NamedTuple):
    """Everything that defines a run besides its config; what a checkpoint holds.

    Attributes:
      step: updates made so far, int32.
      key: the run's PRNG key, for networks that draw random numbers in training.
      exact_mismatches: mismatches that the exactness check has found since step 0, float32.
      ema: the moving average of the variables, float32, with None for frozen parameters; None if
        the run keeps none.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    key: jax.Array
    exact_mismatches: jax.Array
    ema: Variables | None = None

    @classmethod
    def of_variables(cls, variables: Any, ema: Variables | None = None) -> TrainState:
        """Returns a state with only the variables, or only their average, to restore just these."""
        # None has no leaves, so nothing else is read from the checkpoint.
        nothing: Any = None
        return cls(nothing, variables, nothing, nothing, nothing, ema)

    @property
    def for_evaluation(self) -> Variables:
        """The variables that evaluation, generation and export use: the average, if it is kept."""
        if self.ema is None:
            return self.variables
        # Frozen parameters are None in the average, and are taken from the variables.
        return self.ema if self.variables is None else trees.join(self.ema, self.variables)


def init_state(
    network: Model,
    optimizer: Optimizer,
    seed: int,
    variables: Variables | None = None,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      variables: weights to start from, instead of random ones. Those that are None are random.
      ema: whether to keep an average of the variables.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    random = network.init(init_key)
    variables = random if variables is None else trees.join(variables, random)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables.params),
        key=run_key,
        # A float, because the count of each step is a cotangent (see `Exactness`).
        exact_mismatches=jnp.zeros((), jnp.float32),
        ema=first_average(variables, optimizer.trainable) if ema else None,
    )


def make_train_step(
    task: Task, optimizer: Optimizer, schedule: optax.Schedule, *, ema_decay: float = 0.0
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure function `(state, batch) -> (state, metrics)`.

    It is meant to be jitted with the state donated, so that parameters and moments are updated in
    place and do not exist twice. Gradient accumulation and updates in lockstep are the optimizer's:
    see `Optimizer.step`.

    Metrics are scalars: loss, the task's other metrics and gradient norm of the batch before the
    update, the learning rate, and the norm of all floating-point variables after it. If chains are
    reversed and checked, they include the run-time exactness check: `exact_mismatches` (since the
    start of the run), `exact_max_difference`, `grid_range_used` (from 1.0 on, streams are no
    longer exact), and `grid_updates_lost` (the share of updates that rounded to nothing:
    near 1.0, streams stand still).

    Args:
      schedule: the optimizer's learning rate, for the metrics only.
      ema_decay: decay of the average of the variables (see `next_average`), which is updated last.
        Used only if the state has an average.
    """
    network = task.network

    def train_step(state, batch):
        # Derived from the step, not split from the last key, so that random numbers depend on the
        # seed and the step alone.
        key = jax.random.fold_in(state.key, state.step)
        new = optimizer.step(
            task.loss, state.variables, state.opt_state, batch, key, network.probes()
        )
        mismatches, checked = _check(new.exactness, state.exact_mismatches, network.grid)
        metrics = {
            "train_loss": new.loss,
            **new.others,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": new.gradient_norm,
            **checked,
            # Not finite if any variable is not. Training then ends before the state is saved.
            "variables_norm": optax.tree.norm(widened(trees.split(new.variables)[0])),
        }
        ema = state.ema
        if ema is not None:
            with jax.named_scope("update"):
                ema = next_average(ema, new.variables, state.step, ema_decay)
        step, key = state.step + 1, state.key
        return TrainState(step, new.variables, new.state, key, mismatches, ema), metrics

    return train_step


def _check(exactness, mismatches, grid):
    """Returns the mismatches up to this step, and the metrics of its exactness check, if any."""
    if exactness is None:
        return mismatches, {}
    chains = list(exactness.values())
    mismatches = mismatches + sum(chain.mismatches for chain in chains)
    metrics = {
        "exact_mismatches": mismatches,
        "exact_max_difference": _largest(chain.max_difference for chain in chains),
    }
    if grid is not None:
        largest = _largest(chain.max_abs for chain in chains)
        metrics["grid_range_used"] = largest / grid.limit(jnp.float32)
        updates, lost = (
            sum(getattr(chain, name) for chain in chains) for name in ("updates", "lost_updates")
        )
        metrics["grid_updates_lost"] = lost / jnp.maximum(updates, 1)
    return mismatches, metrics


def _largest(values):
    return jnp.max(jnp.stack(list(values)))
