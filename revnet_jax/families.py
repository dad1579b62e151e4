"""The families of models: a table with the settings, task, data and depth of each.

No other module depends on the family of a model. They use the `Model` and `Task` that a row of the
table builds, or the row itself.

Your own model needs no row: `config.model.family = "my_model:build"` names a function that gets the
settings of `config.model` and returns a `Task` (see `config/references.py`, docs/your_own.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from revnet_jax.config import (
    ConfigError,
    check_experiment,
    experiment,
    image_classification,
    language_model,
    references,
    settings,
    vision_transformer,
)
from revnet_jax.config.ranges import check_ranges
from revnet_jax.core import Grid
from revnet_jax.models import (
    ConvNet,
    ConvNetShape,
    LanguageModel,
    LanguageModelShape,
    ModelOptions,
    Variables,
    VisionTransformer,
    VisionTransformerShape,
)
from revnet_jax.models.task import Classification, NextToken, Task
from revnet_jax.models.transformer.attention import kernel_for

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Depth:
    """How the settings of a model give its depth, and how to change it.

    Attributes:
      of: `(config.model) -> depth`, in layers or residual units.
      times: `(config.model, n) -> settings` of a model n times as deep.
      equal: `(config, layers) -> settings` with this number of layers in the chain of each stage.
    """

    of: Callable[[Mapping[str, Any]], int]
    times: Callable[[Mapping[str, Any], int], dict[str, Any]]
    equal: Callable[[ConfigDict, int], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One row of the table of families.

    Attributes:
      settings: returns a config with every setting and its default.
      task: `(config, options, platform) -> task`. The platform is "cpu", "gpu" or "tpu".
      data: the kind of data that the task needs; None if the data set decides.
      depth: how the depth of the model is set.
    """

    settings: Callable[[], ConfigDict]
    task: Callable[[ConfigDict, ModelOptions, str], Task]
    data: Literal["images", "text"] | None
    depth: Depth


def family_of(config: ConfigDict) -> Family:
    """The row of `config.model.family`. ConfigError unless `config.model` has its settings."""
    name, model = config.model.family, set(config.model)
    if references.is_reference(name):
        check_experiment(config)
        return ONES_OWN
    # Families of equal settings (revnet, resnet, irevnet) can be exchanged by a flag. The settings
    # of others would be missing or left over.
    fitting = [known for known, row in FAMILIES.items() if set(row.settings().model) == model]
    if name in fitting:
        return FAMILIES[name]
    if name in FAMILIES and not fitting:
        knobs = set(FAMILIES[name].settings().model)
        raise ConfigError(
            f"config.model: got settings that differ from those of a {name} in "
            f"{', '.join(sorted(knobs ^ model))}, expected the same"
        )
    raise ConfigError(
        f"config.model.family: got {name!r}, expected one of {', '.join(fitting or FAMILIES)}: "
        "others have other settings, so start from one of their configs. A model of your own is "
        "named MODULE:FUNCTION"
    )


def build_task(
    config: ConfigDict, stored_layers: int | None = None, *, platform: str | None = None
) -> Task:
    """Builds the model of a config with its training task. Nothing is computed.

    Args:
      stored_layers: replaces the setting of the config, where -1 counts as 0.
      platform: of the devices to train on, "cpu", "gpu" or "tpu"; by default, of those here.

    Raises ConfigError for settings that cannot be used.
    """
    check_ranges(config)
    family = family_of(config)
    with settings("model"):
        options = _options(config, stored_layers)
    return family.task(config, options, platform or jax.default_backend())


# Settings of every model that `_options` reads.
_RESOLVED = (
    *("family", "backprop", "stored_layers", "unroll", "keep_operands"),
    *("compute_dtype", "param_dtype", "grid", "grid_bits", "check_exactness"),
)


def _options(config: ConfigDict, stored_layers: int | None) -> ModelOptions:
    """How the model of a config computes: backpropagation strategy, dtypes and grid."""
    model = config.model
    for name in ("compute_dtype", "param_dtype"):
        if model[name] not in DTYPES:
            raise ValueError(f"got {name}={model[name]!r}, expected one of {', '.join(DTYPES)}")
    if stored_layers is None:
        stored_layers = max(model.stored_layers, 0)
    strategies = tuple(name.strip() for name in model.backprop.split(","))
    return ModelOptions(
        backprop=strategies if len(strategies) > 1 else strategies[0],
        stored_layers=stored_layers,
        unroll=model.unroll,
        keep_operands=model.keep_operands,
        compute_dtype=DTYPES[model.compute_dtype],
        param_dtype=DTYPES[model.param_dtype],
        grid=Grid(model.grid_bits) if model.grid else None,
        check_exactness=model.check_exactness,
    )


def _own(config: ConfigDict) -> dict[str, Any]:
    """The settings of `config.model` that only its family has."""
    return {name: value for name, value in config.model.items() if name not in _RESOLVED}


def _convolutional(config, options, platform):
    shapes = {"image_shape": config.data.image_shape, "num_classes": config.data.num_classes}
    with settings("model"):
        shape = ConvNetShape(family=config.model.family, **shapes, **_own(config))
        network = ConvNet(shape, options)
    return _classification(config, network)


