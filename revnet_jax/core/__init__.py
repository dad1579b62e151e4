"""Reversible layers and chains of them, as pure functions. Imports nothing but jax."""

from revnet_jax.core.block import Block, Context, HalfStep, Layer, PlainLayer, reversible_block
from revnet_jax.core.chain import STRATEGIES, Backprop, chain, chain_inverse
from revnet_jax.core.couplings import Coupling, additive
from revnet_jax.core.exactness import Exactness
from revnet_jax.core.grid import Grid

__all__ = [
    "STRATEGIES",
    "Backprop",
    "Block",
    "Context",
    "Coupling",
    "Exactness",
    "Grid",
    "HalfStep",
    "Layer",
    "PlainLayer",
    "additive",
    "chain",
    "chain_inverse",
    "reversible_block",
]
