"""The base class of transformers: one chain of layers between an embedding and a head.

A reversible transformer has two streams, which both start as the embedding. Branch f reads the
second and updates the first, branch g reads the first and updates the second, and the sum of both
goes to the head. The irreversible transformer has one stream, which both branches read and update,
and the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import Layer, PlainLayer, reversible_block
from revnet_jax.models.chain_model import ChainModel
from revnet_jax.models.model import ModelOptions, Sweep


class Transformer(ChainModel):
    """The chain of a transformer; subclasses add the embedding and the head.

    Args:
      reversible: two streams; otherwise one stream.
      layers: see `ChainModel`.
      options: see `ChainModel`.
    """

    def __init__(self, *, layers: int, reversible: bool, options: ModelOptions):
        super().__init__(layers=layers, invertible=reversible, options=options)

    def _layer(self, f: Callable[..., Any], g: Callable[..., Any]) -> Layer:
        """The chain's layer from branches f and g that return (u, aux)."""
        if self.invertible:
            return reversible_block(f, g, has_aux=True, grid=self.grid)
        return PlainLayer(residual(f, g))

    def _run(
        self,
        layer: Layer,
        params_L: Any,
        x: jax.Array,
        *,
        sweep: Sweep = Sweep(),
        **data: Any,
    ) -> tuple[jax.Array, Any]:
        """Runs the chain on embeddings x: (the sum of the streams, stacked auxiliary outputs).

        data: `shared` and `data_L` of `chain`.
        """
        streams = (x, x) if self.invertible else (x,)
        y, aux_L = self.run_chain(layer, params_L, streams, sweep=sweep, **data)
        return sum(y[1:], y[0]), aux_L


def check_positive(sizes: Any, names: Sequence[str]) -> None:
    """Raises ValueError unless each of these attributes is a positive integer."""
    for name in names:
        value = getattr(sizes, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"got {name}={value!r}, expected a whole number from 1")


def residual(f: Callable[..., Any], g: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a layer with one stream, which both branches read and update."""

    def apply(params, x, context):
        (x,), auxes = x, []
        for branch, branch_params in zip((f, g), params, strict=True):
            u, aux = branch(branch_params, x, context)
            x = x + u.astype(x.dtype)
            auxes.append(aux)
        return (x,), tuple(auxes)

    return apply


def init_layers_of(modules: Any, key: jax.Array, layers: int) -> tuple[Any, ...]:
    """Initialises each module for `layers` layers: a tuple of stacked parameters."""
    keys = jax.random.split(key, (len(modules), layers))
    return tuple(jax.vmap(m.init)(k)[0] for m, k in zip(modules, keys, strict=True))


def drop(x: jax.Array, rate: float, keys: jax.Array | None, i: int) -> jax.Array:
    """Dropout with `keys[i]`; no dropout if `keys` is None. Kept values become x / (1 - rate)."""
    if rate == 0 or keys is None:
        return x
    keep = jax.random.bernoulli(keys[i], 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
