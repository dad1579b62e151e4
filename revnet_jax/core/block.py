"""A layer as half-steps: forward, inverse, and rewind (undo and differentiate at once)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from revnet_jax.core import trees
from revnet_jax.core.constants import is_whole
from revnet_jax.core.couplings import Coupling
from revnet_jax.core.evaluate import evaluate, isolated_derivative
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

    def forward(self, params: Any, x: Streams, context: Context) -> Forward | tuple:
        """Streams in, (streams, auxiliary outputs, residue) out: see `Forward`.

        residue: what an inverse needs besides the streams, packed as small as can be; None where
          it needs nothing, or there is none.
        """
        ...


class Forward(NamedTuple):
    """What `forward` returns; of a layer of one's own, the first three will do.

    checksum: int32, of all that its branches computed (see `evaluate`).
    """

    y: Streams
    aux: Any
    residue: Any
    checksum: Any = 0


class Rewound(NamedTuple):
    """What `rewind` returns: the layer's input, and the cotangents of everything that went in.

    dparams and dshared hold None for leaves that are not floating point.
    checksum: as the forward pass's, and equal to it where the rewind computed the same.
    """

    x: Streams
    dx: Streams
    dparams: Any
    dshared: Any
    checksum: Any = 0


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


def check_branch(branch: Any, num_reads: int) -> None:
    """Raises TypeError unless it can be called with parameters, what it reads and a context."""
    expected = f"(params, {', '.join(['stream'] * num_reads)}, context)"
    if not callable(branch):
        raise TypeError(f"got {branch!r} as a branch, expected a function of {expected}")
    try:
        # As it is: what a wrapper wraps may take other arguments.
        signature = inspect.signature(branch, follow_wrapped=False)
    except (TypeError, ValueError):  # not all that is written in C has one
        return
    try:
        signature.bind(*range(num_reads + 2))
    except TypeError as error:
        name = getattr(branch, "__name__", type(branch).__name__)
        raise TypeError(
            f"got a branch {name}{signature}, expected one of {expected}: one stream for each that "
            "it reads"
        ) from error


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
        is_index = lambda i: is_whole(i) and i >= 0
        are_indices = isinstance(self.reads, tuple) and all(map(is_index, self.reads))
        if not are_indices or not is_index(self.updates):
            raise ValueError(
                f"got a half-step that updates {self.updates!r} and reads {self.reads!r}, expected "
                "the index of a stream, counted from 0, and a tuple of indices"
            )
        if self.updates in self.reads:
            raise ValueError(
                f"a half-step updates stream {self.updates} and reads {self.reads}, expected it "
                "not to read the stream it updates: it could not be evaluated again to undo itself"
            )
        check_branch(self.branch, len(self.reads))

    def evaluate(self, params: Any, streams: Sequence[Any], context: Context) -> tuple:
        """(u, aux, streams, checksum) of its branch.

        streams: as they were. To be used from here on, so that their cotangents are added up within
          the branch's derivative: see `evaluate`.
        """

        def branch(params, reads, context):
            returned = self.branch(params, *reads, context)
            pair = trees.pair(returned, "a branch with has_aux=True", "(u, aux)")
            trees.check_arrays(pair, "a branch")
            return pair

        reads = tuple(streams[i] for i in self.reads)
        (u, aux), reads, checksum = evaluate(branch, params, reads, context)
        streams = list(streams)
        for i, stream in zip(self.reads, reads, strict=True):
            streams[i] = stream
        return u, aux, streams, checksum

    def merge(self, x: Any, u: Any, grid: Grid | None) -> tuple[Any, Any]:
        """(y, residue) of its coupling."""

        def merge(x, u):
            return trees.pair(self.coupling.merge(x, u, grid), "a coupling's merge", "(y, residue)")

        return isolated_derivative(merge, x, u)


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

    def forward(self, params: Any, x: Streams, context: Context) -> Forward:
        """x -> (y, aux, residue, ...), the last two by half-step. Evaluates each branch once."""
        streams, aux, residue, checksum = list(x), [], [], jnp.int32(0)
        for step, step_params in zip(self.half_steps, params, strict=True):
            u, step_aux, streams, step_checksum = step.evaluate(step_params, streams, context)
            i = step.updates
            streams[i], step_residue = step.merge(streams[i], u, self.grid)
            aux.append(step_aux)
            residue.append(step_residue)
            checksum += step_checksum
        return Forward(tuple(streams), tuple(aux), tuple(residue), checksum)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """y -> x. Each branch is evaluated once; bit for bit while the grid's range holds.

        residue: may be None where no coupling leaves one.
        """
        streams = list(y)
        residue = (None,) * len(self.half_steps) if residue is None else residue
        steps = zip(self.half_steps, params, residue, strict=True)
        for step, step_params, step_residue in reversed(list(steps)):
            u, *_ = step.evaluate(step_params, streams, context)
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
        checksum = jnp.int32(0)
        steps = zip(self.half_steps, params, daux, residue, strict=True)
        for step, step_params, step_daux, step_residue in reversed(list(steps)):
            step_params, params_rest = trees.split(step_params)

            def branch(params, streams, shared, step=step, params_rest=params_rest):
                full_context = context._replace(shared=trees.join(shared, shared_rest))
                params = trees.join(params, params_rest)
                u, aux, streams, checksum = step.evaluate(params, streams, full_context)
                return (u, trees.split(aux)[0], streams), checksum

            (u, *_), pullback, step_checksum = jax.vjp(
                branch, step_params, streams, shared, has_aux=True
            )
            i = step.updates
            streams[i] = step.coupling.unmerge(streams[i], u, step_residue, self.grid)
            merge = lambda x, u, step=step: step.merge(x, u, self.grid)
            _, pullback_merge, _ = jax.vjp(merge, streams[i], u, has_aux=True)
            dstreams[i], du = pullback_merge(dstreams[i])
            step_dparams, dstreams, step_dshared = pullback((du, step_daux, dstreams))
            dparams.append(step_dparams)
            dshared = trees.add(dshared, step_dshared)
            checksum += step_checksum
        return Rewound(tuple(streams), tuple(dstreams), tuple(reversed(dparams)), dshared, checksum)


def differentiate(
    forward: Callable[..., Forward | tuple[Streams, Any, Any]],
    params: Any,
    x: Streams,
    context: Context,
) -> tuple[Forward, Callable]:
    """(what a layer's `forward` returns, pullback); the pullback is `jax.vjp`'s.

    pullback: `(dy, daux) -> (dparams, dx, dshared)`, None at leaves that are not floating point.
    """
    params, params_rest = trees.split(params)
    shared, shared_rest = trees.split(context.shared)

    def floats_to_floats(params, x, shared):
        full_context = context._replace(shared=trees.join(shared, shared_rest))
        found = Forward(*forward(trees.join(params, params_rest), x, full_context))
        aux, aux_rest = trees.split(found.aux)
        return (found.y, aux), (aux_rest, found.residue, found.checksum)

    (y, aux), pullback, (aux_rest, *others) = jax.vjp(
        floats_to_floats, params, x, shared, has_aux=True
    )
    return Forward(y, trees.join(aux, aux_rest), *others), pullback


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

    def forward(self, params: Any, x: Streams, context: Context) -> Forward:
        """x -> (y, aux, None, ...)."""

        def apply(params, x, context):
            y = self.apply(params, x, context)
            return y if self.has_aux else (y, None)

        (y, aux), _, checksum = evaluate(apply, params, x, context)
        return Forward(y, aux, None, checksum)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """y -> x."""
        return self.undo(params, y, context)

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """(y, dy) -> x and all cotangents."""
        x = self.undo(params, y, context)
        found, pullback = differentiate(self.forward, params, x, context)
        dparams, dx, dshared = pullback((dy, daux))
        return Rewound(x, dx, dparams, dshared, found.checksum)


@dataclass(frozen=True)
class PlainLayer:
    """A layer that cannot be inverted, for chains under `store` or `remat`.

    apply: `(params, x, context) -> (y, aux)`, with x and y tuples of streams.
    """

    apply: Callable[[Any, Streams, Context], tuple[Streams, Any]]

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """x -> (y, aux, None)."""
        return *self.apply(params, x, context), None
