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
from revnet_jax.runs.checkpoint import Checkpoints, Conversion
from revnet_jax.runs.manifest import Difference, Kind, OtherTree, by_path
from revnet_jax.runs.workdir import load_record
from revnet_jax.training.compiler import initialized, jit_initialization
from revnet_jax.training.inputs import Data
from revnet_jax.training.program import StepProgram
from revnet_jax.training.step import TrainState

# Paths of what a model gets to be fine-tuned: low-rank matrices, adapters, the progress of its
# integrator.
ADAPTER = re.compile(r"/(lora|adapter)_[ab]\b|stats/batches\b")
FLOATS = re.compile(r"b?float\d+")
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
            found = vocabulary_from(data["vocabulary"])
            expected = vocabulary_from(there, workdir / "config.json")
            found.check_same_ids(expected, f"the run in {workdir}")
    directory = workdir / "checkpoints"
    with Checkpoints(directory, best_metric=None, best_mode="max", read_only=True) as checkpoints:
        try:
            restored = _restored(checkpoints, wanted)
        except OtherTree as error:
            raise ConfigError(_refusal(workdir, error.differences)) from error
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
        floats, missing, others = _sorted_out(error.differences)
        if others:
            raise
    leaves = by_path(wanted)
    # None takes the place of a leaf that is missing.
    there = [None if path in missing else leaf for path, leaf in leaves.items()]
    return checkpoints.restore(
        jax.tree.unflatten(jax.tree.structure(wanted), there),
        partial=True,
        converted={path: _quantizing(path, dtype, leaves) for path, dtype in floats.items()},
    )


def _sorted_out(
    differences: list[Difference],
) -> tuple[dict[str, str], set[str], list[Difference]]:
    """(dtypes of kernels to quantise by path, paths of missing adapters, all other differences)."""
    floats = {d.path: d.got.dtype for d in differences if d.got and _is_quantizable(d)}
    missing = {d.path for d in differences if d.got is None and ADAPTER.search(d.path)}
    explained = missing.union(floats, (path + SCALE for path in floats))
    return floats, missing, [each for each in differences if each.path not in explained]


def _refusal(workdir: Path, differences: list[Difference]) -> str:
    """Says why the weights in `workdir` cannot be those of the model."""
    _, _, others = _sorted_out(differences)
    # In each, the dtype of the run there and of the model; None where more than that differs.
    dtypes = {
        (got.dtype, expected.dtype) if got and expected and got.shape == expected.shape else None
        for _, got, expected in others
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype and all(map(FLOATS.fullmatch, dtype)):
        return (
            f"config.model.param_dtype: got {dtype[1]}, expected {dtype[0]}, the dtype of the "
            f"weights in {workdir}"
        )
    lines = "; ".join(str(each).removeprefix("variables/") for each in others[:3])
    return (
        f"config.init_from: {workdir} holds the weights of another model: {len(others)} arrays "
        f"differ, such as {lines}. Take the config.model and config.data of its config.json"
    )


def _is_quantizable(difference: Difference) -> bool:
    """Whether a kernel of floats is where one in 8 bits is wanted."""
    path, got, expected = difference
    is_float = got is not None and FLOATS.fullmatch(got.dtype) is not None
    return path.endswith("/kernel") and is_float and expected == Kind("int8", got.shape)


def _quantizing(path: str, dtype: str, leaves: dict[str, Any]) -> Conversion:
    """The conversion of a stacked kernel of floats to numbers in 8 bits and their scales.

    leaves: those that are wanted, by path.
    """
    names = path, path + SCALE
    numbers, scale = (leaves[name] for name in names)
    quantize = jax.vmap(quantized)
    return Conversion(
        jax.ShapeDtypeStruct(numbers.shape, dtype, sharding=numbers.sharding),
        jit_initialization(
            lambda kernel: dict(zip(names, quantize(kernel), strict=True)),
            dict(zip(names, (numbers.sharding, scale.sharding), strict=True)),
        ),
    )
