"""The exponential moving average (EMA) of a run's variables, for evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from revnet_jax.models import Variables
from revnet_jax.optimizers.rounding import widened


def first_average(variables: Variables) -> Variables:
    """The average before the first step: the variables themselves, with bfloat16 in float32.

    The arrays are copies, because both they and the variables are donated to the next step.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), widened(variables))


def next_average(
    average: Variables, variables: Variables, step: jax.Array, decay: float
) -> Variables:
    """Returns d * average + (1 - d) * variables, where d = min(decay, (1 + step) / (10 + step)).

    The smaller d of early steps keeps the random initial weights from staying in the average for
    about 1 / (1 - decay) steps. TensorFlow's ExponentialMovingAverage does the same.

    Running averages of batch statistics are averaged like parameters, as in TensorFlow's
    EfficientNet and in timm. They then belong to weights of the same age as the averaged ones.

    Args:
      average: in float32.
      variables: after the step.
      step: number of steps before this one, int32.
      decay: the largest d, less than 1.
    """
    made = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1 + made) / (10 + made))
    moved: Any = optax.incremental_update(widened(variables), average, 1 - decay_now)
    return moved
