"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.models import Lockstep, Variables
from revnet_jax.models.task import Batch, Model, Task
from revnet_jax.optimizers.lockstep import LockstepOptimizer
from revnet_jax.optimizers.rounding import apply_updates, widened

Optimizer = optax.GradientTransformation | LockstepOptimizer


class TrainState(NamedTuple):
    """Everything that defines a run besides its config; what a checkpoint holds.

    step: updates made so far, int32.
    key: the run's PRNG key, for networks that draw random numbers in training.
    exact_mismatches: mismatches that the exactness check has found since step 0, float32.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    key: jax.Array
    exact_mismatches: jax.Array

    @classmethod
    def of_variables(cls, variables: Variables) -> TrainState:
        """Returns a state of the variables alone: what is read from a checkpoint to use a model."""
        nothing: Any = None
        return cls(nothing, variables, nothing, nothing, nothing)


def init_state(
    network: Model, optimizer: Optimizer, seed: int, variables: Variables | None = None
) -> TrainState:
    """Returns the state before the first step.

    variables: weights to start from, instead of random ones.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    if variables is None:
        variables = network.init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables.params),
        key=run_key,
        exact_mismatches=jnp.zeros((), jnp.float32),
    )


def make_train_step(
    task: Task, optimizer: Optimizer, schedule: optax.Schedule, *, microbatches: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the pure function `(state, batch) -> (state, metrics)`.

    It is meant to be jitted with the state donated, so that parameters and moments are updated in
    place and do not exist twice.

    microbatches: gradient accumulation: the number of parts that a batch is split into. Only the
      activations of one part are in memory at a time, and batch statistics are taken over one
      part. A `LockstepOptimizer` needs 1, because it keeps no gradients to add up.

    Metrics are scalars: loss and gradient norm of the batch before the update, and the norm of all
    variables after it. If chains are reversed and checked, they include the run-time exactness
    check: `exact_mismatches` (since the start of the run), `exact_max_difference`, and
    `grid_range_used` (from 1.0 on, streams are no longer exact).
    """

    network = task.network

    def loss_fn(params, probes, lockstep, stats, batch, key):
        variables = Variables(params, stats)
        return task.loss(variables, batch, key, probes=probes, lockstep=lockstep)

    def gradient(params, stats, batch, key):
        grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        return grad(params, network.probes(), None, stats, batch, key)

    def ordinary(params, opt_state, stats, batch, key):
        found, (grads, exactness) = accumulate(gradient, params, stats, batch, key, microbatches)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = apply_updates(params, updates)
        return found, params, opt_state, exactness, optax.tree.norm(widened(grads))

    def in_lockstep(params, opt_state, stats, batch, key):
        update, carried = optimizer.start(params, opt_state)

        # A backward pass can only return cotangents, so the sweep returns new parameters as those
        # of `params`, and new optimizer state as those of `carried`: see `finish`.
        def loss(params, probes, carried):
            return loss_fn(params, probes, Lockstep(update, carried), stats, batch, key)

        found, (cotangents, exactness, carried) = jax.value_and_grad(
            loss, argnums=(0, 1, 2), has_aux=True
        )(params, network.probes(), carried)
        with jax.named_scope("update"):
            params, opt_state, norm = optimizer.finish(params, opt_state, cotangents, carried)
        return found, params, opt_state, exactness, norm

    if isinstance(optimizer, LockstepOptimizer) and microbatches > 1:
        raise ValueError(f"got microbatches={microbatches} for an update in lockstep, expected 1")
    step = in_lockstep if isinstance(optimizer, LockstepOptimizer) else ordinary

    def train_step(state, batch):
        params, stats = state.variables
        key = jax.random.fold_in(state.key, state.step)
        (loss, (new_stats, others)), params, opt_state, exactness, gradient_norm = step(
            params, state.opt_state, stats, batch, key
        )
        variables = Variables(params, new_stats)
        mismatches, checked = _check(exactness, state.exact_mismatches, network.grid)
        metrics = {
            "train_loss": loss,
            **others,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": gradient_norm,
            **checked,
            # Not finite if anything that goes into the next step or a checkpoint is not.
            "variables_norm": optax.tree.norm(widened(variables)),
        }
        return TrainState(state.step + 1, variables, opt_state, state.key, mismatches), metrics

    return train_step


def accumulate(
    gradient: Callable[..., Any],
    params: Any,
    stats: Any,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
) -> Any:
    """Gradient accumulation: what `gradient(params, stats, batch, key)` returns, part by part.

    gradient: `-> ((loss, (stats, others)), (grads, exactness))`, where loss, others and grads are
      means over examples.
    """
    if microbatches == 1:
        return gradient(params, stats, batch, key)

    def parts(array):
        # Strided, not contiguous: every device keeps a share of each part, without communication.
        split = array.reshape(-1, microbatches, *array.shape[1:])
        return jnp.swapaxes(split, 0, 1)

    def body(carry, part):
        stats, total = carry
        (loss, (stats, others)), (grads, exactness) = gradient(params, stats, *part)
        return (stats, jax.tree.map(jnp.add, total, widened(grads))), (loss, others, exactness)

    start = stats, jax.tree.map(jnp.zeros_like, widened(params))
    inputs = jax.tree.map(parts, batch), jax.random.split(key, microbatches)
    (stats, total), (losses, others, exactness) = jax.lax.scan(body, start, inputs)
    exactness = jax.tree.map(lambda counts: jnp.sum(counts, axis=0), exactness)
    grads = jax.tree.map(lambda leaf: leaf / microbatches, total)
    return (jnp.mean(losses), (stats, jax.tree.map(jnp.mean, others))), (grads, exactness)


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
    return mismatches, metrics


def _largest(values):
    return jnp.max(jnp.stack(list(values)))
