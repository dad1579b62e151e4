"""The training step of a config as a program, which can be compiled for absent devices too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.models.task import Task
from revnet_jax.training.build import Recipe, build_recipe, check_split
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.sharding import batch_sharding, make_mesh, on_mesh, shapes_on_mesh
from revnet_jax.training.step import TrainState, init_state, make_train_step


class StepProgram(NamedTuple):
    """The jitted training step, and the shapes and shardings of its arguments.

    Attributes:
      init: `() -> state`, or `(variables) -> state` that starts from given weights; not jitted.
      step: jitted `(state, batch) -> (state, metrics)` with the state donated. To see the compiled
        program: `step.lower(state, batch).compile()`.
      state: shapes and shardings.
      batch: shapes and shardings.
    """

    task: Task
    mesh: Mesh
    init: Callable[..., TrainState]
    step: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def step_program(
    config: ConfigDict, devices: Sequence[jax.Device], stored_layers: int | None = None
) -> StepProgram:
    """Builds the step of `config`, split over a mesh of the devices as the config says.

    Args:
      devices: all of one kind. They may be those of a topology (`jax.experimental.topologies`).
      stored_layers: replaces the setting of the config.

    Nothing is computed. Raises ConfigError for settings that cannot be used.
    """
    (task, schedule, optimizer), mesh = recipe_on(config, devices, stored_layers)
    ema = config.ema_decay > 0
    init = functools.partial(init_state, task.network, optimizer, config.seed, ema=ema)
    step = make_train_step(task, optimizer, schedule, ema_decay=config.ema_decay)
    state = shapes_on_mesh(init, task.network.rules, mesh)
    # By the devices: those of a topology are not of JAX's default platform, whose compiler takes
    # other options.
    options = {"platform": devices[0].platform, "deterministic": config.deterministic}
    step = jit_step(step, mesh, state, functools.partial(exact_jit, **options))
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh))
        for name, leaf in task.batch_shapes(config.batch_size).items()
    }
    return StepProgram(task, mesh, init, step, state, batch)


def recipe_on(
    config: ConfigDict, devices: Sequence[jax.Device], stored_layers: int | None = None
) -> tuple[Recipe, Mesh]:
    """Returns what is trained, and the mesh it is split over. Arguments: see `step_program`.

    The step is not traced. Raises ConfigError for settings that cannot be used.
    """
    platform = devices[0].platform
    # A user's own model need not have this setting.
    pools = "stem" in config.model and config.model.stem == "imagenet"
    if config.deterministic and pools and platform in ("gpu", "cuda"):
        raise ConfigError(
            "config.deterministic: got True and model.stem=imagenet on a GPU, expected False: the "
            "gradient of its max-pooling has no deterministic kernel"
        )
    recipe = build_recipe(config, stored_layers, platform=platform)
    mesh = make_mesh(devices, **config.mesh)
    check_split(config, mesh)
    return recipe, mesh


def jit_step(
    step: Callable[..., Any], mesh: Mesh, state: Any, jit: Callable[..., Any]
) -> Callable[..., Any]:
    """Jits a step on a mesh. Its state is donated, and returned with the same shardings.

    Args:
      state: shapes and shardings, from `shapes_on_mesh`. Without fixed output shardings the
        compiler may choose others, and the next step would be compiled again.
    """
    # None leaves the placement of metrics to the compiler.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
