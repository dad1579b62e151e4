"""A dry run: resolves a config, and checks it by abstract evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from revnet_jax.config import flatten, settings
from revnet_jax.models import num_params
from revnet_jax.runs.tracker import check_tracker
from revnet_jax.training.build import build_recipe, check_split
from revnet_jax.training.inputs import check_data_dir
from revnet_jax.training.sharding import AXES, mesh_sizes, on_mesh
from revnet_jax.training.step import init_state, make_train_step
from revnet_jax.training.trace import Trace


def dry_run(
    config: ConfigDict,
    num_devices: int | None = None,
    num_slices: int = 1,
    platform: str | None = None,
) -> dict[str, Any]:
    """Resolves a config, and traces initialisation and one step without data or compiler.

    Args:
      config: the config.
      num_devices: if given, checks the mesh for this number of devices, which need not be there,
        and that the config says where the data are.
      num_slices: number of TPU slices of these devices.
      platform: of these devices, "cpu", "gpu" or "tpu"; by default, that of the devices here.

    Returns:
      The settings by dotted key, and the number of trainable parameters.

    Raises:
      ConfigError: settings that cannot be used.
    """
    task, schedule, optimizer = build_recipe(config, platform=platform)
    if platform not in (None, jax.default_backend()) and "attention" in config.model:
        traced = config.copy_and_resolve_references()
        traced.model.attention = "chunked"  # cuDNN attention needs cuDNN even for tracing
        task, schedule, optimizer = build_recipe(traced)
    check_tracker(config.tracker, imported=False)
    with settings("profile"):
        # The constructor checks the steps to profile. Nothing is traced before `with`.
        Trace(Path(), **config.profile, last_step=config.num_steps)
    step = make_train_step(task, optimizer, schedule, ema_decay=config.ema_decay)
    if num_devices is not None:
        sizes = mesh_sizes(num_devices, slices=num_slices, **config.mesh)
        # Names and sizes of axes without devices: all that tracing asks of a mesh.
        mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        check_split(config, mesh)
        check_data_dir(config)
        step = on_mesh(step, mesh)
    ema = config.ema_decay > 0
    state = jax.eval_shape(lambda: init_state(task.network, optimizer, config.seed, ema=ema))
    jax.eval_shape(step, state, task.batch_shapes(config.batch_size))
    return {"config": flatten(config), "num_params": num_params(state.variables)}
