"""Import: from the files of a published model to a folder like that of a run."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.data.vocabulary import Vocabulary, largest_id, load_tokenizer
from revnet_jax.errors import writing
from revnet_jax.families import build_task
from revnet_jax.models import Variables, num_params
from revnet_jax.models.task import Classification, NextToken, Task
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.families import FAMILIES
from revnet_jax.pretrained.files import READ, Weights, WeightsError, first_few, removed_on_error
from revnet_jax.pretrained.layout import NOTHING, PublishedFamily, Tensor
from revnet_jax.pretrained.vit import VIT
from revnet_jax.runs.manifest import by_path
from revnet_jax.runs.workdir import claim, workdir_lock
from revnet_jax.training.loop import open_checkpoints
from revnet_jax.training.step import TrainState

HEAD, EMBED = "lm_head.weight", "embed"  # a file may repeat a tied embedding under this name


def import_weights(
    source: Path,
    workdir: Path,
    *,
    dtype: str = "float32",
    context: int = 0,
    num_classes: int = 0,
) -> dict[str, Any]:
    """Writes config.json and a checkpoint of step 0 to `workdir`, from a published model.

    Args:
      source: the folder with its config.json, safetensors files and perhaps tokenizer.json.
      workdir: a folder that holds no run.
      dtype: "float32" or "bfloat16", of kernels and embeddings, and what branches compute in.
      context: of decoders: `config.data.context`, if the model's own is not shorter; 0: 1024.
      num_classes: of classifiers: if it is not 0 and not their own number, the model gets a new
        head for it, which starts at zero.

    Returns what was imported, for a report. Everything is checked before `workdir` is touched.

    Cost: the memory of the model in `dtype`, and of its largest array (a kernel of all layers, or
    the embedding) once or twice more as 32-bit words, while arrays are summed and written.

    Raises UserError if files are missing, damaged or of an unknown kind of model, if tensors differ
    from what config.json says, or if `workdir` holds a run.
    """
    found = Description(source / "config.json")
    family = published_family(found)
    config, replaced = config_of(
        found, family, dtype=dtype, context=context, num_classes=num_classes
    )
    # The platform chooses the kernel of attention, which has no parameters.
    task = build_task(config, platform="cpu")
    weights = Weights(source)
    names = names_in_files(family.tensors(shape_of(task)), family, weights, replaced)
    is_text = "vocab_size" in config.data
    vocabulary = vocabulary_of(source, config.data.vocab_size) if is_text else None
    # Early, because reading the weights takes long, and once more under the lock, because another
    # process may have begun a run in the meantime.
    _check_holds_no_run(workdir)
    shapes = jax.eval_shape(task.network.init, jax.random.key(0))
    variables = read_variables(weights, names, shapes)
    record = {"pretrained": {"folder": str(source.resolve()), "model_type": family.model_type}}
    record |= {"vocabulary": vocabulary._asdict()} if vocabulary else {}
    with workdir_lock(workdir):
        _check_holds_no_run(workdir)
        written = ("config.json", "tokenizer.json", "checkpoints")
        with removed_on_error(*(workdir / name for name in written)):
            claim(workdir, config, record)
            if vocabulary:
                with writing(workdir / "tokenizer.json"):
                    shutil.copyfile(source / "tokenizer.json", workdir / "tokenizer.json")
            # Array by array, since nothing goes on meanwhile. Orbax wants more than the largest.
            largest = 1 + max(leaf.nbytes for leaf in jax.tree.leaves(variables))
            with open_checkpoints(workdir, task, write_bytes=largest) as checkpoints:
                checkpoints.save(0, TrainState.of_variables(variables))
    return {
        "model_type": family.model_type,
        "num_params": num_params(variables),
        **({"tokenizer": vocabulary is not None} if is_text else {}),
    }


def _check_holds_no_run(workdir):
    for name in ("config.json", "metrics.jsonl", "tokenizer.json", "checkpoints"):
        if (workdir / name).exists():
            raise ConfigError(
                f"{workdir} holds a run already ({name}), expected a new folder: choose another "
                "--workdir"
            )


def published_family(found: Description) -> PublishedFamily:
    """The family that a config.json names. Raises WeightsError for one that is not known."""
    if "architecture" in found.names:  # as timm names its models
        return VIT
    name = found.text("model_type")
    found.only("model_type", *FAMILIES)
    # Quantized tensors are integers or narrow floats whose scales are tensors apart.
    found.only("quantization_config", None)
    return FAMILIES[name]


def config_of(
    found: Description, family: PublishedFamily, *, dtype: str, context: int, num_classes: int
) -> tuple[ConfigDict, str]:
    """(config of a run of a published model, pattern of the tensors that a new head replaces).

    One stream, and every setting as published.
    """
    config, replaced = family.base(), NOTHING
    config.data.update(family.data(found))
    if family.context:
        config.data.context = min(context or 1024, found.whole(family.context))
    elif context:
        raise WeightsError(
            f"got context={context} for a {family.model_type}, expected 0: it has none"
        )
    if "num_classes" in config.data:
        published = config.data.num_classes
        config.data.num_classes = num_classes or published
        if not config.data.num_classes:
            raise WeightsError(
                f"{found.path}: got a model without classes, expected --num_classes, for a head "
                "that starts at zero"
            )
        replaced = family.head if config.data.num_classes != published else NOTHING
    elif num_classes:
        raise WeightsError(
            f"got num_classes={num_classes} for a {family.model_type}, expected 0: it has none"
        )
    config.model.update({**family.fixed, **family.settings(found)})
    # One stream has no inverse: activations are stored or, in less memory, recomputed.
    config.model.update({"reversible": False, "backprop": "remat"})
    config.model.update({"compute_dtype": dtype, "param_dtype": dtype})
    return config, replaced


def shape_of(task: Task) -> Any:
    """The shape of the network of a task of the package."""
    assert isinstance(task, Classification | NextToken)
    return task.network.shape


def names_in_files(
    tensors: Iterable[Tensor],
    family: PublishedFamily,
    weights: Weights,
    replaced: str = NOTHING,
) -> dict[Tensor, str]:
    """The name that each expected tensor has in the files.

    Args:
      tensors: of the model.
      family: of the model.
      weights: the files.
      replaced: a pattern of tensors that are not read, whether they are there or not.

    Raises WeightsError if tensors are missing, unexpected, or of another shape or dtype.
    """
    passed_over = re.compile(f"{family.ignored}|{replaced}")
    tensors = [tensor for tensor in tensors if not re.search(replaced, tensor.name)]
    stored = {n: s for n, s in weights.stored.items() if not passed_over.search(n)}
    # OpenAI's files of GPT-2 have no prefix; those that transformers writes do.
    bare = not any(name.startswith(family.prefix) for name in stored)
    in_file = lambda name: name.removeprefix(family.prefix) if bare else name
    names = {tensor: in_file(tensor.name) for tensor in tensors}
    missing = [name for name in names.values() if name not in stored]
    extra = sorted(stored.keys() - set(names.values()) - {HEAD})
    # The head of a tied model is not read, but has to equal the embedding.
    if HEAD in stored and HEAD not in names.values():
        names |= {t._replace(name=HEAD): HEAD for t in names if t.path == EMBED}
    if missing or extra:
        where = next(iter(weights.stored.values())).file.parent if weights.stored else "the files"
        wrong = [f"no {first_few(missing)}"] if missing else []
        wrong += [f"the unknown {first_few(extra)}"] if extra else []
        raise WeightsError(
            f"{where}: got {' and '.join(wrong)}, expected the tensors of a {family.model_type} "
            "as its config.json describes it"
        )
    for tensor, name in names.items():
        file, dtype, shape = stored[name]
        if shape != tensor.shape:
            raise WeightsError(f"{file}: got {name} of {shape}, expected {tensor.shape}")
        if dtype not in READ:
            raise WeightsError(f"{file}: got {name} in {dtype}, expected {', '.join(READ)}")
    return names


def read_variables(weights: Weights, names: Mapping[Tensor, str], wanted: Variables) -> Variables:
    """Reads the tensors one by one into parameters of the wanted shapes and dtypes.

    Parameters without a tensor, those of a new head, are zero.
    """
    leaves = {}
    for path, spec in by_path(wanted.params).items():
        leaf = _empty(spec.shape, spec.dtype)
        parts = {tensor: name for tensor, name in names.items() if tensor.path == path}
        if not parts:  # its memory is as it was found
            leaf[...] = 0
        for tensor, name in parts.items():
            view, read = tensor.view(leaf), weights.read(name)
            # The embedding itself has been read: `names` has this head last.
            if tensor.name == HEAD and path == EMBED:
                if not np.array_equal(view, read.astype(leaf.dtype)):
                    raise WeightsError(
                        f"{weights.stored[name].file}: got {HEAD} that differs from the embedding, "
                        "expected the same, since config.json ties them"
                    )
                continue
            # Assignment casts to the dtype of the parameter.
            view[...] = read.reshape(view.shape)
        # On a CPU without a copy, see `_empty`.
        leaves[path] = jax.device_put(leaf)
    # `by_path` has the order of the tree.
    params = jax.tree.unflatten(jax.tree.structure(wanted.params), leaves.values())
    return Variables(params, {})


def _empty(shape, dtype):
    """An array whose memory JAX can take over on CPU without a copy: at a multiple of 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def vocabulary_of(source: Path, vocab_size: int) -> Vocabulary | None:
    """The vocabulary of tokenizer.json; None if the folder has none.

    Its size is that of the tokenizer; the embedding may have rows beyond it.

    Raises UserError if the file is damaged, or has ids that the embedding has no row for.
    """
    path = source / "tokenizer.json"
    if not path.exists():
        return None
    tokenizer, sha256 = load_tokenizer(path)
    size = largest_id(tokenizer) + 1
    if size > vocab_size:
        raise WeightsError(
            f"{path}: got a tokenizer of {size} ids, expected at most {vocab_size}, the vocab_size "
            "of config.json: take the tokenizer of this model, or remove it"
        )
    return Vocabulary("tokenizer", size, tokenizer_sha256=sha256)
