"""How a half-step merges its update into a stream, and takes it out again.

| coupling | y =                          | residue, bits per element |
|----------|------------------------------|---------------------------|
| additive | x + scale * u                | none                      |
| leapfrog | x + 2 h u                    | none                      |
| affine   | x * bound**tanh(u[0]) + u[1] | 1                         |
| momentum | gamma * x + (1 - gamma) * u  | 1                         |
| bdia     | gamma * x + u                | 1, or as many as asked    |
| scaled   | scale * x + u                | log2(1 / scale), upwards  |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from revnet_jax.core import trees
from revnet_jax.core.constants import constant, is_whole
from revnet_jax.core.grid import Grid, snap
from revnet_jax.core.isolate import isolate
from revnet_jax.core.scaling import SCALE_BITS, divide, multiply


def _zeros(u: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if trees.is_inexact(leaf) else leaf, u)


class Coupling(NamedTuple):
    """Two pure functions: `y, residue = merge(x, u, grid)` and `x = unmerge(y, u, residue, grid)`.

    - x, y: the stream before and after the update (a tree of arrays).
    - u: what the branch returned, in the form that the coupling expects.
    - grid: the grid that streams are kept on, or None for ordinary floats.
    - residue: the information about x that y and u do not determine, in as few bytes as possible;
      None if they determine x. Under `reverse` the residue is the only thing stored per layer.
    - idle: `idle(u)` is u with an update of zero, by which `Exactness.lost_updates` tells whether
      the grid has rounded u to nothing. What else u holds (as bdia's gamma) it returns as it is.

    JAX differentiates both, so no gradient is written by hand: merge in every backward pass,
    unmerge in second derivatives and in the derivatives of an inverse.
    """

    merge: Callable[[Any, Any, Grid | None], tuple[Any, Any]]
    unmerge: Callable[[Any, Any, Any, Grid | None], Any]
    idle: Callable[[Any], Any] = _zeros


def additive(scale: float = 1.0) -> Coupling:
    """`y = x + scale * u`, the coupling of NICE and RevNet.

    Dinh et al. 2014 (arXiv:1410.8516), Gomez et al. 2017 (arXiv:1707.04585, eq. 6).

    The update u has the stream's structure and shapes, in any floating dtype. Exact on a grid.
    """
    scale = constant("scale", scale)

    def update(u, x, grid):
        u = like_stream(u, x)
        # Cast before scaling, to round in the stream's precision. Snapped last, because what is
        # added has to be on the grid.
        return snap(grid, u if scale == 1 else jax.tree.map(lambda leaf: scale * leaf, u))

    def merge(x, u, grid):
        return trees.add(x, update(u, x, grid)), None

    def unmerge(y, u, residue, grid):
        # y takes the place of x in `update`, which looks at structure, shapes and dtypes alone.
        return jax.tree.map(jnp.subtract, y, update(u, y, grid))

    return Coupling(merge, unmerge)


def leapfrog(step: float) -> Coupling:
    """`x[n+1] = x[n-1] + 2 h f(x[n])`, the leapfrog or explicit midpoint rule for dx/dt = f(x).

    Chang et al. 2018 (arXiv:1709.03698) call it the midpoint network. The streams of a
    two-stream block are x[n-1] and x[n], so one layer advances time by 2 h.

    Args:
      step: h.

    The update u is as for `additive`. Exact on a grid.
    """
    return additive(2 * constant("step", step))


def affine(bound: float = 2.0) -> Coupling:
    """`y = x * s + t`, with `s = bound ** tanh(u[0])` and `t = u[1]`.

    RealNVP (Dinh et al. 2016, arXiv:1605.08803) with a scale that is bounded on both sides.

    Args:
      bound: largest scale, in (1, 2]; the smallest is 1 / bound.

    The update u is a pair, each with the stream's structure and shapes, in any floating dtype.

    Exact on a grid with a residue of one bit per element: scales are rounded to multiples of
    2**-12. x * s must be in the grid's range too, which scales above 1 may leave after many
    layers. Without a grid each layer loses about one ulp, and the inverse multiplies that error
    by up to `bound` per layer.
    """
    bound = constant("bound", bound)
    # A scale below 1/2 would map more than two grid points to one: too many for one bit.
    if not 1 < bound <= 2:
        raise ValueError(f"got bound={bound}, expected more than 1 and at most 2")

    def scale_and_shift(x, u, grid):
        if not isinstance(u, tuple) or len(u) != 2:
            raise ValueError(
                f"a branch returned a {type(u).__name__}, expected a pair (raw scale, shift): an "
                "affine update needs both"
            )
        raw, shift = like_stream(u[0], x), like_stream(u[1], x)
        # Isolated, so that the forward pass and the inverse compute the same bits.
        exponential = lambda leaf: jnp.exp2(math.log2(bound) * jnp.tanh(leaf))
        scale = isolate(lambda raw: jax.tree.map(exponential, raw), raw)
        # Scales have a grid of their own, the multiples of 2**-12 that `multiply` takes.
        return (scale if grid is None else Grid(SCALE_BITS).snap(scale)), snap(grid, shift)

    def merge(x, u, grid):
        scale, shift = scale_and_shift(x, u, grid)
        y, residue = _multiply(x, scale, grid)
        return trees.add(y, shift), residue

    def unmerge(y, u, residue, grid):
        scale, shift = scale_and_shift(y, u, grid)
        return _divide(jax.tree.map(jnp.subtract, y, shift), residue, scale, grid)

    return Coupling(merge, unmerge)


def momentum(gamma: float = 0.9) -> Coupling:
    """`v' = gamma * v + (1 - gamma) * u`, the velocity update of a Momentum ResNet's layer.

    Sander et al. 2021 (arXiv:2102.07870); `momentum_block` builds the whole layer.

    Args:
      gamma: in [1/2, 1), rounded to a multiple of 2**-12.

    The update u is as for `additive`.

    Exact on a grid with a residue of one bit per element. The information lost is only
    log2(1 / gamma) bits (0.15 at gamma = 0.9). Without a grid, undoing a layer divides the
    rounding error by gamma.
    """
    gamma = constant("gamma", gamma)
    # gamma and 1 - gamma are both exact then, and add up to 1. The rounded value is checked:
    # 0.99999 becomes 1, with which v would never change.
    rounded = _rounded(gamma)
    if not 0.5 <= rounded < 1:
        raise ValueError(f"got gamma={gamma}, expected at least 0.5 and less than 1")
    gamma, push = rounded, additive(1 - rounded)

    def merge(x, u, grid):
        y, residue = _multiply(x, _full(x, gamma), grid)
        return push.merge(y, u, grid)[0], residue

    def unmerge(y, u, residue, grid):
        return _divide(push.unmerge(y, u, None, grid), residue, _full(y, gamma), grid)

    return Coupling(merge, unmerge)


def bdia(bits: int = 1) -> Coupling:
    """`y = gamma * x + u`, gamma = +-1/2 drawn per example and layer (see `bdia_block`).

    Bidirectional integration approximation, Zhang et al. 2024 (arXiv:2407.09093).

    Args:
      bits: of the residue, per element. The size of gamma is at least 2**-bits, and at most 1.

    The update u is a pair (gamma, update). gamma broadcasts to every leaf of the stream; 0, for
    inference, has no inverse. update is as for `additive`.

    Exact on a grid: x is multiplied `bits` times by the same factor of at least 1/2, rounded to a
    multiple of 2**-12, and each product leaves one bit (for 1/2: whether x is an odd grid point).
    """
    add = additive()
    # A float32 stream has 24 digits on its grid. Halved 24 times it has none left.
    if not is_whole(bits) or not 1 <= bits <= 24:
        raise ValueError(f"got bits={bits!r}, expected a whole number from 1 to 24")

    def factor(gamma, x, grid):
        """What x is multiplied by `bits` times."""
        # `multiply` takes positive scales. The sign is applied to the stream by itself, exactly.
        size = jnp.abs(gamma)
        if bits > 1:  # isolated, so that the forward pass and the inverse compute the same bits
            size = isolate(lambda size: size ** (1 / bits), size)
        return _full(x, size if grid is None else Grid(SCALE_BITS).snap(size))

    def signed(x, gamma):
        return jax.tree.map(lambda leaf: leaf * jnp.sign(gamma).astype(leaf.dtype), x)

    def gamma_and_update(u, x):
        gamma, update = trees.pair(u, "a branch", "(gamma, update)")
        check_gamma(gamma, x)
        return gamma, update

    def merge(x, u, grid):
        gamma, update = gamma_and_update(u, x)
        x, residues = _multiply_often(x, factor(gamma, x, grid), bits, grid)
        return add.merge(signed(x, gamma), update, grid)[0], residues

    def unmerge(y, u, residue, grid):
        gamma, update = gamma_and_update(u, y)
        x = signed(add.unmerge(y, update, None, grid), gamma)
        return _divide_often(x, residue, factor(gamma, x, grid), bits, grid)

    return Coupling(merge, unmerge, lambda u: (u[0], _zeros(u[1])))


def scaled(scale: float) -> Coupling:
    """`y = scale * x + u`, the coupling of reversible adapters (see `meft_block`).

    Liao et al. 2023 (arXiv:2306.00477).

    Args:
      scale: in [2**-24, 1]. At 1 this is `additive`.

    The update u is as for `additive`.

    Exact on a grid with a residue of b = log2(1 / scale) bits per element, rounded up: x is
    multiplied b times by the b-th root of the scale, rounded to a multiple of 2**-12. What x is
    multiplied by, `scale_on_grid`, then has a relative error of at most about b * 2**-12: 0.1
    becomes 0.09994, 1e-4 becomes 1.0032e-4, and 0.9999 becomes 1, though its bit is kept. Without
    a grid the scale is not rounded, and undoing a layer divides the rounding error by it.
    """
    scale, add = constant("scale", scale), additive()
    bits = _bits_of(scale)
    root = scale ** (1 / max(1, bits))

    def factor(x, grid):
        return _full(x, root if grid is None else _rounded(root))

    def merge(x, u, grid):
        x, residues = _multiply_often(x, factor(x, grid), bits, grid)
        return add.merge(x, u, grid)[0], residues or None

    def unmerge(y, u, residue, grid):
        x = add.unmerge(y, u, None, grid)
        return _divide_often(x, residue, factor(x, grid), bits, grid)

    return Coupling(merge, unmerge)


def scale_on_grid(scale: float, grid: Grid | None) -> float:
    """What `scaled(scale)` multiplies by: on a grid, a power of a factor that is rounded."""
    bits = _bits_of(constant("scale", scale))
    return scale if grid is None else _rounded(scale ** (1 / max(1, bits))) ** bits


def _bits_of(scale):
    """The bits of the residue of `scaled`; raises ValueError for a scale that it does not take."""
    if not 2**-24 <= scale <= 1:
        raise ValueError(f"got scale={scale}, expected at least 2**-24 and at most 1")
    return math.ceil(-math.log2(scale))


def _rounded(factor):
    """The nearest of the factors that `multiply` takes on a grid."""
    return round(factor * 2**SCALE_BITS) / 2**SCALE_BITS


def check_gamma(gamma: Any, x: Any) -> None:
    """Raises ValueError unless gamma broadcasts to every leaf of the stream."""
    for leaf in jax.tree.leaves(x):
        # Shapes broadcast from the last axis on. More axes than the stream's would widen the
        # stream.
        pairs = zip(reversed(jnp.shape(gamma)), reversed(leaf.shape), strict=False)
        if jnp.ndim(gamma) > leaf.ndim or any(a not in (1, b) for a, b in pairs):
            raise ValueError(
                f"got gamma {trees.describe_array(gamma)}, expected a shape that broadcasts to a "
                f"stream {trees.describe_array(leaf)}: one for each example, [B, 1, ...]"
            )


def _multiply(x: Any, scale: Any, grid: Grid | None) -> tuple[Any, Any]:
    leaves, treedef = jax.tree.flatten(x)
    pairs = [multiply(*args, grid) for args in zip(leaves, jax.tree.leaves(scale), strict=True)]
    return treedef.unflatten([y for y, _ in pairs]), tuple(residue for _, residue in pairs)


def _divide(y: Any, residue: Any, scale: Any, grid: Grid | None) -> Any:
    if residue is None and grid is not None:
        raise ValueError(
            "got no residue, expected the one of the forward pass: this coupling multiplies, "
            "and cannot be undone without it. Take it from `sequence_forward`; for a y that no "
            "forward pass made, as in sampling from a flow, build the block with grid=None"
        )
    leaves, treedef = jax.tree.flatten(y)
    residue = (None,) * len(leaves) if residue is None else residue
    args = zip(leaves, residue, jax.tree.leaves(scale), strict=True)
    return treedef.unflatten([divide(*leaf_args, grid) for leaf_args in args])


def _multiply_often(x: Any, scale: Any, times: int, grid: Grid | None) -> tuple[Any, Any]:
    """Multiplies `times` times by the same scale: (y, a tuple of the residues)."""
    residues = []
    for _ in range(times):
        x, residue = _multiply(x, scale, grid)
        residues.append(residue)
    return x, tuple(residues)


def _divide_often(y: Any, residue: Any, scale: Any, times: int, grid: Grid | None) -> Any:
    """Undoes `_multiply_often`."""
    # The last product is undone first, with the bit that it left.
    for each in reversed([None] * times if residue is None else residue):
        y = _divide(y, each, scale, grid)
    return y


def _full(x: Any, value: Any) -> Any:
    """`value`, cast and broadcast to every leaf of x."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(value, leaf.shape).astype(leaf.dtype), x)


def like_stream(u: Any, x: Any) -> Any:
    """Casts `u` to the stream's dtypes; raises ValueError if its structure or shapes differ."""
    got = [trees.describe_array(leaf) for leaf in jax.tree.leaves(u)]
    expected = [trees.describe_array(leaf) for leaf in jax.tree.leaves(x)]
    same_shapes = [jnp.shape(a) for a in jax.tree.leaves(u)] == [
        jnp.shape(b) for b in jax.tree.leaves(x)
    ]
    if isinstance(u, tuple) and not isinstance(x, tuple):
        raise ValueError(
            f"a branch returned a tuple of {len(u)}, expected an update like the stream it "
            f"updates, {', '.join(expected)}: where it returns (u, aux), say has_aux=True"
        )
    if jax.tree.structure(u) != jax.tree.structure(x) or not same_shapes:
        raise ValueError(
            f"a branch returned {', '.join(got) or type(u).__name__}, expected the shape of the "
            f"stream it updates, {', '.join(expected)}: an update changes no shape"
        )
    # The cast below would drop imaginary parts without an error.
    if any(map(_drops_imaginary, jax.tree.leaves(u), jax.tree.leaves(x))):
        raise ValueError(
            f"a branch returned {', '.join(got)}, expected real numbers for a stream of them, "
            f"{', '.join(expected)}: take their real part, or their size"
        )
    # A branch may compute in bfloat16; sums on the grid need all digits of the stream.
    return jax.tree.map(lambda a, b: a.astype(trees.dtype_of(b)), u, x)


def _drops_imaginary(u, x):
    is_complex = lambda leaf: jnp.issubdtype(trees.dtype_of(leaf), jnp.complexfloating)
    return is_complex(u) and not is_complex(x)
