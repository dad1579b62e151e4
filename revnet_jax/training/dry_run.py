"""A run without running: what a config resolves to, checked by abstract evaluation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from revnet_jax.config import flatten
from revnet_jax.models import num_params
from revnet_jax.training.build import build_recipe
from revnet_jax.training.step import init_state, make_eval_step, make_train_step


def dry_run(config: ConfigDict) -> dict[str, Any]:
    """Resolves a config and evaluates initialisation and one step abstractly: no data, no compiler.

    Returns the settings by dotted key and the number of trainable parameters.
    """
    network, schedule, optimizer = build_recipe(config)
    state = jax.eval_shape(lambda: init_state(network, optimizer, config.seed))
    images = (config.batch_size, *config.data.image_shape)
    batch = {
        "image": jax.ShapeDtypeStruct(images, jnp.float32),
        "label": jax.ShapeDtypeStruct(images[:1], jnp.int32),
        "weight": jax.ShapeDtypeStruct(images[:1], jnp.float32),
    }
    train_step = make_train_step(
        network, optimizer, schedule, label_smoothing=config.label_smoothing
    )
    jax.eval_shape(train_step, state, batch)
    jax.eval_shape(make_eval_step(network), state.variables, batch)
    return {"config": flatten(config), "num_params": num_params(state.variables)}
