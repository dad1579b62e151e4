"""From a config to the objects of a run. Below this file no function sees the config."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, settings
from revnet_jax.core import Grid
from revnet_jax.data import Dataset, load_dataset
from revnet_jax.models import Architecture, Network
from revnet_jax.training.optimizer import make_optimizer, make_schedule

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Recipe(NamedTuple):
    """What is trained, and how: everything of a run that needs no data."""

    network: Network
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


def build_recipe(config: ConfigDict) -> Recipe:
    """Raises ConfigError for settings that cannot be used; nothing is compiled."""
    for name in ("num_steps", "batch_size", "eval_batch_size", "log_every_steps"):
        _at_least_one(name, config[name])
    _at_least_one("eval_every_steps", config.eval_every_steps)
    _at_least_one("checkpoint_every_steps", config.checkpoint_every_steps)
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            f"config.label_smoothing: got {config.label_smoothing}, expected a share in [0, 1)"
        )
    with settings("schedule"):
        schedule = make_schedule(num_steps=config.num_steps, **config.schedule)
    with settings("optimizer"):
        optimizer = make_optimizer(schedule, **config.optimizer)
    return Recipe(build_network(config), schedule, optimizer)


def build_network(config: ConfigDict) -> Network:
    model = dict(config.model)
    dtype, grid, bits = (model.pop(name) for name in ("compute_dtype", "grid", "grid_bits"))
    backprop, check_exactness = model.pop("backprop"), model.pop("check_exactness")
    with settings("model"):
        if dtype not in COMPUTE_DTYPES:
            known = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"got compute_dtype={dtype!r}, expected one of {known}")
        return Network(
            Architecture(
                image_shape=config.data.image_shape, num_classes=config.data.num_classes, **model
            ),
            backprop=backprop,
            compute_dtype=COMPUTE_DTYPES[dtype],
            grid=Grid(bits) if grid else None,
            check_exactness=check_exactness,
        )


def build_dataset(config: ConfigDict) -> Dataset:
    """Loads the data and checks that it is what the config says it is."""
    data = config.data
    with settings("data"):
        dataset = load_dataset(
            data.name,
            dir=data.dir or None,
            image_size=data.image_shape[0],
            verify_images=data.verify_images,
        )
    for name, got, expected in (
        ("image_shape", tuple(data.image_shape), dataset.image_shape),
        ("num_classes", data.num_classes, dataset.num_classes),
    ):
        if got != expected:
            raise ConfigError(f"config.data.{name}: got {got}, expected {expected}, as in the data")
    return dataset


def pipeline_settings(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `train_batches` that are settings."""
    data = config.data
    return {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "crop_padding": data.crop_padding,
        "flip": data.flip,
        "min_crop_area": data.min_crop_area,
        "num_threads": data.num_threads,
        "prefetch": data.prefetch,
    }


def check_batch_sizes(config: ConfigDict) -> None:
    """Raises ConfigError unless all devices get equal parts of every batch."""
    devices = jax.device_count()
    for name in ("batch_size", "eval_batch_size"):
        if config[name] % devices:
            raise ConfigError(
                f"config.{name}: got {config[name]} for {devices} devices, expected a multiple of "
                f"{devices}, so that each gets an equal part"
            )


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"config.{name}: got {value}, expected at least 1")
