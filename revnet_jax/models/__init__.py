"""Networks as pure functions over trees of arrays; flax modules as branches of blocks."""

from revnet_jax.models.bridge import (
    BranchData,
    FlaxBranch,
    init_layers,
    linen_branch,
    nnx_branch,
    with_keys,
    with_stats,
)
from revnet_jax.models.chain_model import ChainModel
from revnet_jax.models.convolutional.network import ConvNet
from revnet_jax.models.convolutional.shape import ConvNetShape
from revnet_jax.models.model import Model, ModelOptions, Sweep, Variables, num_params
from revnet_jax.models.transformer.lm import LanguageModel
from revnet_jax.models.transformer.shape import LanguageModelShape
from revnet_jax.models.transformer.vit import VisionTransformer, VisionTransformerShape

__all__ = [
    "BranchData",
    "ChainModel",
    "ConvNet",
    "ConvNetShape",
    "FlaxBranch",
    "LanguageModel",
    "LanguageModelShape",
    "Model",
    "ModelOptions",
    "Sweep",
    "Variables",
    "VisionTransformer",
    "VisionTransformerShape",
    "init_layers",
    "linen_branch",
    "nnx_branch",
    "num_params",
    "with_keys",
    "with_stats",
]
