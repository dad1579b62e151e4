"""Loads a trained model from the folder of its run, and evaluates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, references
from revnet_jax.data.vocabulary import vocabulary_from
from revnet_jax.errors import tell
from revnet_jax.models import Variables
from revnet_jax.models.task import Task
from revnet_jax.runs import data_record
from revnet_jax.runs.checkpoint import CheckpointError
from revnet_jax.runs.workdir import load_config, load_record
from revnet_jax.training.build import build_recipe
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.distributed import is_first
from revnet_jax.training.ema import first_average
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.inputs import build_data
from revnet_jax.training.loop import open_checkpoints
from revnet_jax.training.sharding import batch_parts, make_mesh, on_mesh, shapes_on_mesh
from revnet_jax.training.step import TrainState

Which = Literal["newest", "best"]


class Restored(NamedTuple):
    """A model loaded from a checkpoint of `step`. data: the run's record of its data."""

    config: ConfigDict
    task: Task
    step: int
    variables: Variables
    data: dict[str, Any]


def restore_run(workdir: Path, which: Which = "newest") -> Restored:
    """Loads the variables in a checkpoint of a run, or their moving average if the run keeps one.

    Changes nothing in the folder of the run.

    Weights are split over all devices that are here now, for any mesh it was trained on.

    Raises UserError if there is no run or no checkpoint.
    """
    config = load_config(workdir)
    if "attention" in config.model:
        config.model.attention = "auto"  # the run may have used other devices
    task, _, optimizer = build_recipe(config)

    # Only leaves of this state are read: no optimizer state, and no weights if all are averaged.
    def init():
        variables = task.network.init(jax.random.key(config.seed))
        if not config.ema_decay:
            return TrainState.of_variables(variables)
        # Frozen parameters have no average.
        kept = variables if optimizer.trainable.pattern else None
        return TrainState.of_variables(kept, first_average(variables, optimizer.trainable))

    if not (workdir / "checkpoints").exists():
        raise CheckpointError(
            f"{workdir} holds no checkpoints: has its run saved any, and were they fetched?"
        )
    with open_checkpoints(workdir, task, read_only=True) as checkpoints:
        # Nothing is initialised; these are the shardings that the arrays are read into.
        state = shapes_on_mesh(init, task.network.rules, all_fsdp())
        restored = checkpoints.restore(state, which=which, partial=True)
    if restored is None:
        raise CheckpointError(f"{workdir / 'checkpoints'} is empty: has its run saved any yet?")
    step, state = restored
    data = load_record(workdir)["data"]
    return Restored(config, task, step, state.for_evaluation, data)


def evaluate_run(
    workdir: Path, which: Which = "newest", data_dir: str | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run as the run itself does; changes nothing in its folder.

    Args:
      data_dir: where the data are now, if not where they were in training. If they differ from what
        the run recorded, a line on stderr says so, and the scores are those of the new data.

    Raises UserError if there is no run or no checkpoint, or if the data are missing or have another
    vocabulary.
    """
    config = load_config(workdir)
    if data_dir is not None:
        name = config.data.name
        # As in `load_data`, which gives `dir` to functions that name it.
        if references.is_reference(name) and "dir" not in references.parameters_taken(
            "data.name", name
        ):
            raise ConfigError(
                f"--data_dir: got {data_dir}, expected none: {name} has no parameter dir"
            )
        config.data.dir = data_dir
    mesh = all_fsdp()
    # Rounded up to multiples of the devices. Test batches are padded, so scores do not change. A
    # training batch is read for its shapes at most.
    parts = batch_parts(mesh)
    multiple = lambda size: -(-size // parts) * parts
    batch_size, config.batch_size = multiple(config.eval_batch_size), multiple(config.batch_size)
    # Before the weights, because missing data should be told at once.
    data = build_data(config, mesh, batch_size)
    run = restore_run(workdir, which)
    if "vocabulary" in run.data:
        found = vocabulary_from(data.record["vocabulary"])
        expected = vocabulary_from(run.data["vocabulary"], workdir / "config.json")
        found.check_same_ids(expected, f"the run in {workdir}")
    if is_first() and not data_record.is_same(data.record, run.data):
        tell(
            f"note: other data than those of the run in {workdir}: this evaluates "
            f"{data_record.summary(data.record)}, the run recorded {data_record.summary(run.data)}"
        )
    task = run.task.of_data(data.record)
    means = evaluate(exact_jit(on_mesh(task.sums, mesh)), run.variables, data.test(), mesh)
    return {"step": run.step, "checkpoint": which, **task.scores(means)}


def all_fsdp() -> Mesh:
    """A mesh of all devices along "fsdp", which works for every model and number of devices."""
    return make_mesh(jax.devices(), data=1, fsdp=-1)