def _vision_transformer(config, options, platform):
    model = _own(config)
    attention = _kernel(model.pop("attention"), platform)
    shapes = {"image_shape": config.data.image_shape, "num_classes": config.data.num_classes}
    with settings("model"):
        shape = VisionTransformerShape(**shapes, **model)
        network = VisionTransformer(shape, options, attention=attention)
    return _classification(config, network)


def _classification(config, network):
    return Classification(network, config.label_smoothing, config.mixup)


def _decoder(config, options, platform):
    model = _own(config)
    attention = _kernel(model.pop("attention"), platform)
    # These two change memory and time, not the function, so they are no part of the shape.
    chunks = {name: model.pop(name) for name in ("feed_forward_chunks", "loss_chunk")}
    end_token = _end_token(config) if model.pop("separate_documents") else None
    with settings("model"):
        shape = LanguageModelShape(vocab_size=config.data.vocab_size, end_token=end_token, **model)
        if config.data.context % chunks["feed_forward_chunks"]:
            raise ValueError(
                f"got feed_forward_chunks={chunks['feed_forward_chunks']}, expected a divisor of "
                f"data.context={config.data.context}"
            )
        if 0 < shape.learned_positions < config.data.context:
            raise ValueError(
                f"got learned_positions={shape.learned_positions}, expected 0 (rotary), or "
                f"data.context={config.data.context} or more"
            )
        network = LanguageModel(shape, options, **chunks, attention=attention)
    return NextToken(network, config.data.context, config.balance)


def _end_token(config):
    """The id of the token that ends documents. ConfigError unless it is in the vocabulary."""
    end, size = config.data.end_token, config.data.vocab_size
    if not 0 <= end < size:
        raise ConfigError(
            f"config.data.end_token: got {end} and model.separate_documents, expected the id of "
            f"the token that ends documents, 0 to {size - 1}; tokens.json has that of shards"
        )
    return end


def _ones_own(config, options, platform):
    """Builds the task of a user's function, and checks that it has what a task and model need."""
    name, model = config.model.family, _own(config)
    optional = {"data": config.data, "platform": platform}
    given = {"options": options}
    task = references.call_reference("model.family", name, model, given=given, optional=optional)
    check = functools.partial(references.check_members, "model.family", name)
    members = ("network", "loss", "sums", "batch_shapes", "scores", "units", "of_data")
    check(task, members, "a Task (revnet_jax/models/task.py)")
    network = task.network
    members = ("init", "probes", "rules", "grid", "invertible", "strategies", "stacked")
    expected = "a Model (revnet_jax/models/model.py) as its network"
    check(network, (*members, "most_stored_layers"), expected)
    # Shapes are enough, and cost no memory however large the model is.
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    if not isinstance(variables, Variables) or not set(network.stacked) <= set(variables.params):
        raise ConfigError(
            f"config.model: got an init of {name} that returns a {type(variables).__name__}, "
            f"expected Variables whose params have the groups {', '.join(network.stacked)}"
        )
    return task


def _kernel(name, platform):
    # Besides plain JAX (chunked), every platform has at most one kernel of its own.
    own = kernel_for(platform)
    if name not in ("auto", "chunked", own):
        raise ConfigError(
            f"config.model.attention: got {name!r} on {platform}, expected auto, or one of "
            f"{', '.join(sorted({'chunked', own}))}"
        )
    return own if name == "auto" else name


def _equal_units(config, layers):
    """Units per stage, for chains of `layers` layers.

    A unit that changes width or resolution is not part of a chain, so it is added to them.
    """
    config = config.copy_and_resolve_references()
    # The network with one unit per stage tells which stages begin with a transition. A platform is
    # named, so that JAX need not start a backend to ask.
    config.model.units = (1,) * len(config.model.units)
    config.model.update({"backprop": "store", "stored_layers": 0})
    network: Any = build_task(config, platform="cpu").network
    first_units = [group for group in network.groups if group.unit]
    return {"units": tuple(layers + group.is_transition for group in first_units)}


def _layers(model):
    if not isinstance(model.get("layers"), int):
        raise ConfigError(
            f"config.model.layers: got {model.get('layers')!r}, expected a whole number: its depth"
        )
    return model["layers"]


def _equal_layers(config, layers):
    _layers(config.model)  # raises if it has none to replace
    return {"layers": layers}


LAYERS = Depth(
    of=_layers,
    times=lambda model, n: {"layers": n * _layers(model)},
    equal=_equal_layers,
)
UNITS = Depth(
    of=lambda model: sum(model["units"]),
    times=lambda model, n: {"units": tuple(n * units for units in model["units"])},
    equal=_equal_units,
)
# A model of one's own has a depth if it has the setting `config.model.layers`.
ONES_OWN = Family(experiment, _ones_own, None, LAYERS)
CONVOLUTIONAL = Family(image_classification, _convolutional, "images", UNITS)
FAMILIES = {
    "revnet": CONVOLUTIONAL,
    "resnet": CONVOLUTIONAL,
    "irevnet": CONVOLUTIONAL,
    "vit": Family(vision_transformer, _vision_transformer, "images", LAYERS),
    "decoder": Family(language_model, _decoder, "text", LAYERS),
}
