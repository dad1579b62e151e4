"""What a config would train, and what its gradient would keep in memory, without training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from revnet_jax.core import STRATEGIES
from revnet_jax.models import Network, Variables, num_params
from revnet_jax.training.build import build_network


def describe(config: ConfigDict) -> dict[str, Any]:
    """Parameters, layers, chains, and the activation bytes kept per example by each strategy.

    activation_bytes_per_example: what the forward pass hands to the backward pass, by strategy,
      parameters aside; null for a strategy the network has none of. Counted by abstract
      evaluation, before any compiler shares or fuses; nothing is computed. What `offload` keeps
      is in the host's memory.
    stored_layers: of each chain, in place of what `backprop` says; null where it is "auto" and has
      to be found at launch.
    """
    network = build_network(config)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    kept = {strategy: None for strategy in STRATEGIES}
    for strategy in STRATEGIES:
        if strategy != "reverse" or network.architecture.num_streams > 1:
            kept[strategy] = activation_bytes_per_example(network.with_backprop(strategy))
    return {
        "family": network.architecture.family,
        "num_params": num_params(variables),
        "layers": sum(network.architecture.units),
        "input_shape": list(network.architecture.image_shape),
        "num_classes": network.architecture.num_classes,
        "chains": [
            {
                "name": name,
                "layers": sum(g.depth for g in groups if g.unit),
                "backprop": network.strategies[name].backprop,
                "stored_layers": (
                    None
                    if config.model.stored_layers == "auto"
                    else network.strategies[name].stored_layers
                ),
            }
            for name, groups in network.chains.items()
        ],
        "activation_bytes_per_example": kept,
    }


def activation_bytes_per_example(network: Network) -> int:
    """Bytes that the network's forward pass keeps for its backward pass, for each image."""
    # What does not grow with the batch (parameters, constants) drops out of the difference.
    return _kept_bytes(network, 2) - _kept_bytes(network, 1)


def _kept_bytes(network, batch_size):
    def kept(params, stats, image_BHWC):
        def loss(params, probes):
            variables = Variables(params, stats)
            logits_BV, _ = network.apply(variables, image_BHWC, train=True, probes=probes)
            return jnp.sum(logits_BV)

        _, pullback = jax.vjp(loss, params, network.probes())
        # A pullback is a tree of all it holds on to; an array that two operations need counts once.
        return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values())

    variables = jax.eval_shape(network.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((batch_size, *network.architecture.image_shape), jnp.float32)
    leaves = jax.eval_shape(kept, *variables, image)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
