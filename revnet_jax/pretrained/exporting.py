"""Export: from the folder of a run to the files of a published model."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from revnet_jax.errors import writing
from revnet_jax.models.int8 import dequantized
from revnet_jax.models.transformer.linear import merged_kernel
from revnet_jax.pretrained.families import FAMILIES
from revnet_jax.pretrained.files import (
    WRITTEN,
    WeightsError,
    removed_on_error,
    write_json_object,
    write_weights,
)
from revnet_jax.pretrained.importing import shape_of
from revnet_jax.pretrained.layout import PublishedFamily
from revnet_jax.pretrained.vit import VIT
from revnet_jax.runs.manifest import by_path
from revnet_jax.runs.workdir import load_config
from revnet_jax.training.restore import Which, restore_run


def export_weights(
    workdir: Path,
    target: Path,
    *,
    dtype: str = "float32",
    which: Which = "newest",
    shard_bytes: int = 5 * 2**30,
) -> dict[str, Any]:
    """Writes config.json and safetensors files to the folder `target`, from a checkpoint of a run.

    Args:
      workdir: the folder of the run.
      target: a new or empty folder.
      dtype: of the files, "float32" or "bfloat16".
      which: the checkpoint, "newest" or "best".
      shard_bytes: a model with more bytes is split into several files.

    Returns what was exported, for a report. config.json is written last.

    Cost: the memory of the model and of one tensor.

    Raises UserError if the run is not of a model that a published family has, or if `target` holds
    files.
    """
    if dtype not in WRITTEN:
        raise WeightsError(f"got dtype={dtype!r}, expected one of {', '.join(WRITTEN)}")
    # From the config alone, so that a run of no family is refused before weights are restored.
    config = load_config(workdir)
    family = family_for(config)
    description = description_of(config, family, dtype)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WeightsError(f"{target} exists, expected a new or an empty folder")
    run = restore_run(workdir, which)
    shape, leaves = shape_of(run.task), by_path(run.variables.params)
    tensors = {tensor.name: tensor for tensor in family.tensors(shape)}

    def parameter(path: str, layer: int | None) -> np.ndarray:
        """A parameter, of one layer if it has several, with its adapters merged."""
        # Indexed as a JAX array, so that one layer comes to the host and not all of them.
        take = lambda path: np.asarray(leaves[path] if layer is None else leaves[path][layer])
        module, _, name = path.rpartition("/")
        value = take(path)
        if f"{path}_scale" in leaves:
            value = dequantized(value, take(f"{path}_scale"))
        if name != "kernel" or f"{module}/lora_a" not in leaves:
            return value
        adapters = (take(f"{module}/{each}") for each in ("lora_a", "lora_b"))
        # The product is added once, here; in training it is never formed.
        return merged_kernel(value, *adapters, shape.lora.scale)

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        # A view has axes of groups and heads, [G, R, K, D], that are one axis in the file.
        return tensor.part(parameter(tensor.path, tensor.layer)).reshape(tensor.shape)

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with removed_on_error(target):
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        write_weights(target, shapes, read, dtype=dtype, shard_bytes=shard_bytes)
        if (workdir / "tokenizer.json").exists():
            with writing(target / "tokenizer.json"):
                shutil.copyfile(workdir / "tokenizer.json", target / "tokenizer.json")
        # Last, so that a folder that is cut short is not taken for a model.
        write_json_object(target / "config.json", description)
    num_params = sum(math.prod(shape) for shape in shapes.values())
    return {"model_type": family.model_type, "step": run.step, "num_params": num_params}


def description_of(config: ConfigDict, family: PublishedFamily, dtype: str) -> dict[str, Any]:
    """The config.json of a run's model as one of this family."""
    described = family.describe(config.model, config.data)
    if not family.class_name:
        return described
    end = config.data.end_token
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        **described,
        "bos_token_id": None,
        "eos_token_id": end if end >= 0 else None,
        "torch_dtype": dtype,
    }


def family_for(config: ConfigDict) -> PublishedFamily:
    """The family that a run's model belongs to. Raises WeightsError if there is none."""
    model = config.model
    if model.family not in ("decoder", "vit"):
        raise WeightsError(f"got a run of {model.family}, expected one of decoder, vit")
    # Outside of training BDIA is the network of one stream.
    if model.reversible and model.integrator != "bdia":
        raise WeightsError(
            f"config.model.reversible: got True with integrator={model.integrator!r}, expected "
            "False, or the integrator bdia: published models have one stream"
        )
    family = VIT if model.family == "vit" else _decoder_family(model)
    for name, value in family.fixed.items():
        if model[name] != value:
            raise WeightsError(
                f"config.model.{name}: got {model[name]!r}, expected {value!r}: a "
                f"{family.model_type}, which its other settings make it, has no other"
            )
    if family.biases:
        _check_biases(model, family)
    return family


def _decoder_family(model):
    # What only one of the families has. A decoder with none of these is a Llama.
    kinds = {"gpt2": model.learned_positions, "qwen3": model.qk_norm, "qwen2": model.bias == "qkv"}
    return FAMILIES[next((kind for kind, fits in kinds.items() if fits), "llama")]


def _check_biases(model, family):
    if model.bias not in family.biases or (family.model_type == "gpt2" and not _all_heads(model)):
        raise WeightsError(
            f"config.model: got bias={model.bias!r}, heads={model.heads} and "
            f"kv_heads={model.kv_heads}, expected a bias of {' or '.join(family.biases)}, and for "
            "gpt2 as many key-value heads as heads"
        )


def _all_heads(model):
    return model.kv_heads == model.heads
