"""The rows of the comparison: the layer and the stream layout of each coupling of the core."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from revnet_jax.core import (
    Context,
    Layer,
    PlainLayer,
    affine,
    bdia_block,
    leapfrog,
    momentum_block,
    multi_stream_block,
    reversible_block,
    symplectic_block,
)
from revnet_jax.errors import UserError
from revnet_jax.models.convolutional.conv import conv


class CouplingRow(NamedTuple):
    """What one coupling changes in the network.

    Attributes:
      layer: a layer of the core with the branches of this file.
      branches: number of branches in a layer.
      reads: input channels of a branch, as a fraction of the stem's channels: (1, 2) is a half.
      writes: output channels of a branch, likewise.
      split: number of streams that the stem's channels are split into; 1 gives all channels to
        every stream.
      note: how the row is set up, for the report.
      at_rest: with split=1: whether the second stream starts at zero, not as a copy of the first.
      reads_out: with split=1: index of the stream that the head reads.
      energy: whether the branches are gradients of energies.
    """

    layer: Layer
    branches: int
    reads: tuple[int, int]
    writes: tuple[int, int]
    split: int
    note: str
    at_rest: bool = False
    reads_out: int = 0
    energy: bool = False


def group_normalise(params: Any, x_BHWC: jax.Array) -> jax.Array:
    """Group normalisation with a single group (Wu & He 2018, arXiv:1803.08494): per example."""
    mean_B111 = jnp.mean(x_BHWC, axis=(1, 2, 3), keepdims=True)
    variance_B111 = jnp.var(x_BHWC, axis=(1, 2, 3), keepdims=True)
    scaled_BHWC = (x_BHWC - mean_B111) * jax.lax.rsqrt(variance_B111 + 1e-5)
    return scaled_BHWC * params["scale"] + params["bias"]


def residual_branch(params: Any, *args: Any) -> jax.Array:
    """(Normalisation, ReLU, 3x3 convolution) twice, on the concatenated streams it reads."""
    # The last argument is the context, which these branches do not need.
    *streams, _ = args
    x_BHWC = streams[0] if len(streams) == 1 else jnp.concatenate(streams, axis=-1)
    for norm, kernel in (("norm1", "conv1"), ("norm2", "conv2")):
        x_BHWC = conv(jax.nn.relu(group_normalise(params[norm], x_BHWC)), params[kernel]["kernel"])
    return x_BHWC


def scale_and_shift(params: Any, x_BHWC: jax.Array, context: Context) -> tuple[Any, Any]:
    """A residual branch with twice the output channels, for `affine`."""
    raw_BHWC, shift_BHWC = jnp.split(residual_branch(params, x_BHWC, context), 2, axis=-1)
    return raw_BHWC, shift_BHWC


def energy(params: Any, x_BHWC: jax.Array, context: Context) -> jax.Array:
    """The energy sum(relu(K x + b)**2) / 2 of the normalised x. A branch is its gradient.

    That gradient by the normalised x is K^T relu(K x + b). Training differentiates the branch once
    more, so `conv` is differentiated twice.
    """
    hidden_BHWC = conv(group_normalise(params["norm1"], x_BHWC), params["conv1"]["kernel"])
    return jnp.sum(jax.nn.relu(hidden_BHWC + params["conv1"]["bias"]) ** 2) / 2


def _residual(params, x, context):
    return (x[0] + residual_branch(params[0], x[0], context),), None


# `_halves` splits the stem's channels between two streams, as RevNet does. `_twice` gives all of
# them to both, whose values are two states of one network (x[n-1] and x[n], or x and v).
_halves = functools.partial(CouplingRow, branches=2, reads=(1, 2), writes=(1, 2), split=2)
_twice = functools.partial(CouplingRow, reads=(1, 1), writes=(1, 1), split=1)
_f = residual_branch
ROWS: dict[str, CouplingRow] = {
    "additive": _halves(reversible_block(_f, _f), note="RevNet: halves update each other"),
    "leapfrog": _twice(
        # 2 h = 1, so that updates are as large as in the additive row.
        reversible_block(_f, _f, coupling=leapfrog(0.5)),
        branches=2,
        reads_out=1,
        note="streams are x[n-1], x[n], both the stem's at first; 2h = 1",
    ),
    "affine": _halves(
        reversible_block(scale_and_shift, scale_and_shift, coupling=affine()),
        writes=(1, 1),
        note="a branch writes scale and shift; scales start at 1",
    ),
    "momentum": _twice(
        momentum_block(_f),
        branches=1,
        at_rest=True,
        note="streams are x and a velocity, 0 at first; gamma 0.9",
    ),
    "bdia": _twice(
        bdia_block(_f, _f),
        branches=2,
        reads_out=1,
        note="streams are x[n-1], x[n]; gamma +-1/2 in training, 0 in evaluation",
    ),
    "symplectic": _halves(
        symplectic_block(energy, energy, step=0.5),
        # What is written comes through the transposed kernel, so writing costs no weights.
        writes=(0, 1),
        energy=True,
        note="a branch is an energy's gradient: one kernel, used twice; h = 1/2",
    ),
    "three_streams": CouplingRow(
        multi_stream_block((_f,) * 3),
        branches=3,
        reads=(2, 3),
        writes=(1, 3),
        split=3,
        note="a third reads the two others",
    ),
    "round_robin": CouplingRow(
        multi_stream_block((_f,) * 3, reads="next"),
        branches=3,
        reads=(1, 3),
        writes=(1, 3),
        split=3,
        note="a third reads the next",
    ),
    "residual": CouplingRow(
        PlainLayer(_residual),
        branches=1,
        reads=(1, 1),
        writes=(1, 1),
        split=1,
        note="baseline: one stream, trained with store",
    ),
}


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not a row, and for an empty list."""
    for name in names:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(ROWS)}"
            raise UserError(f"got unknown coupling {name!r}: {hint}")
    if not names:
        raise UserError(f"got no couplings, expected some of {', '.join(ROWS)}")
