"""The training step of a config as a program to be compiled, for devices that need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.models import Network
from revnet_jax.training.build import build_recipe
from revnet_jax.training.compiler import jit
from revnet_jax.training.sharding import abstract, replicated
from revnet_jax.training.step import Batch, TrainState, init_state, make_train_step


class StepProgram(NamedTuple):
    """`step(state, batch)` as it trains, and the shapes and placement of what it takes.

    step: jitted, its state donated: `step.lower(state, batch).compile()`.
    """

    network: Network
    step: Any
    state: TrainState
    batch: Batch


def step_program(config: ConfigDict, devices: Sequence[jax.Device]) -> StepProgram:
    """The real step of `config`: state on every device, batches split over all of them.

    devices: of one kind; those of a topology (`jax.experimental.topologies`) will do.

    Nothing is computed. Raises ConfigError for settings that cannot be used.
    """
    network, schedule, optimizer = build_recipe(config)
    if config.batch_size % len(devices):
        raise ConfigError(
            f"config.batch_size: got {config.batch_size} for {len(devices)} devices, expected a "
            f"multiple of {len(devices)}, so that each gets an equal part"
        )
    mesh = Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = make_train_step(
        network,
        optimizer,
        schedule,
        label_smoothing=config.label_smoothing,
        microbatches=config.microbatches,
    )
    # What `jit` asks of the compiler on CPU, other compilers do not know.
    compiled_by = jit if devices[0].platform == "cpu" else jax.jit
    split = NamedSharding(mesh, PartitionSpec("data"))
    images = (config.batch_size, *config.data.image_shape)
    return StepProgram(
        network=network,
        step=compiled_by(step, donate_argnums=0),
        state=abstract(lambda: init_state(network, optimizer, config.seed), replicated(mesh)),
        batch={
            "image": jax.ShapeDtypeStruct(images, jnp.float32, sharding=split),
            "label": jax.ShapeDtypeStruct(images[:1], jnp.int32, sharding=split),
        },
    )
