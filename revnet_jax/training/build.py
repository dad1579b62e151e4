"""Builds the task, the learning-rate schedule and the optimizer of a run from its config."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, experiment, flatten, references, settings
from revnet_jax.config.ranges import check_ranges
from revnet_jax.families import DTYPES, build_task
from revnet_jax.models import Model
from revnet_jax.models.task import Task
from revnet_jax.optimizers.build import completed, make_optimizer, make_schedule
from revnet_jax.optimizers.lockstep import LockstepOptimizer, check_layerwise
from revnet_jax.optimizers.optimizer import Optimizer, OrdinaryOptimizer
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.training.mismatch import ACTIONS
from revnet_jax.training.sharding import batch_parts


class Recipe(NamedTuple):
    """The parts of a run that need no data: task, learning-rate schedule and optimizer."""

    task: Task
    schedule: optax.Schedule
    optimizer: Optimizer


def build_recipe(
    config: ConfigDict, stored_layers: int | None = None, *, platform: str | None = None
) -> Recipe:
    """Builds the task, the schedule and the optimizer of a config. Nothing is compiled.

    Args:
      stored_layers: replaces the setting of the config, where -1 counts as 0.
      platform: of the devices to train on, "cpu", "gpu" or "tpu"; by default, of those here.

    Raises ConfigError for settings that cannot be used.
    """
    check_ranges(config)
    check_on_mismatch(config)
    with settings("schedule"):
        schedule = make_schedule(num_steps=config.num_steps, **config.schedule)
    task = build_task(config, stored_layers, platform=platform)
    with settings("optimizer"):
        optimizer = build_optimizer(config, task.network, schedule)
    return Recipe(task, schedule, optimizer)


def check_on_mismatch(config: ConfigDict) -> None:
    """Raises ConfigError for an unknown action, and for "stop" without the exactness check."""
    if config.on_mismatch not in ACTIONS:
        raise ConfigError(
            f"config.on_mismatch: got {config.on_mismatch!r}, expected one of {', '.join(ACTIONS)}"
        )
    if config.on_mismatch == "stop" and not config.model.check_exactness:
        raise ConfigError(
            "config.on_mismatch: got 'stop' and model.check_exactness=False, expected True: "
            "without the check no mismatch is found"
        )


def build_optimizer(config: ConfigDict, network: Model, schedule: optax.Schedule) -> Optimizer:
    """Builds the optimizer, in lockstep with the backward sweep if the config says so."""
    options = dict(config.optimizer)
    lockstep, trainable = options.pop("lockstep"), Trainable(options.pop("trainable"))
    # Paths and shapes are enough for the checks; nothing is initialised.
    params = jax.eval_shape(network.init, jax.random.key(0)).params
    trainable.check(params)
    options["param_dtype"] = DTYPES[config.model.param_dtype]
    if references.is_reference(config.optimizer.name):
        # The package's clipping and narrow moments work around any optimizer.
        names = ("clip_norm", "clip", "state_dtype", "param_dtype")
        make = functools.partial(
            completed, ones_own(config, schedule), **{name: options[name] for name in names}
        )
    else:
        make = functools.partial(make_optimizer, schedule, rules=network.rules, **options)
    # Made for lockstep too: `check_layerwise` tries what it does with several layers at once.
    ordinary = make(stacked=network.stacked)
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"config.microbatches: got {config.microbatches}, expected a divisor of the batch size "
            f"{config.batch_size}"
        )
    if not lockstep:
        return OrdinaryOptimizer(ordinary, config.microbatches, trainable)
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
    trained, _ = trainable.divide({name: params[name] for name in network.stacked})
    if not jax.tree.leaves(trained):
        raise ConfigError(
            f"config.optimizer.lockstep: got True and trainable={trainable.pattern!r}, which "
            "matches no parameter of a chain, expected False: there is nothing to update in it"
        )
    check_layerwise(ordinary, trained)
    # Outside of chains no leaf has an axis of layers; within, updates see one layer's tree.
    return LockstepOptimizer(
        make(stacked=()), make(stacked=None), tuple(network.stacked), trainable
    )


def ones_own(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Calls the user's function that `config.optimizer.name` names, such as "optax:lamb".

    The function gets `learning_rate` (the schedule), all settings that the package does not define,
    and those of the package (`b1`, `weight_decay`) that its signature names.
    """
    name, known = config.optimizer.name, experiment().optimizer
    # The function has to accept its own settings, so a misspelt one is an error. Those of the
    # package are there in every config, and it takes the ones it names.
    own = {knob: x for knob, x in config.optimizer.items() if knob not in known}
    optional = {knob: x for knob, x in config.optimizer.items() if knob in known and knob != "name"}
    given = {"learning_rate": schedule}
    found = references.call_reference("optimizer.name", name, own, given=given, optional=optional)
    expected = "an optax.GradientTransformation"
    references.check_members("optimizer.name", name, found, ("init", "update"), expected)
    return found


def check_split(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError unless batches, heads and tokens split evenly over the mesh."""
    parts = batch_parts(mesh)
    # Every device gets as many examples as the others, in each microbatch.
    for name, microbatches in (("batch_size", config.microbatches), ("eval_batch_size", 1)):
        if config[name] % (parts * microbatches):
            each = f", each of {microbatches} microbatches" if microbatches > 1 else ""
            unit = parts * microbatches
            raise ConfigError(
                f"config.{name}: got {config[name]}, expected a multiple of {unit}: batches are "
                f"split over {mesh.size} devices into {parts} parts{each}; take "
                f"--config.{name}={-(-config[name] // unit) * unit}"
            )
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    if sequence > 1 and "context" not in config.data:
        raise ConfigError(
            f"config.mesh.sequence: got {sequence} for images, expected 1: it splits texts"
        )
    # Settings that a family does not have count as 0, which is a multiple of everything.
    known = flatten(config)
    experts = known.get("model.experts", 0) > 0
    for name, axes, unit, what in (
        ("data.context", "sequence", sequence, "the tokens of a sequence"),
        # shard_map splits experts, and needs equal parts. In dense layers an axis that does not
        # divide stays whole (`spec_of`).
        ("model.hidden", "tensor", tensor if experts else 1, "hidden units of experts"),
        ("model.kv_heads", "tensor", tensor, "heads"),
        ("model.heads", "tensor", tensor, "heads"),
        # Tokens are exchanged for heads over both axes: see `by_heads`.
        ("model.heads", "sequence times config.mesh.tensor", sequence * tensor, "heads"),
    ):
        if known.get(name, 0) % unit:
            raise ConfigError(
                f"config.{name}: got {known[name]}, expected a multiple of config.mesh.{axes}, "
                f"{unit}: {what} are split over it"
            )
