"""The settings of experiments, with their defaults.

Imports nothing heavy: a misspelt flag should cost half a second, not the start of JAX.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from ml_collections import ConfigDict

from revnet_jax.errors import UserError


class ConfigError(UserError, ValueError):
    """A setting that cannot be used. The message is one line: got, expected, what to do."""


def _mesh() -> ConfigDict:
    """The mesh: how many devices lie along each axis. -1 stands for all that are left."""
    mesh = ConfigDict()
    mesh.data = -1  # devices that batches are split over; -1: all that are left
    mesh.fsdp = 1  # devices that batches and weights are split over (FSDP)
    mesh.sequence = 1  # text: devices that the tokens of a sequence, and weights, are split over
    mesh.tensor = 1  # devices that heads and hidden units are split over
    return mesh


def _optimizer() -> ConfigDict:
    """The settings of the optimizer."""
    optimizer = ConfigDict()
    optimizer.name = "sgd"  # sgd | adamw | lion | muon, or MODULE:FUNCTION of your own
    optimizer.momentum = 0.9  # of sgd
    optimizer.nesterov = False  # of sgd
    optimizer.b1 = 0.9  # of adamw, lion; of muon for what it leaves to Adam
    optimizer.b2 = 0.999  # as b1
    optimizer.weight_decay = 2e-4  # of kernels only; sgd: L2 penalty, else decoupled
    optimizer.state_dtype = "float32"  # float32 | bfloat16 | float8: of moments
    optimizer.lockstep = False  # update each layer inside the backward sweep, in place
    optimizer.clip_norm = 0.0  # largest norm of a gradient; 0: no clipping
    optimizer.clip = "global"  # global | layer: the norm of all parameters, or of each layer
    optimizer.trainable = ""  # regular expression: train only parameters whose path it matches
    return optimizer


def experiment() -> ConfigDict:
    """The settings that every run has. A model or data of your own adds its own to these."""
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 600
    config.batch_size = 100
    config.eval_batch_size = 200
    config.microbatches = 1  # gradient accumulation: parts that a batch is split into
    config.ema_decay = 0.0  # of the average of the weights (EMA) that evaluation uses; 0: none
    config.memory_limit_gib = 0.0  # per device, for stored_layers=-1; 0: all it has
    config.log_every_steps = 20
    config.eval_every_steps = config.checkpoint_every_steps = 200
    config.init_from = ""  # the workdir of another run: start from its last weights
    config.deterministic = False  # on GPUs: kernels that sum in a fixed order; slower
    config.on_mismatch = "warn"  # warn | stop: if the backward pass disagrees with the forward pass
    config.tracker = ""  # wandb | trackio, or MODULE:FUNCTION of your own; empty: none

    config.mesh = _mesh()
    # Profiling: a trace of some steps in WORKDIR/profile. By default none is made.
    config.profile = ConfigDict({"start_step": 10, "num_steps": 0})

    config.data = ConfigDict()
    config.data.name = ""  # a data set of the package, or MODULE:FUNCTION of your own
    config.data.num_threads = 2
    config.data.prefetch = 4  # batches

    config.model = ConfigDict()
    config.model.family = ""  # a family of the package, or MODULE:FUNCTION of your own
    # One strategy for all chains, or one for each, such as reverse,store,store.
    config.model.backprop = "reverse"  # store | remat_dots | remat | offload | reverse
    config.model.stored_layers = 0  # how many of the last layers are stored; -1: as many as fit
    config.model.unroll = 1  # layers per loop iteration, with store or reverse; all: no loop
    config.model.keep_operands = False  # of products, for the derivative: faster under reverse
    config.model.compute_dtype = "float32"  # float32 | bfloat16
    config.model.param_dtype = "float32"  # float32 | bfloat16: of kernels, embeddings
    config.model.grid = True  # exact streams; False lets them drift
    config.model.grid_bits = 12
    config.model.check_exactness = True  # at every step; keeps each chain's input

    config.optimizer = _optimizer()

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # piecewise | cosine | wsd | constant
    config.schedule.learning_rate = 0.1  # the peak
    config.schedule.warmup_steps = 0  # linear, from 0
    config.schedule.decay_steps = 0  # wsd: last steps, in which the rate falls linearly to 0
    config.schedule.boundaries = (300, 450)  # piecewise: steps at which the rate is multiplied
    config.schedule.factor = 0.1  # piecewise: what it is multiplied by
    return config


def check_experiment(config: ConfigDict) -> None:
    """Raises ConfigError if a config lacks, or has null for, a setting that every run has."""
    given, defaults = flatten(config), flatten(experiment())
    null = [key for key, x in given.items() if x is None and defaults.get(key) is not None]
    if missing := [*(defaults.keys() - given.keys()), *null]:
        raise ConfigError(
            f"config: got no {', '.join(sorted(missing))}, expected what every run has: begin with "
            "revnet_jax.config.experiment() and add to it"
        )


def _images() -> ConfigDict:
    """The settings of a run on images."""
    config = experiment()
    config.label_smoothing = 0.0  # share of the target spread over all classes, in training
    config.mixup = 0.0  # images are mixed in a proportion from Beta(mixup, mixup); 0: off
    config.data.name = "digits"  # digits | cifar10 | cifar100 | image_folder
    config.data.dir = ""  # the folder with the files; digits need none
    config.data.image_shape = (8, 8, 1)  # height, width, channels
    config.data.num_classes = 10
    config.data.crop_padding = 0  # pixels of zeros on each side to crop from
    config.data.flip = False  # mirror left to right with probability 1/2
    config.data.affine = 0.0  # strength of random rotation, scaling, shear and shift; 0: off
    config.data.min_crop_area = 1.0  # of a random resized crop; image_folder only
    config.data.mean = ()  # of pixels from 0 to 1, by channel: 0.5,0.5,0.5; empty: that of the data
    config.data.std = ()  # standard deviation, as mean
    config.data.verify_images = True  # image_folder: decode every file before training
    return config


def image_classification() -> ConfigDict:
    """All settings of a run of a convolutional network."""
    config = _images()
    config.model.family = "revnet"  # revnet | resnet | irevnet
    config.model.units = (2, 2)  # residual units per stage
    config.model.channels = (32, 32, 64)  # of the stem, then of each stage
    config.model.bottleneck = False
    config.model.stem = "cifar"  # cifar | imagenet
    return config


# Layers, width and heads of vision transformers as published (arXiv:2010.11929, 2012.12877).
VIT_SIZES = {
    "Ti": (12, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "H": (32, 1280, 16),
}


def vision_transformer(size: str = "S") -> ConfigDict:
    """All settings of a run of a vision transformer."""
    config = _images()
    model = config.model
    model.family = "vit"
    model.reversible = True  # False: the twin of one stream, for store and remat
    model.layers, model.width, model.heads = VIT_SIZES[size]
    model.hidden = 4 * model.width
    model.patch = 16  # pixels
    model.pool = "token"  # token | mean
    model.gelu = "tanh"  # tanh | erf: the usual approximation, or the exact function
    # To make a pretrained network of one stream reversible: bdia or midpoint.
    model.integrator = "streams"  # streams | bdia | midpoint
    model.dropout = 0.0
    model.attention = "auto"  # chunked | cudnn | flash; auto: by the device
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.05
    config.schedule.learning_rate = 1e-3
    return config


def language_model() -> ConfigDict:
    """All settings of a run of a language model."""
    config = experiment()
    config.balance = 0.01  # weight of the experts' balance loss
    config.data.name = "bytes"  # bytes | characters | shards
    config.data.dir = ""  # the text file, or the folder of shards; bytes need none
    config.data.train_share = 0.9  # share of a text to train on; the rest is the test split
    config.data.vocab_size = 256
    config.data.end_token = -1  # id of the token that ends documents; -1: none
    config.data.context = 128  # tokens of a sequence
    config.data.eval_batches = 0  # batches of an evaluation; 0: the whole test split

    model = config.model
    model.family = "decoder"
    model.reversible = True  # False: the twin of one stream, for store and remat
    model.layers, model.width, model.heads, model.kv_heads = 4, 128, 4, 4
    model.hidden = 344  # of the feed-forward network
    model.tied = False  # the output layer shares its weights with the embedding
    model.dropout = 0.0
    model.experts = 0  # experts per layer (mixture of experts); 0: none
    model.experts_per_token = 2
    model.head_size = 0  # of queries, keys and values; 0: width / heads
    model.norm = "rms"  # rms | layer
    model.norm_eps = 1e-6
    model.qk_norm = False  # normalise the queries and keys of each head
    model.bias = "none"  # none | qkv | attention | all: which linear layers have biases
    model.activation = "swiglu"  # swiglu | gelu
    model.learned_positions = 0  # positions that have a learned embedding; 0: rotary positions
    model.rotary_base = 10_000.0
    # Of Llama 3.1: factor, turns that are scaled, turns that are kept, context before scaling.
    model.rotary_scaling = ()  # such as 8,1,4,8192; empty: none
    # To make a pretrained network of one stream reversible: bdia, midpoint, dual or meft.
    model.integrator = "streams"  # streams | bdia | midpoint | dual | meft
    model.integrator_steps = 1000  # dual: batches, or microbatches, until it is the midpoint rule
    model.adapter_rank = 8  # meft: width inside the adapter of each layer
    model.lora_rank = 0  # low-rank matrices beside the kernels of layers (LoRA); 0: none
    model.lora_alpha = 16.0  # their product is scaled by lora_alpha / lora_rank
    model.frozen_dtype = ""  # of the layers' kernels: int8, frozen; empty: param_dtype
    model.window = 0  # attention window in tokens, with itself; 0: all before it
    model.separate_documents = False  # no attention across data.end_token
    model.attention = "auto"  # chunked | cudnn | flash; auto: by the device
    model.feed_forward_chunks = 1  # parts of the tokens, computed in turn to save memory
    model.loss_chunk = 2048  # tokens per device whose logits are in memory at once

    config.optimizer.name = "adamw"
    config.optimizer.b2 = 0.99
    config.optimizer.weight_decay = 0.1
    config.schedule.learning_rate = 2e-3
    config.schedule.warmup_steps = 100
    return config


def digits() -> ConfigDict:
    """The digits that come with the package. They are few, so regularisation matters most."""
    config = image_classification()
    config.num_steps = 400
    config.label_smoothing = 0.1
    config.data.crop_padding = 1
    config.model.channels = (48, 48, 96)
    config.optimizer.weight_decay = 1e-3
    config.schedule.warmup_steps = 50
    return config


def cifar(num_classes: int = 10) -> ConfigDict:
    """The CIFAR recipe of the RevNet paper (Gomez et al. 2017, arXiv:1707.04585)."""
    config = image_classification()
    config.num_steps = 80_000
    config.log_every_steps = 100
    config.eval_every_steps = 2_000
    config.checkpoint_every_steps = 1_000
    config.eval_batch_size = 500
    config.data.update(
        {
            "name": f"cifar{num_classes}",
            "image_shape": (32, 32, 3),
            "num_classes": num_classes,
            "crop_padding": 2,  # to 36x36
            "flip": True,
        }
    )
    config.schedule.update({"name": "piecewise", "boundaries": (40_000, 60_000)})
    return config


def imagenet() -> ConfigDict:
    """The ImageNet recipe of the RevNet paper, with random resized crops."""
    config = image_classification()
    config.num_steps = 600_000
    config.batch_size = config.eval_batch_size = 256
    config.log_every_steps = 100
    config.eval_every_steps = config.checkpoint_every_steps = 5_000
    config.data.update(
        {
            "name": "image_folder",
            "image_shape": (224, 224, 3),
            "num_classes": 1000,
            "flip": True,
            "min_crop_area": 0.08,
            "num_threads": 16,
            "prefetch": 16,
        }
    )
    config.model.stem = "imagenet"
    config.optimizer.weight_decay = 1e-4
    config.schedule.update({"name": "piecewise", "boundaries": (160_000, 320_000, 480_000)})
    return config


# Arms (variants) that several experiments share: settings by dotted key, for `with_arms`.
CIFAR100 = {"data.name": "cifar100", "data.num_classes": 100}
CIFAR_LAPTOP = {
    "num_steps": 500,
    "batch_size": 50,
    "log_every_steps": 10,
    "eval_every_steps": 500,
    "checkpoint_every_steps": 100,
    "data.crop_padding": 0,  # half an epoch needs no augmentation against overfitting
    "optimizer.nesterov": True,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 30,
}
IMAGENET_LAPTOP = {
    "num_steps": 20,
    "batch_size": 16,
    "eval_batch_size": 16,
    "log_every_steps": 1,
    "eval_every_steps": 20,
    "checkpoint_every_steps": 10,
    "data.image_shape": (64, 64, 3),
    "data.num_threads": 2,
    "schedule.name": "constant",
    "schedule.learning_rate": 0.01,
    "schedule.warmup_steps": 0,
}
LM_LAPTOP = {
    "num_steps": 20,
    "batch_size": 4,
    "eval_batch_size": 4,
    "log_every_steps": 1,
    "eval_every_steps": 20,
    "checkpoint_every_steps": 10,
    "mesh.fsdp": 1,
    "data.context": 128,
    "model.layers": 4,
    "model.width": 128,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.hidden": 344,
    "model.compute_dtype": "float32",
    "schedule.warmup_steps": 5,
}


def with_arms(config: ConfigDict, arm: str, arms: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """Applies the named variants of a config: `--config=FILE:laptop` or `FILE:cifar100,laptop`.

    Args:
      arms: for each name, settings by dotted key.
    """
    for name in filter(None, arm.split(",")):
        if name not in arms:
            raise ConfigError(f"got arm {name!r}, expected one of {', '.join(arms) or 'none'}")
        config.update_from_flattened_dict(dict(arms[name]))
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns the settings by dotted key: `{"model.units": (2, 2), ...}`."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


@contextmanager
def settings(name: str) -> Generator[None]:
    """Turns a ValueError raised while building from `config.<name>` into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.{name}: {error}") from error
