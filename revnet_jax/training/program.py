"""The training step of a config as a program to be compiled, for devices that need not be there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from revnet_jax.training.build import Recipe, build_recipe, check_split
from revnet_jax.training.compiler import jit
from revnet_jax.training.sharding import batch_sharding, make_mesh, on_mesh, placed
from revnet_jax.training.step import TrainState, init_state, make_train_step
from revnet_jax.training.task import Batch, Task


class StepProgram(NamedTuple):
    """`step(state, batch)` as it trains, and the shapes and placement of what it takes.

    init: `() -> state`, or `(variables) -> state` with these for weights, to be jitted. step:
      jitted, its state donated; to look at what is compiled: `step.lower(state, batch).compile()`.
    """

    task: Task
    mesh: Mesh
    init: Callable[..., TrainState]
    step: Any
    state: TrainState
    batch: Batch


def step_program(
    config: ConfigDict, devices: Sequence[jax.Device], stored_layers: int | None = None
) -> StepProgram:
    """The step of `config`, split over a mesh of the devices as the config says.

    devices: of one kind; those of a topology (`jax.experimental.topologies`) will do.
    stored_layers: in place of the config's.

    Nothing is computed. Raises ConfigError for settings that cannot be used.
    """
    (task, schedule, optimizer), mesh = recipe_on(config, devices, stored_layers)
    init = functools.partial(init_state, task.network, optimizer, config.seed)
    step = make_train_step(task, optimizer, schedule, microbatches=config.microbatches)
    state = placed(init, task.network.rules, mesh)
    # What `jit` asks of the compiler on CPU, other compilers do not know.
    step = jit_step(step, mesh, state, jit if devices[0].platform == "cpu" else jax.jit)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in task.batch_shapes(config.batch_size).items()
    }
    return StepProgram(task, mesh, init, step, state, batch)


def recipe_on(
    config: ConfigDict, devices: Sequence[jax.Device], stored_layers: int | None = None
) -> tuple[Recipe, Mesh]:
    """What is trained, and the mesh of devices that it is split over; arguments: `step_program`.

    The step is not traced. Raises ConfigError for settings that cannot be used.
    """
    recipe = build_recipe(config, stored_layers, platform=devices[0].platform)
    mesh = make_mesh(devices, **config.mesh)
    check_split(config, mesh)
    return recipe, mesh


def jit_step(
    step: Callable[..., Any], mesh: Mesh, state: Any, jit: Callable[..., Any]
) -> Callable[..., Any]:
    """The step on a mesh, jitted: its state is donated, and lies afterwards where it lay before.

    state: shapes and placement, as of `placed`. Left to itself the compiler may place what a step
    returns in another way, and the next step would be compiled anew.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
