"""From a config to the objects of a run. Below this file no function sees the config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten, settings
from revnet_jax.core import Grid
from revnet_jax.data import Dataset, eval_batches, load_dataset, train_batches
from revnet_jax.data.text import Text, eval_windows, load_text, train_windows
from revnet_jax.models import (
    Architecture,
    Decoder,
    LanguageModel,
    Network,
    RevViT,
    VisionTransformer,
)
from revnet_jax.models.attention import kernel_for
from revnet_jax.training.lockstep import LockstepOptimizer, check_layerwise
from revnet_jax.training.mismatch import ACTIONS
from revnet_jax.training.optimizer import make_optimizer, make_schedule
from revnet_jax.training.sharding import batch_parts, local_rows
from revnet_jax.training.step import Optimizer
from revnet_jax.training.task import Classification, Model, NextToken, Task

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# By a setting that no other families have.
FAMILIES = {"patch": ("vit",), "kv_heads": ("decoder",), "units": ("revnet", "resnet", "irevnet")}


class Recipe(NamedTuple):
    """What is trained, and how: everything of a run that needs no data."""

    task: Task
    schedule: optax.Schedule
    optimizer: Optimizer


def build_recipe(
    config: ConfigDict, stored_layers: int | None = None, *, platform: str | None = None
) -> Recipe:
    """Raises ConfigError for settings that cannot be used; nothing is compiled.

    stored_layers: in place of the config's; "auto" there is 0 until it is resolved.
    platform: "cpu", "gpu" or "tpu", of the devices to train on; by default those that are here.
    """
    for name in ("num_steps", "batch_size", "eval_batch_size", "microbatches", "log_every_steps"):
        _at_least_one(name, config[name])
    _at_least_one("eval_every_steps", config.eval_every_steps)
    _at_least_one("checkpoint_every_steps", config.checkpoint_every_steps)
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"config.seed: got {config.seed}, expected 0 to 2**32 - 1")
    check_on_mismatch(config)
    with settings("schedule"):
        schedule = make_schedule(num_steps=config.num_steps, **config.schedule)
    task = build_task(config, stored_layers, platform=platform)
    with settings("optimizer"):
        optimizer = build_optimizer(config, task.network, schedule)
    return Recipe(task, schedule, optimizer)


def check_on_mismatch(config: ConfigDict) -> None:
    """Raises ConfigError for an unknown action, and for "stop" where nothing is checked."""
    if config.on_mismatch not in ACTIONS:
        raise ConfigError(
            f"config.on_mismatch: got {config.on_mismatch!r}, expected one of {', '.join(ACTIONS)}"
        )
    if config.on_mismatch == "stop" and not config.model.check_exactness:
        raise ConfigError(
            "config.on_mismatch: got 'stop' and model.check_exactness=False, expected True: "
            "without the check no mismatch is found"
        )


def build_task(
    config: ConfigDict, stored_layers: int | None = None, *, platform: str | None = None
) -> Task:
    """The model of a config, and what it is to learn. Arguments: see `build_recipe`."""
    platform = platform or jax.default_backend()
    (known,) = (names for setting, names in FAMILIES.items() if setting in config.model)
    if config.model.family not in known:
        raise ConfigError(
            f"config.model.family: got {config.model.family!r}, expected one of "
            f"{', '.join(known)}: others have other settings, take a config of theirs"
        )
    if config.model.family == "decoder":
        model = build_language_model(config, stored_layers, platform)
        return NextToken(model, config.data.context, config.balance)
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            f"config.label_smoothing: got {config.label_smoothing}, expected a share in [0, 1)"
        )
    if config.mixup < 0:
        raise ConfigError(f"config.mixup: got {config.mixup}, expected 0 or more")
    if config.model.family == "vit":
        network = build_vision_transformer(config, stored_layers, platform)
    else:
        network = build_network(config, stored_layers)
    return Classification(network, config.label_smoothing, config.mixup)


def build_optimizer(config: ConfigDict, network: Model, schedule: optax.Schedule) -> Optimizer:
    options = dict(config.optimizer)
    lockstep = options.pop("lockstep")
    options |= {"param_dtype": DTYPES[config.model.param_dtype], "rules": network.rules}
    make = functools.partial(make_optimizer, schedule, **options)
    ordinary = make(stacked=network.stacked)
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"config.microbatches: got {config.microbatches}, expected a divisor of the batch size "
            f"{config.batch_size}"
        )
    if not lockstep:
        return ordinary
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
    params = jax.eval_shape(network.init, jax.random.key(0)).params
    check_layerwise(ordinary, {name: params[name] for name in network.stacked})
    return LockstepOptimizer(make(stacked=()), make(stacked=None), tuple(network.stacked))


def build_network(config: ConfigDict, stored_layers: int | None = None) -> Network:
    """The convolutional network of an image config."""
    model = dict(config.model)
    gradient, common = _pop_common(model, stored_layers)
    with settings("model"):
        return Network(
            Architecture(
                image_shape=config.data.image_shape, num_classes=config.data.num_classes, **model
            ),
            **gradient,
            **common,
        )


def _pop_common(model: dict[str, Any], stored_layers: int | None) -> tuple[Any, Any]:
    """Takes what all models have out of their settings: (backprop and what it stores, the rest)."""
    setting, backprop = model.pop("stored_layers"), model.pop("backprop")
    grid, bits = model.pop("grid"), model.pop("grid_bits")
    dtypes = {name: model.pop(name) for name in ("compute_dtype", "param_dtype")}
    check_exactness = model.pop("check_exactness")
    with settings("model"):
        for name, dtype in dtypes.items():
            if dtype not in DTYPES:
                raise ValueError(f"got {name}={dtype!r}, expected one of {', '.join(DTYPES)}")
        if model["unroll"] < 1:
            raise ValueError(f"got unroll={model['unroll']}, expected 1 layer or more")
        if setting != "auto" and not setting.isdecimal():
            raise ValueError(f"got stored_layers={setting!r}, expected a whole number or auto")
        common = {
            **{name: DTYPES[dtype] for name, dtype in dtypes.items()},
            "grid": Grid(bits) if grid else None,
            "check_exactness": check_exactness,
        }
    if stored_layers is None:
        stored_layers = 0 if setting == "auto" else int(setting)
    gradient = {
        "backprop": tuple(backprop.split(",")) if "," in backprop else backprop,
        "stored_layers": stored_layers,
        "unroll": model.pop("unroll"),
    }
    return gradient, common


def build_vision_transformer(
    config: ConfigDict, stored_layers: int | None, platform: str
) -> RevViT:
    """platform: "cpu", "gpu" or "tpu", which attention=auto looks at."""
    model = dict(config.model)
    gradient, common = _pop_common(model, stored_layers)
    attention = _kernel(model.pop("attention"), platform)
    del model["family"]
    shapes = {"image_shape": config.data.image_shape, "num_classes": config.data.num_classes}
    with settings("model"):
        architecture = VisionTransformer(**shapes, **model)
        return RevViT(architecture, **gradient, **common, attention=attention)


def build_language_model(
    config: ConfigDict, stored_layers: int | None, platform: str
) -> LanguageModel:
    """platform: "cpu", "gpu" or "tpu", which attention=auto looks at."""
    model = dict(config.model)
    gradient, common = _pop_common(model, stored_layers)
    attention = _kernel(model.pop("attention"), platform)
    chunks = {name: model.pop(name) for name in ("feed_forward_chunks", "loss_chunk")}
    sizes = {"vocab_size": config.data.vocab_size, "end_token": _end_token(config)}
    del model["family"], model["separate_documents"]
    with settings("model"):
        architecture = Decoder(**sizes, **model)
        _check_divides(chunks["feed_forward_chunks"], config.data.context)
        return LanguageModel(architecture, **gradient, **common, **chunks, attention=attention)


def _end_token(config):
    """Of documents that are to be kept separate; else None."""
    end, size = config.data.end_token, config.data.vocab_size
    if not config.model.separate_documents:
        return None
    if not 0 <= end < size:
        raise ConfigError(
            f"config.data.end_token: got {end} and model.separate_documents, expected the id of "
            f"the token that ends documents, 0 to {size - 1}; tokens.json has that of shards"
        )
    return end


def _check_divides(chunks, context):
    if chunks < 1 or context % chunks:
        raise ValueError(
            f"got feed_forward_chunks={chunks}, expected a divisor of data.context={context}"
        )


def _kernel(name, platform):
    own = kernel_for(platform)
    if name not in ("auto", "chunked", own):
        raise ConfigError(
            f"config.model.attention: got {name!r} on {platform}, expected auto, or one of "
            f"{', '.join(sorted({'chunked', own}))}"
        )
    return own if name == "auto" else name


class Data(NamedTuple):
    """What a run reads. train: `(start_step) -> batches` without an end; test: `() -> batches`.

    Both are iterators to be closed, of this process's rows of each batch.
    """

    train: Callable[[int], Any]
    test: Callable[[], Any]
    record: dict[str, Any]


def build_data(config: ConfigDict, mesh: Mesh, eval_batch_size: int | None = None) -> Data:
    """Loads the data, checks that they are what the config says, and says how they are read.

    mesh: this process reads the rows of each batch that its devices there hold. eval_batch_size: in
    place of the config's, for the same examples.
    """
    data = config.data
    eval_batch_size = eval_batch_size or config.eval_batch_size

    def batches_of(size: int) -> dict[str, Any]:
        reading = {"num_threads": data.num_threads, "prefetch": data.prefetch}
        return {"batch_size": size, "rows": local_rows(mesh, size), **reading}

    if config.model.family == "decoder":
        if data.eval_batches < 0:
            raise ConfigError(
                f"config.data.eval_batches: got {data.eval_batches}, expected 0 (all) or more"
            )
        text = build_text(config)
        return Data(
            lambda step: train_windows(
                text,
                context=data.context,
                seed=config.seed,
                start_step=step,
                **batches_of(config.batch_size),
            ),
            lambda: eval_windows(
                text,
                context=data.context,
                max_windows=data.eval_batches * config.eval_batch_size,
                **batches_of(eval_batch_size),
            ),
            {
                "sha256": text.sha256,
                "bytes_per_token": text.bytes_per_token,
                "vocabulary": text.vocabulary._asdict(),
            },
        )
    dataset = build_dataset(config)
    return Data(
        lambda step: train_batches(
            dataset,
            seed=config.seed,
            start_step=step,
            crop_padding=data.crop_padding,
            flip=data.flip,
            min_crop_area=data.min_crop_area,
            **batches_of(config.batch_size),
        ),
        lambda: eval_batches(dataset, **batches_of(eval_batch_size)),
        {},
    )


def build_text(config: ConfigDict) -> Text:
    """Loads the text and checks that it is what the config says it is."""
    data = config.data
    with settings("data"):
        text = load_text(data.name, path=data.dir, train_share=data.train_share)
    size = text.vocabulary.size
    if data.vocab_size != size:
        raise ConfigError(
            f"config.data.vocab_size: got {data.vocab_size}, expected {size}, as in the data"
        )
    if config.model.separate_documents and text.vocabulary.kind == "tokenizer":
        _check_end_token(data.end_token, text.vocabulary.end_token)
    return text


def _check_end_token(got, recorded):
    if recorded is None:
        raise ConfigError(
            "config.model.separate_documents: got True for shards whose tokens.json names no "
            "end_token, expected False, or shards that tokenize_text.py wrote with --end_token"
        )
    if got != recorded:
        raise ConfigError(f"config.data.end_token: got {got}, expected {recorded}, as in the data")


def build_dataset(config: ConfigDict) -> Dataset:
    """Loads the data and checks that it is what the config says it is."""
    data = config.data
    with settings("data"):
        dataset = load_dataset(
            data.name,
            dir=data.dir or None,
            image_size=data.image_shape[0],
            verify_images=data.verify_images,
        )
    for name, got, expected in (
        ("image_shape", tuple(data.image_shape), dataset.image_shape),
        ("num_classes", data.num_classes, dataset.num_classes),
    ):
        if got != expected:
            raise ConfigError(f"config.data.{name}: got {got}, expected {expected}, as in the data")
    return dataset


def check_split(config: ConfigDict, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError unless batches and heads can be split over the mesh in equal parts."""
    parts = batch_parts(mesh)
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
    known = flatten(config)
    experts = known.get("model.experts", 0) > 0
    for name, axes, unit, what in (
        ("data.context", "sequence", sequence, "the tokens of a sequence"),
        ("model.hidden", "tensor", tensor if experts else 1, "hidden units of experts"),
        ("model.kv_heads", "tensor", tensor, "heads"),
        ("model.heads", "tensor", tensor, "heads"),
        ("model.heads", "sequence times config.mesh.tensor", sequence * tensor, "heads"),
    ):
        if known.get(name, 0) % unit:
            raise ConfigError(
                f"config.{name}: got {known[name]}, expected a multiple of config.mesh.{axes}, "
                f"{unit}: {what} are split over it"
            )


def check_data_dir(config: ConfigDict) -> None:
    """Raises ConfigError for data that are somewhere, but the config does not say where."""
    name = config.data.name
    if not config.data.dir and name not in ("digits", "bytes"):
        raise ConfigError(f"config.data.dir: got none for {name}, expected where its files will be")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"config.{name}: got {value}, expected at least 1")
