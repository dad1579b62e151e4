"""Describes the model of a config, and the activation memory of its gradient, without training."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.core import STRATEGIES, trees
from revnet_jax.families import build_task
from revnet_jax.models import Sweep, Variables, num_params
from revnet_jax.models.task import Task
from revnet_jax.optimizers.trainable import Trainable


def describe_model(config: ConfigDict) -> dict[str, Any]:
    """Returns the parameters, the chains, and the activation bytes per example of each strategy.

    - example: shapes of one example of a batch.
    - activation_bytes_per_example: bytes that the forward pass keeps for the backward pass, without
      parameters, by strategy; null for a strategy that the model does not support. Counted by
      abstract evaluation, before the compiler shares or fuses anything; nothing is computed. The
      bytes of `offload` are in host memory.
    - stored_layers: the last layers of each chain that are stored, in place of what `backprop`
      says; null for -1, as many as fit, which is found at launch.
    """
    task = build_task(config)
    network = task.network
    trainable = Trainable(config.optimizer.trainable)
    auto = config.model.stored_layers == -1
    kept = {strategy: None for strategy in STRATEGIES}
    for strategy in STRATEGIES:
        if strategy != "reverse" or network.invertible:
            changed = config.copy_and_resolve_references()
            # One strategy for all layers, whatever mixture the config asks for.
            changed.model.update({"backprop": strategy, "stored_layers": 0})
            kept[strategy] = activation_bytes_per_example(build_task(changed), trainable)
    return {
        "family": config.model.family,
        "num_params": num_params(jax.eval_shape(network.init, jax.random.key(0))),
        "example": {name: leaf.shape[1:] for name, leaf in task.batch_shapes(1).items()},
        "chains": [
            {
                "name": name,
                "layers": chain.layers,
                "backprop": chain.backprop,
                "stored_layers": None if auto else chain.stored_layers,
            }
            for name, chain in network.strategies.items()
            if chain.layers
        ],
        "activation_bytes_per_example": kept,
    }


def activation_bytes_per_example(task: Task, trainable: Trainable) -> int:
    """Bytes that the forward pass keeps for the backward pass (residuals), per example."""
    # Parameters and constants, which do not grow with the batch, drop out of the difference.
    return _kept_bytes(task, trainable, 2) - _kept_bytes(task, trainable, 1)


def _kept_bytes(task, trainable, batch_size):
    def kept(params, stats, batch, key):
        trained, frozen = trainable.divide(params)

        def loss(trained, probes):
            variables = Variables(trees.join(trained, frozen), stats)
            return task.loss(variables, batch, key, sweep=Sweep(probes))[0]

        # In what is trained alone: the derivative by other parameters would keep more.
        _, pullback = jax.vjp(loss, trained, task.network.probes())
        # A pullback is a pytree of its residuals. One array needed by two operations counts once.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())

    # All arguments are shapes, so that a model of any size can be described anywhere.
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(task.network.init, key)
    leaves = jax.eval_shape(kept, *variables, task.batch_shapes(batch_size), key)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
