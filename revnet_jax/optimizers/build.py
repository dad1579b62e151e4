"""Optimizers and learning rate schedules, from optax."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from revnet_jax.models.partition import Rules
from revnet_jax.optimizers.muon import scale_by_muon
from revnet_jax.optimizers.rounding import MOMENTS, rounded

SCHEDULES_WITHOUT_END = ("constant", "piecewise")  # their rates do not depend on num_steps


def make_schedule(
    *,
    name: str,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    decay_steps: int,
    boundaries: Sequence[int],
    factor: float,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      name: "constant"; "cosine" (decays from the peak to 0 at `num_steps`); "wsd" (warm-up, stable,
        decay: the peak up to the last `decay_steps`, then linear to 0 at `num_steps`; Hu et al.
        2024, arXiv:2404.06395, whose decay is exponential; the linear one is of Hägele et al. 2024,
        arXiv:2405.18392); or "piecewise" (multiplied by `factor` at each of
        `boundaries`, in steps).
      warmup_steps: steps of linear warm-up from 0 to the peak `learning_rate`. They are part of
        `num_steps` and do not shift the boundaries.
      decay_steps: only for "wsd". They are part of `num_steps`.

    Raises ValueError for settings that cannot be used.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"got warmup_steps={warmup_steps}, expected 0 to {num_steps - 1}, less than num_steps"
        )
    if name == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif name == "cosine":
        # Counted from the end of the warm-up, so that the rate is 0 at `num_steps`.
        decay = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
        schedule = lambda step: decay(step - warmup_steps)
    elif name == "wsd":
        if not 1 <= decay_steps <= num_steps - warmup_steps:
            raise ValueError(
                f"got decay_steps={decay_steps} for wsd, expected 1 to {num_steps - warmup_steps}: "
                f"with warmup_steps={warmup_steps} they are part of num_steps={num_steps}"
            )
        # optax holds the first value until `transition_begin`: that is the stable phase.
        schedule = optax.linear_schedule(
            learning_rate, 0.0, decay_steps, transition_begin=num_steps - decay_steps
        )
    elif name == "piecewise":
        whole = all(isinstance(boundary, int) and boundary > 0 for boundary in boundaries)
        if not whole or list(boundaries) != sorted(set(boundaries)):
            raise ValueError(
                f"got boundaries={boundaries}, expected increasing whole steps, from 1"
            )
        schedule = optax.piecewise_constant_schedule(
            learning_rate, {boundary: factor for boundary in boundaries}
        )
    else:
        raise ValueError(f"got name={name!r}, expected one of piecewise, cosine, wsd, constant")
    # Without warm-up `where` never takes this; optax would log that it has 0 steps.
    warmup = optax.linear_schedule(0.0, learning_rate, max(1, warmup_steps))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)  # optax's schedules divide steps by steps
        return jnp.where(step < warmup_steps, warmup(step), schedule(step))

    return rate


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    momentum: float,
    nesterov: bool,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    clip: str,
    state_dtype: str,
    param_dtype: Any = jnp.float32,
    stacked: Collection[str] | None,
    rules: Rules = (),
) -> optax.GradientTransformation:
    """Builds one of the package's optimizers, with clipping and narrow moments.

    Weight decay applies only to leaves whose names end in "kernel" (convolutions and dense layers),
    not to biases, normalisations and embeddings.

    Args:
      schedule: the learning rate as a function of the step.
      name: "sgd" with momentum, where weight decay is an L2 penalty in the gradient, as in the
        ResNet papers; or, with decoupled weight decay, "adamw" (Loshchilov & Hutter 2019,
        arXiv:1711.05101), "lion" (Chen et al. 2023, arXiv:2302.06675) or "muon" (see
        `scale_by_muon`).
      momentum: only for "sgd".
      nesterov: only for "sgd".
      b1: for "adamw", "lion", and the parameters that "muon" leaves to Adam.
      b2: likewise.
      clip_norm: the largest L2 norm of a gradient, before everything else; 0 does not clip.
      clip: "global" clips the norm of all parameters, "layer" that of each layer on its own.
      state_dtype: of moments: "float32", or "bfloat16" or "float8" for a half or a quarter of the
        memory (see `rounded`).
      param_dtype: of kernels and embeddings: float32, or bfloat16 with stochastic rounding.
      stacked: the groups of parameters whose leaves have a leading axis of layers; None for an
        optimizer of the tree of a single layer.
      rules: how the parameters are split over a mesh; only "muon" needs them.
    """
    decay: dict[str, Any] = {"weight_decay": weight_decay, "mask": is_kernel}
    if name == "sgd":
        optimizer = optax.chain(
            # In front of the momentum: an L2 penalty is part of the gradient.
            optax.add_decayed_weights(**decay),
            optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
        )
    elif name == "adamw":
        optimizer = optax.adamw(schedule, b1=b1, b2=b2, **decay)
    elif name == "lion":
        optimizer = optax.lion(schedule, b1=b1, b2=b2, **decay)
    elif name == "muon":
        optimizer = optax.chain(
            scale_by_muon(b1=b1, b2=b2, stacked=stacked, rules=rules),
            # After the direction is known: decoupled from the gradient.
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        raise ValueError(f"got name={name!r}, expected one of sgd, adamw, lion, muon")
    return completed(
        optimizer,
        clip_norm=clip_norm,
        clip=clip,
        state_dtype=state_dtype,
        param_dtype=param_dtype,
        stacked=stacked,
    )


def completed(
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float,
    clip: str,
    state_dtype: str,
    param_dtype: Any,
    stacked: Collection[str] | None,
) -> optax.GradientTransformation:
    """Adds clipping and narrow moments to any optimizer. Arguments: see `make_optimizer`."""
    if clip not in ("global", "layer") or clip_norm < 0:
        raise ValueError(
            f"got clip={clip!r}, clip_norm={clip_norm}, expected global or layer, >= 0"
        )
    if state_dtype not in MOMENTS:
        raise ValueError(f"got state_dtype={state_dtype!r}, expected one of {', '.join(MOMENTS)}")
    optimizer = _promoting(optimizer)
    # From the outside in: `rounded` widens to float32, then gradients are clipped, then used.
    if clip_norm and clip == "layer" and stacked is not None:
        optimizer = optax.chain(clip_by_layer_norm(clip_norm, stacked), optimizer)
    elif clip_norm:
        # Also "layer" without `stacked`: the tree is then that of one layer, and so is its norm.
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    if state_dtype == "float32" and param_dtype == jnp.float32:
        return optimizer
    return rounded(optimizer, moments=state_dtype)


def _promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets an optimizer mix dtypes, as adamw of optax does, under strict dtype promotion too."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def clip_by_layer_norm(max_norm: float, stacked: Collection[str]) -> optax.GradientTransformation:
    """Clips the gradient of each layer, and of each group without layers, to a norm of `max_norm`.

    Gradients are a dictionary of groups. stacked: see `make_optimizer`.
    """
    clip = optax.clip_by_global_norm(max_norm)

    def update(updates, state, params=None):
        one = lambda tree: clip.update(tree, clip.init(tree))[0]
        clipped = {
            # A group that is frozen as a whole has no arrays to map over.
            name: jax.vmap(one)(tree) if name in stacked and jax.tree.leaves(tree) else one(tree)
            for name, tree in updates.items()
        }
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def is_kernel(params: Any) -> Any:
    """A tree of bools that says which leaves are kernels, by name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True).endswith("kernel"), params
    )
