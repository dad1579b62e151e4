"""Builds the training and test batches of a run from its config."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from revnet_jax.config import (
    ConfigError,
    image_classification,
    language_model,
    references,
    settings,
)
from revnet_jax.data import (
    DATASET_NAMES,
    DataError,
    Dataset,
    eval_batches,
    load_dataset,
    train_batches,
)
from revnet_jax.data.source import Source, iterate_test, iterate_train
from revnet_jax.data.text import TEXT_NAMES, Text, eval_windows, load_text, train_windows
from revnet_jax.families import build_task, family_of
from revnet_jax.models import ConvNet, LanguageModel, Sweep, VisionTransformer
from revnet_jax.runs import data_record
from revnet_jax.training.sharding import local_rows


class Data(NamedTuple):
    """The data of a run.

    Attributes:
      train: `(start_step) -> batches`, endless.
      test: `() -> batches`.
      record: what config.json keeps of the data.

    Batches are iterators of this process's rows of each batch, and have to be closed.
    """

    train: Callable[[int], Any]
    test: Callable[[], Any]
    record: dict[str, Any]


def build_data(config: ConfigDict, mesh: Mesh, eval_batch_size: int | None = None) -> Data:
    """Loads the data, and checks them against the config.

    Args:
      mesh: this process reads the rows of each batch that its devices in the mesh hold.
      eval_batch_size: replaces the setting of the config; the examples stay the same.
    """
    data = config.data
    eval_batch_size = eval_batch_size or config.eval_batch_size

    def batches_of(size: int) -> dict[str, Any]:
        reading = {"num_threads": data.num_threads, "prefetch": data.prefetch}
        return {"batch_size": size, "rows": local_rows(mesh, size), **reading}

    with settings("data"):
        loaded = load_data(config)
    train, test = batches_of(config.batch_size), batches_of(eval_batch_size)
    if isinstance(loaded, Text):
        found = _text(config, loaded, train, test)
    elif isinstance(loaded, Dataset):
        found = _images(config, loaded, train, test)
    else:
        found = _source(config, loaded, train, test)
    # Whether batches of a user's data or for a user's model fit is seen by reading one.
    if any(map(references.is_reference, (data.name, config.model.family))):
        task = build_task(config)
        with settings("data"):
            weighted = isinstance(loaded, Text) and loaded.train_weight is not None
            batches = _check_batches(task, found, train, test, weighted)
        if references.is_reference(config.model.family):
            _check_task(config.model.family, task, *batches)
    return found


def load_data(config: ConfigDict) -> Dataset | Text | Source:
    """Loads the data set of a config. A user's function may return any of the three types.

    It gets all settings of `config.data` that the package does not define, and those of the package
    (such as `dir`) that its signature names.
    """
    data, name = config.data, config.data.name
    if references.is_reference(name):
        known = {knob: x for knob, x in data.items() if knob in PACKAGE_KNOBS and knob != "name"}
        own = {knob: x for knob, x in data.items() if knob not in PACKAGE_KNOBS}
        loaded = references.call_reference("data.name", name, own, given={}, optional=known)
        if not isinstance(loaded, Dataset | Text):
            expected = "a Source, such as Arrays (revnet_jax/data/source.py), a Dataset or a Text"
            references.check_members("data.name", name, loaded, ("train", "test"), expected)
        return loaded
    # A user's own model has no kind of data, so the data set's name decides.
    kind = family_of(config).data or ("text" if name in TEXT_NAMES else "images")
    if kind == "text":
        _check_knobs(config, ("dir", "train_share", "vocab_size", "context", "eval_batches"))
        return load_text(name, path=data.dir, train_share=data.train_share)
    _check_knobs(config, ("dir", "image_shape", "num_classes", "verify_images"))
    image_size, verify_images = data.image_shape[0], data.verify_images
    return load_dataset(
        name, dir=data.dir or None, image_size=image_size, verify_images=verify_images
    )


# The settings of `config.data` that the package defines, for images and for text.
PACKAGE_KNOBS = frozenset({**image_classification().data, **language_model().data})


def _check_knobs(config, names):
    """Raises ConfigError if `config.data`, as in a user's own config, lacks some of `names`."""
    if missing := [name for name in names if name not in config.data]:
        raise ConfigError(
            f"config.data: got no {', '.join(missing)} with {config.data.name}, expected the data "
            "section of image_classification() or language_model() in revnet_jax/config/knobs.py"
        )


def _text(config, text, train, test):
    data, size = config.data, text.vocabulary.size
    _check_knobs(config, ("vocab_size", "context", "eval_batches"))
    # Pretrained models have embeddings with rows beyond the tokenizer's last id.
    is_tokenizer = text.vocabulary.kind == "tokenizer"
    if data.vocab_size < size or (data.vocab_size > size and not is_tokenizer):
        more = " (or more)" if is_tokenizer else ""
        raise ConfigError(
            f"config.data.vocab_size: got {data.vocab_size}, expected {size}{more}, as in the data"
        )
    # A user's own model need not have the setting.
    separate = "separate_documents" in config.model and config.model.separate_documents
    if separate and text.vocabulary.kind == "tokenizer":
        _check_end_token(data.end_token, text.vocabulary.end_token)
    windows = {"seed": config.seed, "context": data.context, **train}
    # In sequences, by the config's batch size: evaluation elsewhere may take larger batches, but
    # scores the same sequences.
    most = data.eval_batches * config.eval_batch_size
    return Data(
        lambda step: train_windows(text, start_step=step, **windows),
        lambda: eval_windows(text, context=data.context, max_windows=most, **test),
        data_record.of_text(text),
    )


