"""Reversible blocks of the literature, each as half-steps.

Branches are pure functions `(params, *streams read, context) -> u`, or `-> (u, aux)` if
`has_aux`. A block's parameters are a tuple with one tree per half-step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from revnet_jax.core import trees
from revnet_jax.core.block import Block, Context, HalfStep, check_branch
from revnet_jax.core.constants import constant
from revnet_jax.core.couplings import (
    Coupling,
    additive,
    bdia,
    check_gamma,
    like_stream,
    momentum,
    scaled,
)
from revnet_jax.core.grid import Grid

Branch = Callable[..., Any]


def reversible_block(
    f: Branch,
    g: Branch,
    *,
    has_aux: bool = False,
    coupling: Coupling | None = None,
    grid: Grid | None = Grid(),
) -> Block:
    """Two streams that update each other: `y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`.

    RevNet (Gomez et al. 2017, arXiv:1707.04585, eq. 6). Parameters are a pair `(f's, g's)`.

    Args:
      coupling: how an update is merged into its stream; additive by default.
      grid: the grid that streams are kept on; `Grid(bits)` for another resolution, None for
        ordinary floats.
    """
    return multi_stream_block((f, g), has_aux=has_aux, coupling=coupling, grid=grid)


def multi_stream_block(
    branches: Sequence[Branch],
    *,
    reads: Literal["others", "next"] = "others",
    has_aux: bool = False,
    coupling: Coupling | None = None,
    grid: Grid | None = Grid(),
) -> Block:
    """A block with one stream per branch; branch i updates stream i, in order.

    Args:
      reads: "others": branch i sees all streams except stream i, in order; "next" (round-robin): it
        sees stream i + 1 only, and the last branch sees the first stream.

    Streams may differ in shape; branch i must then return the shape of stream i.
    """
    n = len(branches)
    if n < 2 or reads not in ("others", "next"):
        raise ValueError(
            f"got {n} branches and reads={reads!r}, expected two or more, and 'others' or 'next'"
        )
    coupling = additive() if coupling is None else coupling
    steps = []
    for i, branch in enumerate(branches):
        seen = tuple(j for j in range(n) if j != i) if reads == "others" else ((i + 1) % n,)
        steps.append(HalfStep(_with_aux(branch, has_aux, len(seen)), i, seen, coupling))
    return Block(tuple(steps), grid)


def symplectic_block(
    kinetic: Branch, potential: Branch, *, step: float, grid: Grid | None = Grid()
) -> Block:
    """Hamiltonian dynamics: position and momentum updated in turn by gradients of energies.

    `q' = q + h dT/dp(p)`, `p' = p - h dV/dq(q')`: the symplectic Euler method for H = T(p) + V(q)
    (Chang et al. 2018, arXiv:1709.03698; there each energy is one layer of a network). Streams
    are (q, p), of equal shape.

    Args:
      kinetic: `(params, stream, context) -> energy`, a scalar.
      potential: likewise.

    Parameters are a pair (kinetic's, potential's). Cost: a branch is the gradient of an energy,
    so a layer costs about three times its energies.
    """

    step = constant("step", step)

    def force(energy):
        check_branch(energy, 1)
        # The energy gets the context as an argument: a branch must not close over keys or shared
        # inputs, because the chain's custom gradient does not see closed-over values.
        return lambda params, x, context: jax.grad(lambda x: energy(params, x, context))(x)

    return Block(
        (
            # q moves first, by the force at the old p. Then p moves, by the force at the new q.
            HalfStep(_with_aux(force(kinetic)), 0, (1,), additive(step)),
            HalfStep(_with_aux(force(potential)), 1, (0,), additive(-step)),
        ),
        grid,
    )


def momentum_block(
    f: Branch, *, gamma: float = 0.9, has_aux: bool = False, grid: Grid | None = Grid()
) -> Block:
    """`v' = gamma * v + (1 - gamma) * f(x)`, `x' = x + v'`.

    Momentum ResNets (Sander et al. 2021, arXiv:2102.07870): an ordinary residual network with a
    velocity. Streams are (x, v), of equal shape. Parameters are a pair `(f's, ())`. Stores one
    bit per element of v per layer.
    """
    return Block(
        (
            HalfStep(_with_aux(f, has_aux), 1, (0,), momentum(gamma)),
            # x' = x + v': a branch without parameters, which returns what it reads.
            HalfStep(lambda params, v, context: (v, None), 0, (1,), additive()),
        ),
        grid,
    )


def bdia_block(
    f: Branch,
    g: Branch,
    *,
    gamma: Callable[[Context], Any] | None = None,
    bits: int = 1,
    has_aux: bool = False,
    grid: Grid | None = Grid(),
) -> Block:
    """Two layers of a residual network, trained as a random average of ODE integrators.

    `x[n+1] = gamma x[n-1] + (1 - gamma) x[n] + (1 + gamma) h(x[n])`: Zhang et al. 2024
    (arXiv:2407.09093). h is f in the first half-step and g in the second. Streams are
    (x[n-1], x[n]), of equal shape, and (x[n+1], x[n+2]) after the layer. For inference gamma is
    0, its mean, which gives the ordinary network x[n] + h(x[n]).

    Args:
      gamma: a function that returns the pair of gammas, for f's and g's half-step, from a layer's
        context; by default `data["gamma"]`, indexed by half-step. Each is 1/2 or -1/2 (or 0 for
        inference), drawn per example and layer: of a shape like [2, B, 1, 1, 1] for images. With
        more `bits` it may be any number of a size from 2**-bits to 1. At gamma = 1 a half-step is
        the midpoint rule, x[n+1] = x[n-1] + 2 h(x[n]).
      bits: of the residue, see `bdia`.

    Stores `bits` bits per element per half-step.
    """

    def from_data(context):
        if not isinstance(context.data, dict) or "gamma" not in context.data:
            raise ValueError(
                "got layer data without gamma, expected data_L={'gamma': array [L, 2, ...]}: "
                "1/2 or -1/2 for each example, layer and half-step"
            )
        return context.data["gamma"]

    def branch(h, i):
        h = _with_aux(h, has_aux)

        def run(params, x, context):
            gammas = (gamma or from_data)(context)
            try:
                count = len(gammas)
            except TypeError:  # a number, or an array without axes
                count = 0
            if count != 2:
                raise ValueError(
                    f"got {count} gammas for a layer, expected 2, one for each half-step"
                )
            gamma_i = jnp.asarray(gammas[i])
            # Before it meets x: broadcasting may make a larger array without an error.
            check_gamma(gamma_i, x)
            u, aux = trees.pair(h(params, x, context), "a branch with has_aux=True", "(u, aux)")

            def update(x, u):
                # The coupling adds the rest, gamma x[n-1].
                c = gamma_i.astype(x.dtype)
                return (1 - c) * x + (1 + c) * u

            return (gamma_i, jax.tree.map(update, x, like_stream(u, x))), aux

        return run

    coupling = bdia(bits)
    return Block(
        (HalfStep(branch(f, 0), 0, (1,), coupling), HalfStep(branch(g, 1), 1, (0,), coupling)), grid
    )


def meft_block(
    f: Branch,
    g: Branch,
    *,
    scales: tuple[float, float] = (0.1, 1.0),
    has_aux: bool = False,
    grid: Grid | None = Grid(),
) -> Block:
    """A pretrained layer f made reversible by an adapter g, `MEFT1` of the paper.

    `y1 = scales[0] * x1 + f(x2)`, `y2 = scales[1] * x2 + g(y1)`, and the layer returns (y2, y1):
    the streams change places. Liao, Tan & Monz 2023 (arXiv:2306.00477).

    Args:
      f: the whole layer, with its residual connections, so that f(x) is the layer's output.
      g: a small network, whose output starts at or near zero.
      scales: the paper's lambda and beta, each in [2**-24, 1]. Where lambda is small and g is zero,
        x2 passes through the layers f as through the pretrained network, and x1 is beta times what
        x2 was a layer before.

    Streams are of equal shape. Parameters are a pair `(f's, g's)`. Stores log2(1 / scale) bits,
    rounded up, for each element of a stream: 4 and none with the default scales.
    """
    branches = zip((f, g), (0, 1), scales, strict=True)
    steps = (HalfStep(_with_aux(b, has_aux), i, (1 - i,), scaled(s)) for b, i, s in branches)
    return Block(tuple(steps), grid, order=(1, 0))


def keeping_operands(block: Block) -> Block:
    """The block whose branches keep the operands of their products for the derivative.

    By default a derivative computes them again, from the fewest bytes that suffice. The operands
    are in memory in any case, so that this saves passes over memory wherever the residuals of one
    layer live at a time: under `reverse`, where memory stays as it was. Under `store` every layer
    keeps more. The choice changes how gradients are rounded, alike under all strategies.

    Compiled for an H100, a step of lm_124m at batch 16, unrolled: `reverse` 0.95 of the predicted
    time, `store` 0.96 of the time and 1.2 of the memory (docs/planning.md, Operands kept).
    """
    if not isinstance(block, Block):
        raise TypeError(f"got a {type(block).__name__}, expected a Block, which has branches")
    steps = (replace(step, keep_operands=True) for step in block.half_steps)
    return replace(block, half_steps=tuple(steps))


def _with_aux(branch: Branch, has_aux: bool = False, num_reads: int = 1) -> Branch:
    check_branch(branch, num_reads)
    # Inside a half-step every branch returns a pair, so that there is one form to handle.
    return branch if has_aux else lambda *args: (branch(*args), None)
