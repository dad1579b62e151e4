"""Networks as pure functions over trees of arrays; flax modules as branches of blocks."""

from revnet_jax.models.bridge import (
    Branch,
    BranchData,
    init_layers,
    linen_branch,
    nnx_branch,
    with_keys,
    with_stats,
)
from revnet_jax.models.chain_model import ChainModel
from revnet_jax.models.convolutional.architecture import Architecture
from revnet_jax.models.convolutional.network import Network
from revnet_jax.models.model import Model, Sweep, Variables, num_params
from revnet_jax.models.transformer.lm import Decoder, LanguageModel
from revnet_jax.models.transformer.vit import RevViT, VisionTransformer

__all__ = [
    "Architecture",
    "Branch",
    "BranchData",
    "ChainModel",
    "Decoder",
    "LanguageModel",
    "Model",
    "Network",
    "RevViT",
    "Sweep",
    "Variables",
    "VisionTransformer",
    "init_layers",
    "linen_branch",
    "nnx_branch",
    "num_params",
    "with_keys",
    "with_stats",
]
