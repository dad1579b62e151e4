"""The training step of a config as a program to be compiled, for devices that need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from revnet_jax.training.build import build_recipe, check_split
from revnet_jax.training.compiler import jit
from revnet_jax.training.sharding import batch_sharding, make_mesh, on_mesh, placed
from revnet_jax.training.step import TrainState, init_state, make_train_step
from revnet_jax.training.task import Batch, Model


class StepProgram(NamedTuple):
    """`step(state, batch)` as it trains, and the shapes and placement of what it takes.

    step: jitted, its state donated: `step.lower(state, batch).compile()`.
    """

    network: Model
    step: Any
    state: TrainState
    batch: Batch


def step_program(config: ConfigDict, devices: Sequence[jax.Device]) -> StepProgram:
    """The real step of `config`, split over a mesh of the devices as the config says.

    devices: of one kind; those of a topology (`jax.experimental.topologies`) will do.

    Nothing is computed. Raises ConfigError for settings that cannot be used.
    """
    task, schedule, optimizer = build_recipe(config, platform=devices[0].platform)
    mesh = make_mesh(devices, **config.mesh)
    check_split(config, mesh)
    step = make_train_step(task, optimizer, schedule, microbatches=config.microbatches)
    step = on_mesh(step, mesh)
    # What `jit` asks of the compiler on CPU, other compilers do not know.
    compiled_by = jit if devices[0].platform == "cpu" else jax.jit
    init = lambda: init_state(task.network, optimizer, config.seed)
    return StepProgram(
        network=task.network,
        step=compiled_by(step, donate_argnums=0),
        state=placed(init, task.network.rules, mesh),
        batch={
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
            for name, leaf in task.batch_shapes(config.batch_size).items()
        },
    )
