"""One training step, and one evaluation step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.models import Network, Variables

Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that defines a run, besides its config.

    step: updates made so far, int32.
    key: the run's PRNG key, for networks that draw random numbers in training.
    exact_mismatches: elements of reconstructed chain inputs that ever differed, float32.
    """

    step: jax.Array
    variables: Variables
    opt_state: Any
    key: jax.Array
    exact_mismatches: jax.Array


def init_state(network: Network, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = network.init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        variables=variables,
        opt_state=optimizer.init(variables.params),
        key=run_key,
        exact_mismatches=jnp.zeros((), jnp.float32),
    )


def make_train_step(
    network: Network,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure function `(state, batch) -> (state, metrics)`, to be jitted with a donated state.

    Metrics are scalars: of the batch before the update, and the norm of all variables after it.
    Where chains are reversed and checked, they include the run-time exactness check:
    `exact_mismatches` (since the start of the run), `exact_max_difference`, and `grid_range_used`
    (1.0 is where streams stop being exact).
    """

    def loss_fn(params, probes, stats, batch):
        logits_BV, new_stats = network.apply(
            Variables(params, stats), batch["image"], train=True, probes=probes
        )
        losses_B = cross_entropy(logits_BV, batch["label"], label_smoothing)
        return jnp.mean(losses_B), (new_stats, jnp.mean(is_correct(logits_BV, batch["label"])))

    def train_step(state, batch):
        params, stats = state.variables
        value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, (new_stats, accuracy)), (grads, exactness) = value_and_grad(
            params, network.probes(), stats, batch
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        metrics = {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "gradient_norm": optax.tree.norm(grads),
        }
        mismatches = state.exact_mismatches
        if exactness is not None:
            chains = list(exactness.values())
            mismatches = mismatches + sum(chain.mismatches for chain in chains)
            metrics["exact_mismatches"] = mismatches
            metrics["exact_max_difference"] = _largest(chain.max_difference for chain in chains)
            if network.grid is not None:
                limit = network.grid.limit(jnp.float32)
                metrics["grid_range_used"] = _largest(chain.max_abs for chain in chains) / limit
        variables = Variables(optax.apply_updates(params, updates), new_stats)
        # Of everything that the next step or a checkpoint would carry on.
        metrics["variables_norm"] = optax.tree.norm(variables)
        new_state = TrainState(
            step=state.step + 1,
            variables=variables,
            opt_state=opt_state,
            key=state.key,
            exact_mismatches=mismatches,
        )
        return new_state, metrics

    return train_step


def make_eval_step(network: Network) -> Callable[[Variables, Batch], dict[str, jax.Array]]:
    """The pure function `(variables, batch) -> sums` over the examples that have weight."""

    def eval_step(variables, batch):
        logits_BV, _ = network.apply(variables, batch["image"], train=False)
        weight_B = batch["weight"]
        return {
            "loss": jnp.sum(weight_B * cross_entropy(logits_BV, batch["label"])),
            "correct": jnp.sum(weight_B * is_correct(logits_BV, batch["label"])),
            "count": jnp.sum(weight_B),
        }

    return eval_step


def cross_entropy(
    logits_BV: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Negative log-likelihood in nats, [B].

    label_smoothing: share of the target spread over all classes (Szegedy et al. 2016,
      arXiv:1512.00567, section 7).
    """
    if label_smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits_BV, label_B)
    target_BV = jax.nn.one_hot(label_B, logits_BV.shape[-1], dtype=logits_BV.dtype)
    return optax.softmax_cross_entropy(logits_BV, optax.smooth_labels(target_BV, label_smoothing))


def is_correct(logits_BV: jax.Array, label_B: jax.Array) -> jax.Array:
    """1.0 where the largest logit is the label's, [B]."""
    return (jnp.argmax(logits_BV, axis=-1) == label_B).astype(jnp.float32)


def _largest(values):
    return jnp.max(jnp.stack(list(values)))
