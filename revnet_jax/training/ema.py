"""The exponential moving average (EMA) of a run's variables, for evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import trees
from revnet_jax.models import Variables
from revnet_jax.optimizers.rounding import widened
from revnet_jax.optimizers.trainable import Trainable


def first_average(variables: Variables, trainable: Trainable) -> Variables:
    """The average before the first step: the variables themselves, with bfloat16 in float32.

    Frozen parameters are not averaged: None is in their place. The arrays are copies, because both
    they and the variables are donated to the next step.
    """
    trained, _ = trainable.divide(variables.params)
    # In bfloat16, with 8 bits, most changes by a share of 1 - d would be rounded away.
    averaged = widened(variables._replace(params=trained))
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), averaged)


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
    # (1 + step) / (10 + step) is 0.1 at the first step (0), 0.9 at step 80 and 0.99 at 890.
    made = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1 + made) / (10 + made))
    # Without frozen parameters and in float32, like the average.
    averaged = widened(trees.like(average, variables))
    # optax takes the share of the new values: step_size * new + (1 - step_size) * old.
    moved: Any = optax.incremental_update(averaged, average, 1 - decay_now)
    return moved
