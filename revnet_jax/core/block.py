"""A layer as half-steps: forward, inverse, and rewind (undo and differentiate at once)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.core import trees
from revnet_jax.core.couplings import Coupling
from revnet_jax.core.grid import Grid

Streams = tuple[Any, ...]  # one tree of arrays per stream


class Context(NamedTuple):
    """What a branch sees besides its parameters and the streams.

    shared: side inputs that every layer sees; differentiated, cotangents summed over layers.
    data: this layer's own slice (PRNG keys, running statistics, rates); not differentiated.
    """

    shared: Any = None
    data: Any = None


class Layer(Protocol):
    """What a chain needs to run layers forward: all that `store` and `remat` ask for."""

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """Streams in, (streams, auxiliary outputs, residue) out.

        residue: what an inverse needs besides the streams, packed as small as can be; None where
          it needs nothing, or there is none.
        """
        ...


class Rewound(NamedTuple):
    """What `rewind` returns: the layer's input, and the cotangents of everything that went in.

    dparams and dshared hold None for leaves that are not floating point.
    """

    x: Streams
    dx: Streams
    dparams: Any
    dshared: Any


@runtime_checkable
class ReversibleLayer(Layer, Protocol):
    """What `reverse` needs besides: `Block` has it, and `Invertible`, and whoever writes both."""

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """y -> x, given the residue of the forward pass."""
        ...

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """(y, dy) -> x and all cotangents.

        daux: cotangents of the auxiliary outputs, None at leaves that are not floating point.
        """
        ...


@dataclass(frozen=True)
class HalfStep:
    """Updates one stream from others: `u = branch(params, *reads, context)`, then merge.

    branch: a pure function `(params, *streams read, context) -> (u, auxiliary outputs)`. It must
      give the same bits when evaluated again on the same bits: take randomness from
      `context.data`. What it returns besides `u` may be any tree; floating-point leaves are
      differentiated.
    updates: index of the stream that is updated.
    reads: indices of the streams the branch sees; never the one that is updated.
    """

    branch: Callable[..., tuple[Any, Any]]
    updates: int
    reads: tuple[int, ...]
    coupling: Coupling

    def __post_init__(self):
        if not isinstance(self.coupling, Coupling):
            raise TypeError(
                f"got coupling={self.coupling!r}, expected a Coupling: what `affine()` returns, "
                "rather than `affine`"
            )
        if self.updates in self.reads:
            raise ValueError(
                f"a half-step updates stream {self.updates} and reads {self.reads}, expected it "
                "not to read the stream it updates: it could not be evaluated again to undo itself"
            )


@dataclass(frozen=True)
class Block:
    """A reversible layer: half-steps in order; `params` is a tuple with a tree for each of them.

    Auxiliary outputs are a tuple likewise. `grid=None` switches exact streams off.
    """

    half_steps: tuple[HalfStep, ...]
    grid: Grid | None = Grid()

    def __post_init__(self):
        if not self.half_steps:
            raise ValueError("got a block of no half-steps, expected at least one")
        if not isinstance(self.grid, Grid | None):
            raise TypeError(f"got grid={self.grid!r}, expected Grid(bits), or None for free floats")

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """x -> (y, aux, residue). Each branch is evaluated once; a residue for each half-step."""
        streams, aux, residue = list(x), [], []
        for step, step_params in zip(self.half_steps, params, strict=True):
            # The barrier changes nothing here. Where JAX differentiates this (`store`, `remat`), a
            # branch's cotangents are summed before they join the stream's, in the order of
            # `rewind`: so all strategies round alike, and give the same gradient bit for bit.
            reads = lax.optimization_barrier(tuple(streams[i] for i in step.reads))
            returned = step.branch(step_params, *reads, context)
            u, step_aux = trees.pair(returned, "a branch with has_aux=True", "(u, aux)")
            i = step.updates
            merged = step.coupling.merge(streams[i], u, self.grid)
            streams[i], step_residue = trees.pair(merged, "a coupling's merge", "(y, residue)")
            aux.append(step_aux)
            residue.append(step_residue)
        return tuple(streams), tuple(aux), tuple(residue)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """y -> x. Each branch is evaluated once; bit for bit while the grid's range holds.

        residue: may be None where no coupling leaves one.
        """
        streams = list(y)
        residue = (None,) * len(self.half_steps) if residue is None else residue
        steps = zip(self.half_steps, params, residue, strict=True)
        for step, step_params, step_residue in reversed(list(steps)):
            u, _ = step.branch(step_params, *(streams[i] for i in step.reads), context)
            i = step.updates
            streams[i] = step.coupling.unmerge(streams[i], u, step_residue, self.grid)
        return tuple(streams)

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """(y, dy) -> x and all cotangents, with a single evaluation of each branch.

        The evaluation that differentiates a branch also yields the update that undoes it, so the
        cost is one recompute and one backward pass: 4/3 of a training step that stores, not 5/3.
        """
        streams, dstreams = list(y), list(dy)
        shared, shared_rest = trees.split(context.shared)
        dparams, dshared = [], jax.tree.map(jnp.zeros_like, shared)
        steps = zip(self.half_steps, params, daux, residue, strict=True)
        for step, step_params, step_daux, step_residue in reversed(list(steps)):
            step_params, params_rest = trees.split(step_params)

            def branch(params, reads, shared, step=step, params_rest=params_rest):
                full_context = context._replace(shared=trees.join(shared, shared_rest))
                u, aux = step.branch(trees.join(params, params_rest), *reads, full_context)
                return u, trees.split(aux)[0]

            reads = tuple(streams[i] for i in step.reads)
            (u, _), pullback = jax.vjp(branch, step_params, reads, shared)
            i = step.updates
            streams[i] = step.coupling.unmerge(streams[i], u, step_residue, self.grid)
            merge = lambda x, u, step=step: step.coupling.merge(x, u, self.grid)
            _, pullback_merge, _ = jax.vjp(merge, streams[i], u, has_aux=True)
            dstreams[i], du = pullback_merge(dstreams[i])
            step_dparams, dreads, step_dshared = pullback((du, step_daux))
            for j, dread in zip(step.reads, dreads, strict=True):
                dstreams[j] = trees.add(dstreams[j], dread)
            dparams.append(step_dparams)
            dshared = trees.add(dshared, step_dshared)
        return Rewound(tuple(streams), tuple(dstreams), tuple(reversed(dparams)), dshared)


def differentiate(
    forward: Callable[..., tuple[Streams, Any, Any]], params: Any, x: Streams, context: Context
) -> tuple[Streams, Any, Callable]:
    """(y, aux, pullback) of a layer's `forward`; the pullback is `jax.vjp`'s.

    pullback: `(dy, daux) -> (dparams, dx, dshared)`, None at leaves that are not floating point.
    """
    params, params_rest = trees.split(params)
    shared, shared_rest = trees.split(context.shared)

    def floats_to_floats(params, x, shared):
        full_context = context._replace(shared=trees.join(shared, shared_rest))
        y, aux, _ = forward(trees.join(params, params_rest), x, full_context)
        aux, aux_rest = trees.split(aux)
        return (y, aux), aux_rest

    (y, aux), pullback, aux_rest = jax.vjp(floats_to_floats, params, x, shared, has_aux=True)
    return y, trees.join(aux, aux_rest), pullback


@dataclass(frozen=True)
class Invertible:
    """A reversible layer from its function and its inverse, for what half-steps do not express.

    apply: `(params, x, context) -> y`, or `-> (y, aux)` where `has_aux`; x and y are tuples of
      streams, whose shapes may differ in a layer that stands alone (see `sequence`).
    undo: `(params, y, context) -> x`. As exact as it is written: a permutation is, and keeps
      streams on their grid; a matrix and its inverse are not, and leave it.

    Cost of `rewind`: one `undo`, then one evaluation and one backward pass of `apply`.
    """

    apply: Callable[[Any, Streams, Context], Any]
    undo: Callable[[Any, Streams, Context], Streams]
    has_aux: bool = False

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """x -> (y, aux, None)."""
        if self.has_aux:
            return *self.apply(params, x, context), None
        return self.apply(params, x, context), None, None

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """y -> x."""
        return self.undo(params, y, context)

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """(y, dy) -> x and all cotangents."""
        x = self.undo(params, y, context)
        *_, pullback = differentiate(self.forward, params, x, context)
        dparams, dx, dshared = pullback((dy, daux))
        return Rewound(x, dx, dparams, dshared)


@dataclass(frozen=True)
class PlainLayer:
    """A layer that cannot be inverted, for chains under `store` or `remat`.

    apply: `(params, x, context) -> (y, aux)`, with x and y tuples of streams.
    """

    apply: Callable[[Any, Streams, Context], tuple[Streams, Any]]

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """x -> (y, aux, None)."""
        return *self.apply(params, x, context), None
