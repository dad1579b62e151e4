"""The strategy of each chain and transition of an image network."""

from __future__ import annotations

from collections.abc import Sequence

from revnet_jax.core import STRATEGIES
from revnet_jax.models.convolutional.shape import ConvNetShape, Group, chains
from revnet_jax.models.model import ModelOptions, Strategy


def assign_strategies(
    shape: ConvNetShape,
    groups: Sequence[Group],
    options: ModelOptions,
) -> dict[str, Strategy]:
    """The strategy of each chain and each transition, by name.

    Args:
      options: its `stored_layers` count in all chains together, from the last; chains that store
        anyway are not counted.

    A transition stores if all layers of the chain after it store; otherwise it is remat.

    Raises ValueError for an unknown strategy, a wrong number of strategies, more stored layers than
    there are, or `reverse` for a network without an inverse.
    """
    backprop, stored_layers = options.backprop, options.stored_layers
    depths = {name: sum(g.depth for g in chain) for name, chain in chains(groups).items()}
    # A network without chains has transitions only, and takes one strategy for them.
    wanted = [backprop] * max(1, len(depths)) if isinstance(backprop, str) else list(backprop)
    if len(wanted) != max(1, len(depths)) or not set(wanted) <= set(STRATEGIES):
        raise ValueError(
            f"got backprop={backprop!r}, expected one of {', '.join(STRATEGIES)}, or one for each "
            f"of {len(depths)} chains"
        )
    if "reverse" in wanted and shape.num_streams == 1:
        raise ValueError(
            "got backprop='reverse' for a resnet, expected 'store' or 'remat': its units have no "
            "inverse. Take family='revnet' to store nothing"
        )
    # Not strict: without chains there is a strategy, but no depth.
    free = sum(n for n, name in zip(depths.values(), wanted, strict=False) if name != "store")
    if not 0 <= stored_layers <= free:
        raise ValueError(
            f"got stored_layers={stored_layers}, expected 0 to {free}, the number of "
            "layers in chains that do not store anyway"
        )
    found: dict[str, Strategy] = {}
    # Backwards: stored layers count from the end, and a transition does as the chain after it.
    transition = Strategy("store" if wanted[-1] == "store" else "remat", 0, 0)
    for group in reversed(groups):
        if group.is_transition:
            found[group.name] = transition
        elif group.name in depths:
            name, depth = wanted.pop(), depths[group.name]
            stored = 0 if name == "store" else min(stored_layers, depth)
            stored_layers -= stored
            found[group.name] = Strategy(name, stored, depth)
            transition = Strategy("store" if found[group.name].stores else "remat", 0, 0)
    return dict(reversed(found.items()))
