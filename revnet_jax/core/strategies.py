"""What the gradient of a layer keeps from the forward pass, and what that costs.

| backprop   | kept per layer                 | extra compute                        |
|------------|--------------------------------|--------------------------------------|
| store      | products, convolutions, sums   | none, or cheap arithmetic            |
| remat_dots | matrix products, convolutions  | the rest of a forward                |
| remat      | the streams                    | one forward, less what is not needed |
| offload    | the streams, in host memory    | as remat, and two transfers          |
| reverse    | nothing (or a residue)         | one forward                          |

`remat` is gradient checkpointing. All strategies compute the same function of the same arguments,
and can be mixed in a chain. None of them keeps what the branch of a reversible layer has named
`GATHERED` by `jax.ad_checkpoint.checkpoint_name` (all-gathered weights).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from revnet_jax.core.evaluate import gathering_again, without_isolation

Backprop = Literal["store", "remat_dots", "remat", "offload", "reverse"]
STRATEGIES: tuple[Backprop, ...] = get_args(Backprop)

_LAYER_INPUT = "layer_input"


class LayerRun(NamedTuple):
    """Layers `start` to `stop` of a section, all under one strategy."""

    section: int
    start: int
    stop: int
    backprop: Backprop

    @property
    def length(self) -> int:
        return self.stop - self.start


def plan_runs(depths: Sequence[int], backprop: Backprop, stored_layers: int) -> list[LayerRun]:
    """Splits sections into runs: the last `stored_layers` layers store, the others use `backprop`.

    Args:
      depths: layers of each section.
    """
    # Counted from the start of the chain: how many layers do not store.
    left = sum(depths) - stored_layers
    runs = []
    for section, depth in enumerate(depths):
        turn = depth if backprop == "store" else min(depth, max(left, 0))
        left -= depth
        # Before `turn` a section's layers use `backprop`, from there on they store. Either part may
        # be empty.
        parts = (LayerRun(section, 0, turn, backprop), LayerRun(section, turn, depth, "store"))
        runs += [run for run in parts if run.length]
    return runs


def per_iteration(backprop: Backprop, unroll: int) -> int:
    """Layers per loop iteration.

    One for remat: a compiler might recompute several unrolled layers at once, and hold them all.
    """
    return unroll if backprop in ("store", "reverse") else 1


def remembering(forward: Callable[..., Any], backprop: Backprop, *, alone: bool) -> Callable:
    """Wraps `forward(params, x, context)` to keep for its gradient what the strategy says.

    Args:
      alone: whether it runs outside a loop. There common-subexpression elimination would merge the
        recomputation with the forward pass, so it is prevented. Inside a loop body that cannot
        happen, and preventing it would cost copies.
    """
    policies = jax.checkpoint_policies
    if backprop == "reverse":
        return forward
    if backprop == "store":

        def gathering(params, x, context):
            # The other strategies differentiate a layer where they have just evaluated it.
            with gathering_again():
                return forward(params, x, context)

        return gathering
    policy = {
        "remat": None,  # keeps the inputs alone
        "remat_dots": _is_product,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[backprop]

    def named(params, x, context):
        if backprop == "offload":
            # The policy finds what to move to the host by its name.
            x = jax.tree.map(lambda leaf: checkpoint_name(leaf, _LAYER_INPUT), x)
        with without_isolation() if backprop == "remat_dots" else contextlib.nullcontext():
            return forward(params, x, context)

    return jax.checkpoint(named, policy=policy, prevent_cse=alone)


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    """A checkpoint policy: keep products of activations with weights, and convolutions.

    Products of activations with activations (attention scores) are too large to keep.
    """
    is_dot = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return bool(is_dot) or primitive.name == "conv_general_dilated"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """A pullback without the arrays that the backward pass has anyway.

    Those are weights, shared inputs and per-layer data.
    arrays: the other leaves of the pullback.
    places: for each leaf its index among the arrays at hand, or None if it is in `arrays`.
    """

    arrays: list[Any]
    places: tuple[int | None, ...] = field(metadata={"static": True})
    structure: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, pullback: Callable, at_hand: Any) -> Kept:
        """Splits a pullback.

        Args:
          at_hand: the tree of arrays that `pullback` was made from. Leaves are recognised by
            identity, so it must hold the same traced values.
        """
        leaves, structure = jax.tree.flatten(pullback)
        known = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(at_hand))}
        places = tuple(known.get(id(leaf)) for leaf in leaves)
        arrays = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return cls(arrays, places, structure)

    def pullback(self, at_hand: Any) -> Callable:
        """Rebuilds the pullback; at_hand must hold the same values as in `of`."""
        arrays, known = iter(self.arrays), jax.tree.leaves(at_hand)
        leaves = [next(arrays) if place is None else known[place] for place in self.places]
        return jax.tree.unflatten(self.structure, leaves)
