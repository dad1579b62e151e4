"""The initial state of a new run: random weights, or the weights of another run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.data.vocabulary import vocabulary_from
from revnet_jax.models import Variables
from revnet_jax.models.int8 import quantized
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.runs.manifest import OtherTree, by_path
from revnet_jax.runs.workdir import load_record
from revnet_jax.training.compiler import initialized, jit_initialization
from revnet_jax.training.inputs import Data
from revnet_jax.training.program import StepProgram
from revnet_jax.training.step import TrainState

# Paths of what a model gets to be fine-tuned: low-rank matrices, adapters, the progress of its
# integrator.
ADAPTER = re.compile(r"/(lora|adapter)_[ab]\b|stats/batches\b")
# Lines of `OtherTree` on kernels of floats where kernels in 8 bits are wanted.
FLOATS = re.compile(
    r"(?P<path>.*/kernel): got (?P<dtype>b?float\d+)(?P<shape>\[.*\]), expected int8(?P=shape)"
)
SCALE = "_scale"  # ends the path of their scales


def first_state(
    config: ConfigDict, program: StepProgram, data: Data, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any] | None]:
    """Returns the state before the first step, and a record of the run its weights come from.

    The record is None for random weights. Weights of another run (`config.init_from`) are saved at
    once as a checkpoint of step 0, because that run may have gone on or be deleted when this one is
    resumed. Step count, optimizer state and random numbers start afresh.
    """
    if not config.init_from:
        return initialized(program.init, program.state), None
    source = Path(config.init_from)
    step, variables = load_weights(source, program.state.variables, data.record)
    state = initialized(program.init, program.state, variables)
    checkpoints.save(0, state)
    return state, {"workdir": str(source.resolve()), "step": step}


def load_weights(workdir: Path, wanted: Variables, data: dict[str, Any]) -> tuple[int, Variables]:
    """Returns (step, parameters and running averages) of the last checkpoint in `workdir`.

    Adapters of the model that the run in `workdir` did not have are None. Kernels that the model
    has in 8 bits, and that run as floats, are read one by one and quantised, so that no two of them
    are in memory as floats.

    Args:
      wanted: the shapes, dtypes and shardings to load.
      data: the record of the new run's data, which must have the same vocabulary.

    Raises ConfigError if there is no run or no checkpoint, or if its weights are of another model.
    """
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(
            f"config.init_from: got {workdir}, which holds no checkpoints, expected the --workdir "
            "of a run that has saved some"
        )
    if "vocabulary" in data and (workdir / "config.json").exists():
        # Weights that were imported without a tokenizer have no vocabulary to compare.
        there = load_record(workdir)["data"].get("vocabulary")
        if there is not None:
            found, expected = vocabulary_from(data["vocabulary"]), vocabulary_from(there)
            found.check_same_ids(expected, f"the run in {workdir}")
    directory = workdir / "checkpoints"
    with Checkpoints(directory, best_metric=None, best_mode="max", read_only=True) as checkpoints:
        try:
            restored = _restored(checkpoints, wanted)
        except OtherTree as error:
            names = "; ".join(line.removeprefix("variables/") for line in error.differences[:3])
            raise ConfigError(
                f"config.init_from: {workdir} holds the weights of another model: "
                f"{len(error.differences)} arrays differ, such as {names}. Take the config.model "
                "and config.data of its config.json"
            ) from error
    if restored is None:
        raise ConfigError(
            f"config.init_from: got {workdir}, which holds no checkpoint, expected the --workdir "
            "of a run that has saved some"
        )
    step, state = restored
    return step, state.variables


def _restored(checkpoints, wanted):
    """Restores what is wanted, but for adapters that are missing, and kernels of other dtypes."""
    wanted = TrainState.of_variables(wanted)
    try:
        return checkpoints.restore(wanted, partial=True)
    except OtherTree as error:
        differences = error.differences
        floats = {
            found["path"]: found["dtype"] for found in map(FLOATS.match, differences) if found
        }
        nothing = ": got nothing,"
        missing = {line.partition(nothing)[0] for line in differences if nothing in line}
        scales = {path + SCALE for path in floats}
        is_expected = all(map(ADAPTER.search, missing - scales))
        if not is_expected or len(floats) + len(missing) < len(differences):
            raise
    return _quantizing(checkpoints, wanted, floats, missing)


def _quantizing(checkpoints, wanted, floats, missing):
    """Restores without the `missing` leaves, and quantises kernels as they are read.

    floats: the dtypes in which kernels are saved, by their path.
    """
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    specs = by_path(wanted)

    def saved(path, spec):
        if name(path) in missing:
            return None
        dtype = floats.get(name(path), spec.dtype)
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=spec.sharding)

    def quantizer(path):
        shardings = specs[path].sharding, specs[path + SCALE].sharding
        return jit_initialization(jax.vmap(quantized), shardings)

    step, state = checkpoints.restore(
        jax.tree_util.tree_map_with_path(saved, wanted),
        partial=True,
        converted={path: quantizer(path) for path in floats},
    )
    leaves = by_path(state)
    for path in floats:
        leaves[path], leaves[path + SCALE] = leaves[f"{path}/0"], leaves[f"{path}/1"]
    return step, jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(name(path)), wanted)
