"""Experiments: their settings and defaults, ranges, and the command line that sets them.

This package has the settings (`knobs.py`), which config files begin with. It imports nothing heavy.
"""

from revnet_jax.config.knobs import (
    CIFAR100,
    CIFAR_LAPTOP,
    IMAGENET_LAPTOP,
    LM_LAPTOP,
    VIT_SIZES,
    ConfigError,
    check_experiment,
    cifar,
    digits,
    experiment,
    flatten,
    image_classification,
    imagenet,
    language_model,
    settings,
    vision_transformer,
    with_arms,
)

__all__ = [
    "CIFAR100",
    "CIFAR_LAPTOP",
    "IMAGENET_LAPTOP",
    "LM_LAPTOP",
    "VIT_SIZES",
    "ConfigError",
    "check_experiment",
    "cifar",
    "digits",
    "experiment",
    "flatten",
    "image_classification",
    "imagenet",
    "language_model",
    "settings",
    "vision_transformer",
    "with_arms",
]
