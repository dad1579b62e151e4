"""A run without running: what a config resolves to, checked by abstract evaluation."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import flatten
from revnet_jax.models import num_params
from revnet_jax.training.build import build_recipe
from revnet_jax.training.step import init_state, make_train_step


def dry_run(config: ConfigDict) -> dict[str, Any]:
    """Resolves a config and evaluates initialisation and one step abstractly: no data, no compiler.

    Returns the settings by dotted key and the number of trainable parameters.
    """
    task, schedule, optimizer = build_recipe(config)
    state = jax.eval_shape(lambda: init_state(task.network, optimizer, config.seed))
    batch = task.batch_shapes(config.batch_size)
    jax.eval_shape(make_train_step(task, optimizer, schedule), state, batch)
    return {"config": flatten(config), "num_params": num_params(state.variables)}
