"""Optimizers and learning rate schedules, from optax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def make_schedule(
    *,
    name: str,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    boundaries: Sequence[int],
    factor: float,
) -> optax.Schedule:
    """The learning rate as a function of the step.

    name: "constant"; "cosine" (from the peak to 0 at `num_steps`); or "piecewise" (multiplied by
      `factor` at each of `boundaries`, in steps).
    warmup_steps: linear, from 0 to the peak `learning_rate`; counted within the schedule's steps.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(f"got warmup_steps={warmup_steps}, expected 0 to num_steps - 1")
    if name == "constant":
        schedule = optax.constant_schedule(learning_rate)
    elif name == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, num_steps - warmup_steps)
        schedule = lambda step: decay(step - warmup_steps)
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
        raise ValueError(f"got name={name!r}, expected one of piecewise, cosine, constant")
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
) -> optax.GradientTransformation:
    """ "sgd" with momentum, where weight decay is an L2 penalty in the gradient, as in the ResNet
    papers; or "adamw", where it is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Only leaves named "kernel" (convolutions and dense layers) decay; biases and normalisations do
    not.
    """
    if name == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=is_kernel),
            optax.sgd(schedule, momentum=momentum, nesterov=nesterov),
        )
    if name == "adamw":
        return optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=is_kernel)
    raise ValueError(f"got name={name!r}, expected one of sgd, adamw")


def is_kernel(params: Any) -> Any:
    """A tree of bools: which leaves are named "kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params
    )