def _check_end_token(got, recorded):
    if recorded is None:
        raise ConfigError(
            "config.model.separate_documents: got True for shards whose tokens.json names no "
            "end_token, expected False, or shards that tokenize_text.py wrote with --end_token"
        )
    if got != recorded:
        raise ConfigError(f"config.data.end_token: got {got}, expected {recorded}, as in the data")


def _images(config, dataset, train, test):
    data = config.data
    augmentations = ("crop_padding", "flip", "affine", "min_crop_area")
    _check_knobs(config, ("image_shape", "num_classes", "mean", "std", *augmentations))
    for name, got, expected in (
        ("image_shape", tuple(data.image_shape), dataset.image_shape),
        ("num_classes", data.num_classes, dataset.num_classes),
    ):
        if got != expected:
            raise ConfigError(f"config.data.{name}: got {got}, expected {expected}, as in the data")
    for split, labels in (("train", dataset.train.labels), ("test", dataset.test.labels)):
        low, high = (np.min(labels), np.max(labels)) if len(labels) else (0, 0)
        if low < 0 or high >= dataset.num_classes:
            raise DataError(
                f"{dataset.name}: got label {low if low < 0 else high} in the {split} split, "
                f"expected 0 to {dataset.num_classes - 1}, one for each class"
            )
    if data.mean or data.std:
        with settings("data"):
            dataset = dataset.normalised_by(data.mean, data.std)
    options = {"seed": config.seed, **{name: data[name] for name in augmentations}, **train}
    return Data(
        lambda step: train_batches(dataset, start_step=step, **options),
        lambda: eval_batches(dataset, **test),
        data_record.of_dataset(dataset),
    )


def _source(config, source, train, test):
    data = config.data
    taken = references.parameters_taken("data.name", data.name)
    for name in ("mean", "std"):
        # A function that names them has got them (`load_data`), and normalises its images itself.
        if name in data and data[name] and name not in taken:
            raise ConfigError(
                f"config.data.{name}: got {data[name]} with the Source of {data.name}, expected "
                f"none: its batches are taken as they are, unless the function takes {name}"
            )
    return Data(
        lambda step: iterate_train(source, seed=config.seed, start_step=step, **train),
        lambda: iterate_test(source, **test),
        data_record.of_source(source),
    )


def _check_batches(task, data, train, test, weighted):
    """Returns a training batch and a test batch, of a user's data or for a user's task.

    weighted: whether training batches have a weight, as test batches do.

    Raises ValueError if they have wrong shapes.
    """
    found = []
    for split, batches, of in (("training", data.train(0), train), ("test", data.test(), test)):
        with contextlib.closing(batches):
            batch = next(batches)
        got = {name: f"{x.dtype}{list(x.shape)}" for name, x in batch.items() if name != "weight"}
        expected = {
            name: f"{leaf.dtype}{[len(of['rows']), *leaf.shape[1:]]}"  # rows of this process
            for name, leaf in task.batch_shapes(of["batch_size"]).items()
        }
        has_weight = split == "test" or weighted
        if got != expected or has_weight != ("weight" in batch):
            more = ", and a weight" if has_weight else ""
            raise ValueError(f"got a {split} batch of {got}, expected {expected}{more}")
        for name, size in _numbers_of_ids(task.network).items():
            low, high = np.min(batch[name]), np.max(batch[name])
            if low < 0 or high >= size:
                raise ValueError(
                    f"got {name} {low if low < 0 else high} in a {split} batch, expected 0 to "
                    f"{size - 1}, as the model has {size}"
                )
        found.append(batch)
    return found


def _check_task(name, task, train_batch, test_batch):
    """Raises ConfigError unless a user's `loss` and `sums` return what `Task` says; traces them."""
    key, is_scalar = jax.random.key(0), lambda leaf: getattr(leaf, "shape", None) == ()
    are_scalars = lambda found: isinstance(found, dict) and all(map(is_scalar, found.values()))
    variables = jax.eval_shape(task.network.init, key)
    sums = jax.eval_shape(task.sums, variables, test_batch)
    if not are_scalars(sums) or "count" not in sums:
        raise ConfigError(
            f"config.model.family: got {sums} from sums of {name}, expected a dictionary of "
            "scalars: weighted sums, and the total weight as 'count'"
        )
    loss = functools.partial(task.loss, sweep=Sweep())
    match jax.eval_shape(loss, variables, train_batch, key):
        case loss, (_, means) if is_scalar(loss) and are_scalars(means):
            return
        case found:
            raise ConfigError(
                f"config.model.family: got {found} from loss of {name}, expected (a scalar, (new "
                "running averages, a dictionary of scalars))"
            )


def _numbers_of_ids(network):
    """How many ids each array of a batch may have: JAX clamps others silently to the last one."""
    if isinstance(network, LanguageModel):
        return dict.fromkeys(("token", "target"), network.shape.vocab_size)
    is_of_images = isinstance(network, ConvNet | VisionTransformer)
    return {"label": network.shape.num_classes} if is_of_images else {}


def check_data_dir(config: ConfigDict) -> None:
    """Raises ConfigError if the config does not say where its data files are."""
    name = config.data.name
    if references.is_reference(name):
        return
    if name not in (known := [*DATASET_NAMES, *TEXT_NAMES]):
        raise ConfigError(
            f"config.data.name: got {name!r}, expected one of {', '.join(known)}, or "
            "MODULE:FUNCTION of your own"
        )
    if not config.data.dir and name not in ("digits", "bytes"):
        raise ConfigError(f"config.data.dir: got none for {name}, expected where its files will be")
