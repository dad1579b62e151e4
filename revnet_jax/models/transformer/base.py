"""The base class of transformers: one chain of layers between an embedding and a head.

A reversible transformer has two streams, which both start as the embedding. Its integrator says
how they are updated, see `Transformer`: by default, branch f reads the second and updates the
first, and branch g reads the first and updates the second. The irreversible transformer has one
stream, which both branches read and update, and the same parameters, but for those that an
integrator adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import (
    Block,
    Layer,
    PlainLayer,
    bdia_block,
    leapfrog,
    meft_block,
    reversible_block,
    scale_on_grid,
)
from revnet_jax.models.chain_model import ChainModel
from revnet_jax.models.model import ModelOptions, Sweep

INTEGRATORS = ("streams", "bdia", "midpoint", "dual", "meft")
# Those that multiply a stream by a factor below 1, which undoing a layer divides by.
SHRINKING = ("bdia", "dual", "meft")
DUAL_BITS = 4  # c starts at 2**-DUAL_BITS
MEFT_SCALES = (0.1, 1.0)  # lambda and beta of the paper's authors, for BERT and for OPT


class Transformer(ChainModel):
    """The chain of a transformer; subclasses add the embedding and the head.

    A layer of the irreversible network makes two steps x[n+1] = x[n] + h(x[n]), with h = f, then g.
    The streams of a reversible network can stand for two states of it, one after the other:

    | integrator | a step of the layers                               | the head reads            |
    |------------|----------------------------------------------------|---------------------------|
    | streams    | x[n+1] = x[n-1] + h(x[n]), a RevNet                | x[n] + x[n-1]             |
    | midpoint   | x[n+1] = x[n-1] + 2 h(x[n])                        | (x[n] + x[n-1]) / 2       |
    | bdia       | x[n+1] = c x[n-1] + (1-c) x[n] + (1+c) h(x[n])     | x[n]                      |
    | dual       | the same                                           | (1-c/2) x[n] + c/2 x[n-1] |

    "midpoint" is the explicit midpoint rule (Gal et al. 2025, arXiv:2512.02056). Both states start
    as the embedding. Their errors then have opposite signs, so that the mean is right to first
    order in the updates. "bdia" draws c = 1/2 or -1/2 for each example and step of training (Zhang
    et al. 2024, arXiv:2407.09093), and outside of training c is 0: the irreversible network itself.
    "dual" raises c from 1/16, near the irreversible network, to 1, the midpoint rule, in the course
    of training: scheduled residual connections to two states, as in Dr2Net (Zhao et al. 2024,
    arXiv:2401.04105), here with weights that sum to 1. It keeps `DUAL_BITS` bits for each element
    of a stream and step.

    "meft" makes one step per layer, with a branch that is the whole layer F of the irreversible
    network (Liao et al. 2023, arXiv:2306.00477, MEFT1; see `meft_block`). With an adapter G of each
    layer, which starts at zero, and y[0] = x[0]:

        x[n+1] = 0.1 y[n] + F(x[n])
        y[n+1] = x[n] + G(x[n+1])

    The head reads x[n] + 0.1 y[n], as in the authors' decoders. On a grid 0.1 is rounded to 0.09994
    in the layers, see `scaled`, and so it is in the head. It keeps 4 bits for each element of
    one stream and layer.

    "bdia", "dual" and "meft" divide by c or 0.1 where they undo a layer. On a grid that is exact.
    Without one it multiplies the rounding errors by up to 16 per update, so a chain that is rebuilt
    needs one.

    Args:
      reversible: two streams; otherwise one stream.
      layers: see `ChainModel`.
      options: see `ChainModel`.
      integrator: one of `INTEGRATORS`.
    """

    def __init__(
        self, *, layers: int, reversible: bool, options: ModelOptions, integrator: str = "streams"
    ):
        super().__init__(layers=layers, invertible=reversible, options=options)
        if integrator not in INTEGRATORS:
            raise ValueError(
                f"got integrator={integrator!r}, expected one of {', '.join(INTEGRATORS)}"
            )
        if integrator != "streams" and not reversible:
            raise ValueError(
                f"got integrator={integrator!r} and reversible=False, expected streams, or "
                "reversible=True: the others update two streams"
            )
        if integrator in SHRINKING and self.grid is None and self._strategy.rebuilds:
            raise ValueError(
                f"got integrator={integrator!r} and backprop='reverse' without a grid, expected "
                "grid=True, or backprop='store': without a grid each layer that is undone divides "
                "the rounding errors by a factor below 1, until they exceed the streams"
            )
        self.integrator = integrator

    def _layer(
        self,
        f: Callable[..., Any],
        g: Callable[..., Any],
        adapter: Callable[..., Any] | None = None,
        *,
        training: bool,
    ) -> Layer:
        """The chain's layer from branches f and g, and the adapter of "meft"; all return (u, aux).

        With "dual", and with "bdia" in training, the last of the context's data are its factors c.
        """
        if not self.invertible or (self.integrator == "bdia" and not training):
            return PlainLayer(residual(f, g))
        if self.integrator in ("bdia", "dual"):
            # A factor of 1/2 shifts a bit out of the stream, which is kept; c = 2**-bits is `bits`
            # of them.
            bits = DUAL_BITS if self.integrator == "dual" else 1
            factors = lambda context: context.data[-1]
            return bdia_block(f, g, gamma=factors, bits=bits, has_aux=True, grid=self.grid)
        if self.integrator == "meft":
            assert adapter is not None
            whole = _one_branch(residual(f, g))
            return meft_block(whole, adapter, scales=MEFT_SCALES, has_aux=True, grid=self.grid)
        # `leapfrog(h)` adds 2 h times the update.
        coupling = leapfrog(1.0) if self.integrator == "midpoint" else None
        return reversible_block(f, g, has_aux=True, coupling=coupling, grid=self.grid)

    def _run(
        self,
        layer: Layer,
        params_L: Any,
        x: jax.Array,
        *,
        sweep: Sweep = Sweep(),
        weight: Any = 0.5,
        **data: Any,
    ) -> tuple[jax.Array, Any]:
        """Runs the chain on embeddings x: (what the head reads, stacked auxiliary outputs).

        weight: weight of x[n-1] in what the head reads, for "midpoint" (1/2) and "dual".
        data: `shared` and `data_L` of `chain`.
        """
        if not isinstance(layer, Block):
            (y,), aux_L = self.run_chain(layer, params_L, (x,), sweep=sweep, **data)
            return y, aux_L
        if self.integrator == "meft":
            params_L, sweep = _by_half_steps(params_L), _of_half_steps(sweep)
        # y2 is x[n], and y1 is x[n-1], or y[n] of "meft": branch g is the last to update, but for
        # "meft", whose layers let their streams change places.
        (y1, y2), aux_L = self.run_chain(layer, params_L, (x, x), sweep=sweep, **data)
        if self.integrator == "streams":
            return y1 + y2, aux_L
        if self.integrator == "bdia":
            return y2, aux_L
        if self.integrator == "meft":
            return scale_on_grid(MEFT_SCALES[0], self.grid) * y1 + y2, aux_L[0]
        return weight * y1 + (1 - weight) * y2, aux_L


def _one_branch(apply):
    """A branch (u, aux) from the function of a layer with one stream."""

    def branch(params, x, context):
        (u,), aux = apply(params, (x,), context)
        return u, aux

    return branch


def _by_half_steps(params: Any) -> Any:
    """The parameters of attention, feed-forward network and adapter, as "meft" takes them."""
    attention, feed_forward, adapter = params
    return (attention, feed_forward), adapter


def _of_half_steps(sweep: Sweep) -> Sweep:
    """The sweep for parameters grouped by `_by_half_steps`; its optimizer knows them ungrouped."""
    ungrouped_update = sweep.update
    if ungrouped_update is None:
        return sweep
    ungrouped = lambda params: (*params[0], params[1])

    def update(dparams, state, params):
        params, state = ungrouped_update(ungrouped(dparams), state, ungrouped(params))
        return _by_half_steps(params), state

    return sweep._replace(update=update)


def draw_factors(key: jax.Array, layers: int, x: jax.Array) -> jax.Array:
    """The factors c of "bdia" for streams like x, [layers, 2, B, 1, ...]: 1/2 or -1/2."""
    shape = (layers, 2, len(x), *[1] * (x.ndim - 1))
    return jax.random.rademacher(key, shape, x.dtype) / 2


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
