"""What transformers share: one chain of layers between an embedding and a head.

A reversible one has two streams, both starting from the embedding: branch f reads the second and
updates the first, g the reverse; their sum goes on to the head. Its irreversible twin has one
stream, which both branches read and update, and the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import (
    STRATEGIES,
    Backprop,
    Exactness,
    Grid,
    Layer,
    PlainLayer,
    chain,
    reversible_block,
)
from revnet_jax.models.network import Lockstep
from revnet_jax.models.partition import on_batch
from revnet_jax.models.strategies import Strategy


class Transformer:
    """The chain, and how its gradient is computed. Subclasses add what comes before and after.

    reversible: two streams; else the twin, with one.
    backprop, stored_layers, unroll: what the gradient costs (see `chain`).
    compute_dtype: of the branches; streams, normalisations and logits are float32.
    param_dtype: of kernels and embeddings; other parameters are float32.
    grid: where two streams live; None for free floats.
    check_exactness: whether `probes` has any: the check keeps the chain's input.

    Raises ValueError for what does not go together.
    """

    def __init__(
        self,
        *,
        layers: int,
        reversible: bool,
        backprop: Backprop,
        stored_layers: int,
        unroll: int,
        compute_dtype: Any,
        param_dtype: Any,
        grid: Grid | None,
        check_exactness: bool,
    ):
        if backprop not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"got backprop={backprop!r}, expected one of {known}")
        if not 0 <= stored_layers <= (0 if backprop == "store" else layers):
            raise ValueError(
                f"got stored_layers={stored_layers}, expected 0 to {layers}, and 0 for "
                "backprop='store', which stores all"
            )
        if backprop == "reverse" and not reversible:
            raise ValueError(
                "got backprop='reverse' for a model of one stream, expected any other: "
                "its layers have no inverse. Take reversible=True to store nothing"
            )
        self.invertible, self.grid = reversible, grid
        self.compute_dtype, self.param_dtype = compute_dtype, param_dtype
        self.check_exactness = check_exactness
        self._unroll = unroll
        self._strategy = Strategy(backprop, stored_layers, layers)

    @property
    def strategies(self) -> dict[str, Strategy]:
        """Of the one chain there is."""
        return {"layers": self._strategy}

    @property
    def most_stored_layers(self) -> int:
        """How many there are in chains that do not store anyway."""
        return 0 if self._strategy.backprop == "store" else self._strategy.layers

    @property
    def stacked(self) -> list[str]:
        """The groups whose variables have a leading axis of one per layer."""
        return ["layers"]

    def probes(self) -> dict[str, Exactness] | None:
        """What takes the check that the chain was undone exactly; None where there is none."""
        checked = self._strategy.rebuilds and self.check_exactness
        return {"layers": Exactness.probe()} if checked else None

    def _layer(self, f: Callable[..., Any], g: Callable[..., Any]) -> Layer:
        """Of branches that return (u, aux)."""
        if self.invertible:
            return reversible_block(f, g, has_aux=True, grid=self.grid)
        return PlainLayer(residual(f, g))

    def _run(
        self,
        layer: Layer,
        params_L: Any,
        x: jax.Array,
        *,
        probes: dict[str, Exactness] | None,
        lockstep: Lockstep | None,
        **data: Any,
    ) -> tuple[jax.Array, Any]:
        """(the sum of the streams, what the branches return besides, stacked).

        data: `shared` and `data_L` of `chain`.
        """
        x = on_batch(x)
        y, aux_L = chain(
            layer,
            params_L,
            (x, x) if self.invertible else (x,),
            backprop=self._strategy.backprop,
            stored_layers=self._strategy.stored_layers,
            unroll=self._unroll,
            update=lockstep and lockstep.update,
            state_L=lockstep and lockstep.states["layers"],
            probe=probes and probes["layers"],
            **data,
        )
        return sum(y[1:], y[0]), aux_L


def check_positive(sizes: Any, names: Sequence[str]) -> None:
    """Raises ValueError where one of these attributes is no whole number from 1."""
    for name in names:
        value = getattr(sizes, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"got {name}={value!r}, expected a whole number from 1")


def residual(f: Callable[..., Any], g: Callable[..., Any]) -> Callable[..., Any]:
    """The layer of one stream that both branches read and update."""

    def apply(params, x, context):
        (x,), auxes = x, []
        for branch, branch_params in zip((f, g), params, strict=True):
            u, aux = branch(branch_params, x, context)
            x = x + u.astype(x.dtype)
            auxes.append(aux)
        return (x,), tuple(auxes)

    return apply


def init_layers_of(modules: Any, key: jax.Array, layers: int) -> tuple[Any, ...]:
    """Parameters of so many layers, stacked, for each of the modules."""
    keys = jax.random.split(key, (len(modules), layers))
    return tuple(jax.vmap(m.init)(k)[0] for m, k in zip(modules, keys, strict=True))


def drop(x: jax.Array, rate: float, keys: jax.Array | None, i: int) -> jax.Array:
    """Dropout by key i; x itself without keys. What is kept is scaled by 1 / (1 - rate)."""
    if rate == 0 or keys is None:
        return x
    keep = jax.random.bernoulli(keys[i], 1 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
