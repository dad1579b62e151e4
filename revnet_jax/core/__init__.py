"""Reversible layers and chains of them, as pure functions. Imports nothing but jax."""

from revnet_jax.core.block import (
    Block,
    Context,
    HalfStep,
    Invertible,
    Layer,
    PlainLayer,
    ReversibleLayer,
)
from revnet_jax.core.blocks import (
    bdia_block,
    keeping_operands,
    meft_block,
    momentum_block,
    multi_stream_block,
    reversible_block,
    symplectic_block,
)
from revnet_jax.core.chain import (
    Section,
    chain,
    sequence,
    sequence_forward,
    sequence_inverse,
)
from revnet_jax.core.check import check_reversible
from revnet_jax.core.couplings import (
    Coupling,
    additive,
    affine,
    bdia,
    leapfrog,
    momentum,
    scale_on_grid,
    scaled,
)
from revnet_jax.core.evaluate import GATHERED
from revnet_jax.core.exactness import Exactness
from revnet_jax.core.grid import Grid, snap
from revnet_jax.core.strategies import STRATEGIES, Backprop

__all__ = [
    "GATHERED",
    "STRATEGIES",
    "Backprop",
    "Block",
    "Context",
    "Coupling",
    "Exactness",
    "Grid",
    "HalfStep",
    "Invertible",
    "Layer",
    "PlainLayer",
    "ReversibleLayer",
    "Section",
    "additive",
    "affine",
    "bdia",
    "bdia_block",
    "chain",
    "check_reversible",
    "keeping_operands",
    "leapfrog",
    "meft_block",
    "momentum",
    "momentum_block",
    "multi_stream_block",
    "reversible_block",
    "scale_on_grid",
    "scaled",
    "sequence",
    "sequence_forward",
    "sequence_inverse",
    "snap",
    "symplectic_block",
]
