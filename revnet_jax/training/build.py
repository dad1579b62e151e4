"""From a config to the objects of a run. Below this file no function sees the config."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, settings
from revnet_jax.core import Grid
from revnet_jax.data import Dataset, load_dataset
from revnet_jax.models import Architecture, Network
from revnet_jax.training.lockstep import LockstepOptimizer, check_layerwise
from revnet_jax.training.optimizer import make_optimizer, make_schedule
from revnet_jax.training.step import Optimizer

COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Recipe(NamedTuple):
    """What is trained, and how: everything of a run that needs no data."""

    network: Network
    schedule: optax.Schedule
    optimizer: Optimizer


def build_recipe(config: ConfigDict) -> Recipe:
    """Raises ConfigError for settings that cannot be used; nothing is compiled."""
    for name in ("num_steps", "batch_size", "eval_batch_size", "microbatches", "log_every_steps"):
        _at_least_one(name, config[name])
    _at_least_one("eval_every_steps", config.eval_every_steps)
    _at_least_one("checkpoint_every_steps", config.checkpoint_every_steps)
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            f"config.label_smoothing: got {config.label_smoothing}, expected a share in [0, 1)"
        )
    with settings("schedule"):
        schedule = make_schedule(num_steps=config.num_steps, **config.schedule)
    network = build_network(config)
    with settings("optimizer"):
        optimizer = build_optimizer(config, network, schedule)
    return Recipe(network, schedule, optimizer)


def build_optimizer(config: ConfigDict, network: Network, schedule: optax.Schedule) -> Optimizer:
    options = dict(config.optimizer)
    lockstep = options.pop("lockstep")
    make = functools.partial(make_optimizer, schedule, **options)
    ordinary = make(stacked=network.stacked)
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"config.microbatches: got {config.microbatches}, expected a divisor of the batch size "
            f"{config.batch_size}"
        )
    if not lockstep:
        return ordinary
    if not network.stacked:
        raise ConfigError(
            "config.optimizer.lockstep: got True for a network without chains, expected False: "
            "each unit changes width or resolution, so there is no sweep to update it in"
        )
    if config.microbatches > 1:
        raise ConfigError(
            f"config.microbatches: got {config.microbatches} and optimizer.lockstep, expected one: "
            "gradients of parts are added up before an update, and lockstep keeps none. Take "
            "lockstep=False, or the whole batch at once: model.backprop=reverse makes room"
        )
    params = jax.eval_shape(network.init, jax.random.key(0)).params
    check_layerwise(ordinary, {name: params[name] for name in network.stacked})
    return LockstepOptimizer(make(stacked=()), make(stacked=None), tuple(network.stacked))


def build_network(config: ConfigDict, stored_layers: int | None = None) -> Network:
    """stored_layers: in place of the config's; "auto" there is 0 until it is resolved."""
    model = dict(config.model)
    setting = model.pop("stored_layers")
    dtype, grid, bits = (model.pop(name) for name in ("compute_dtype", "grid", "grid_bits"))
    backprop, check_exactness = model.pop("backprop"), model.pop("check_exactness")
    with settings("model"):
        if dtype not in COMPUTE_DTYPES:
            known = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"got compute_dtype={dtype!r}, expected one of {known}")
        if setting != "auto" and not setting.isdecimal():
            raise ValueError(f"got stored_layers={setting!r}, expected a whole number or auto")
        if stored_layers is None:
            stored_layers = 0 if setting == "auto" else int(setting)
        return Network(
            Architecture(
                image_shape=config.data.image_shape, num_classes=config.data.num_classes, **model
            ),
            backprop=tuple(backprop.split(",")) if "," in backprop else backprop,
            stored_layers=stored_layers,
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
