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
from revnet_jax.core.evaluate import evaluate_branch, isolated_derivative
from revnet_jax.core.grid import Grid
from revnet_jax.core.resolution import a_few, count_updates

Streams = tuple[Any, ...]  # one tree of arrays per stream


class Context(NamedTuple):
    """The inputs of a branch other than its parameters and the streams.

    Attributes:
      shared: side inputs that every layer sees. Differentiated; their cotangents are summed over
        layers.
      data: this layer's slice of the per-layer data (PRNG keys, running statistics, rates). Not
        differentiated.
    """

    shared: Any = None
    data: Any = None


class Layer(Protocol):
    """What a chain needs from a layer under `store` and `remat`: a forward pass."""

    def forward(self, params: Any, x: Streams, context: Context) -> Forward | tuple:
        """Maps streams to (streams, auxiliary outputs, residue): see `Forward`.

        residue: what the inverse needs besides the output streams, packed as tightly as possible;
          None if it needs nothing more, or if the layer has no inverse.
        """
        ...


class Forward(NamedTuple):
    """The result of `forward`. A custom layer may return a tuple of the first three fields.

    Attributes:
      checksum: int32, over everything that the layer's branches computed (see `evaluate_branch`).
    """

    y: Streams
    aux: Any
    residue: Any
    checksum: Any = 0


class Rewound(NamedTuple):
    """The result of `rewind`: the layer's input, and the cotangents of all that entered it.

    dparams and dshared hold None for leaves that are not floating point.
    checksum: like the forward pass's, and equal to it if the rewind computed the same bits.
    updates, lost_updates: int32, see `Exactness`.
    """

    x: Streams
    dx: Streams
    dparams: Any
    dshared: Any
    checksum: Any = 0
    updates: Any = 0
    lost_updates: Any = 0


# So that `validate.check_invertible` can ask by isinstance whether a layer has the methods.
@runtime_checkable
class ReversibleLayer(Layer, Protocol):
    """A layer that `reverse` can use: `Block`, `Invertible`, or any class with these methods."""

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """Computes x from y, given the residue of the forward pass."""
        ...

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """Computes x and all cotangents from (y, dy).

        Args:
          daux: cotangents of the auxiliary outputs, None at leaves that are not floating point.
        """
        ...


def check_branch(branch: Any, num_reads: int) -> None:
    """Raises TypeError unless `branch(params, *streams read, context)` is a valid call."""
    expected = f"(params, {', '.join(['stream'] * num_reads)}, context)"
    if not callable(branch):
        raise TypeError(f"got {branch!r} as a branch, expected a function of {expected}")
    try:
        # Not following __wrapped__: a wrapped function may take other arguments than its wrapper.
        signature = inspect.signature(branch, follow_wrapped=False)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    try:
        # Any values will do, because only the number of arguments is tried.
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

    Attributes:
      branch: a pure function `(params, *streams read, context) -> (u, auxiliary outputs)`. It must
        return the same bits when it is evaluated again on the same bits, so it takes randomness
        from keys in `context.data`. The auxiliary outputs may be any tree; their floating-point
        leaves are differentiated.
      updates: index of the stream that is updated.
      reads: indices of the streams that the branch sees; never the updated stream.
      coupling: how `u` is merged into the stream, and removed from it again.
      keep_operands: see `keeping_operands`.
    """

    branch: Callable[..., tuple[Any, Any]]
    updates: int
    reads: tuple[int, ...]
    coupling: Coupling
    keep_operands: bool = False

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
        """Evaluates the branch: (u, aux, streams, checksum).

        The returned streams have the values of the given ones. Later code must use the returned
        ones, so that their cotangents are summed inside the branch's derivative: see
        `evaluate_branch`.
        """

        def branch(params, reads, context):
            returned = self.branch(params, *reads, context)
            pair = trees.pair(returned, "a branch with has_aux=True", "(u, aux)")
            trees.check_arrays(pair, "a branch")
            return pair

        reads = tuple(streams[i] for i in self.reads)
        (u, aux), reads, checksum = evaluate_branch(
            branch, params, reads, context, keep_operands=self.keep_operands
        )
        streams = list(streams)
        for i, stream in zip(self.reads, reads, strict=True):
            streams[i] = stream
        return u, aux, streams, checksum

    def merge(self, x: Any, u: Any, grid: Grid | None) -> tuple[Any, Any]:
        """Merges u into x by the coupling: (y, residue)."""

        def merge(x, u):
            return trees.pair(self.coupling.merge(x, u, grid), "a coupling's merge", "(y, residue)")

        # Elementwise and, on a grid, exact, so it may be fused with its neighbours. Its derivative
        # is isolated, so that `store` and the rewind round it alike.
        return isolated_derivative(merge, x, u)


@dataclass(frozen=True)
class Block:
    """A reversible layer: half-steps in order; `params` is a tuple with one tree per half-step.

    Auxiliary outputs are also a tuple with one tree per half-step.
    grid: the grid on which streams are exact; None for ordinary floats, which undo approximately.
    order: the order in which the layer returns its streams after the half-steps, as their indices:
      (1, 0) lets two streams change places. Empty to return them as they are.
    """

    half_steps: tuple[HalfStep, ...]
    grid: Grid | None = Grid()
    order: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.half_steps or not all(isinstance(s, HalfStep) for s in self.half_steps):
            raise ValueError(f"got half-steps {self.half_steps}, expected HalfSteps, at least one")
        if not isinstance(self.grid, Grid | None):
            raise TypeError(f"got grid={self.grid!r}, expected Grid(bits), or None")
        if self.order and sorted(self.order) != list(range(self.num_streams)):
            raise ValueError(
                f"got order={self.order}, expected the indices of the {self.num_streams} streams "
                "in some order, or none"
            )

    @property
    def num_streams(self) -> int:
        """The number of streams that the half-steps read and update."""
        return 1 + max(max((step.updates, *step.reads)) for step in self.half_steps)

    def arranged(self, streams: Sequence[Any]) -> Streams:
        """The streams after the half-steps, in the order in which the layer returns them."""
        return tuple(streams[i] for i in self.order or range(len(streams)))

    def _before_arranging(self, y):
        """Undoes `arranged`, as a list."""
        return [y[self.order.index(i)] for i in range(len(y))] if self.order else list(y)

    def forward(self, params: Any, x: Streams, context: Context) -> Forward:
        """Maps x to (y, aux, residue, ...), evaluating each branch once.

        aux and residue are tuples with one entry per half-step.
        """
        streams, aux, residue, checksum = list(x), [], [], jnp.int32(0)
        for step, step_params in zip(self.half_steps, params, strict=True):
            u, step_aux, streams, step_checksum = step.evaluate(step_params, streams, context)
            i = step.updates
            streams[i], step_residue = step.merge(streams[i], u, self.grid)
            aux.append(step_aux)
            residue.append(step_residue)
            checksum += step_checksum
        return Forward(self.arranged(streams), tuple(aux), tuple(residue), checksum)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """Computes x from y, bit for bit while the streams stay inside the grid's range.

        Evaluates each branch once.
        residue: from the forward pass; may be None if no coupling leaves one.
        """
        streams = self._before_arranging(y)
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
        """Computes x and all cotangents from (y, dy), with a single evaluation of each branch.

        The evaluation that differentiates a branch also returns the update to be undone. So the
        cost is one recompute and one backward pass: 4/3 of a training step that stores, not 5/3.
        """
        streams, dstreams = self._before_arranging(y), self._before_arranging(dy)
        # Only floats have cotangents. Integers and keys bypass the vjp.
        shared, shared_rest = trees.split(context.shared)
        dparams, dshared = [], jax.tree.map(jnp.zeros_like, shared)
        checksum, updates, lost_updates = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        steps = zip(self.half_steps, params, daux, residue, strict=True)
        for step, step_params, step_daux, step_residue in reversed(list(steps)):
            step_params, params_rest = trees.split(step_params)

            # All streams are arguments, not only those that are read: the others pass through, and
            # so the pullback returns the cotangents of all.
            def branch(params, streams, shared, step=step, params_rest=params_rest):
                full_context = context._replace(shared=trees.join(shared, shared_rest))
                params = trees.join(params, params_rest)
                u, aux, streams, checksum = step.evaluate(params, streams, full_context)
                return (u, trees.split(aux)[0], streams), checksum

            # The half-step did not change what its branch reads, so u has the same bits as before.
            (u, *_), pullback, step_checksum = jax.vjp(
                branch, step_params, streams, shared, has_aux=True
            )
            i = step.updates
            counts = count_updates(step.coupling, streams[i], u, self.grid, a_few)
            updates, lost_updates = updates + counts[0], lost_updates + counts[1]
            # x comes first, because the merge is differentiated at x. The merge's value is y once
            # more; nobody reads it, so compilers compute the pullback alone.
            streams[i] = step.coupling.unmerge(streams[i], u, step_residue, self.grid)
            merge = lambda x, u, step=step: step.merge(x, u, self.grid)
            _, pullback_merge, _ = jax.vjp(merge, streams[i], u, has_aux=True)
            dstreams[i], du = pullback_merge(dstreams[i])
            # `dstreams` goes in as well, so that the pullback itself adds the branch's share to it.
            step_dparams, dstreams, step_dshared = pullback((du, step_daux, dstreams))
            dparams.append(step_dparams)
            dshared = trees.add(dshared, step_dshared)
            checksum += step_checksum
        return Rewound(
            tuple(streams),
            tuple(dstreams),
            tuple(reversed(dparams)),
            dshared,
            checksum,
            updates,
            lost_updates,
        )


def differentiate(
    forward: Callable[..., Forward | tuple[Streams, Any, Any]],
    params: Any,
    x: Streams,
    context: Context,
) -> tuple[Forward, Callable]:
    """Runs a layer's `forward` and returns (its result, pullback), like `jax.vjp`.

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
    """A reversible layer from a function and its inverse, for layers that are not half-steps.

    Attributes:
      apply: `(params, x, context) -> y`, or `-> (y, aux)` if `has_aux`; x and y are tuples of
        streams. In a section of one layer their shapes may differ (see `sequence`).
      undo: `(params, y, context) -> x`. It is only as exact as it is written: a permutation is
        exact, and its output stays on the grid; multiplying by a matrix and by its inverse is
        neither.

    Cost of `rewind`: one `undo`, then one evaluation and one backward pass of `apply`.
    """

    apply: Callable[[Any, Streams, Context], Any]
    undo: Callable[[Any, Streams, Context], Streams]
    has_aux: bool = False

    def __post_init__(self):
        check_branch(self.apply, 1)
        check_branch(self.undo, 1)

    def forward(self, params: Any, x: Streams, context: Context) -> Forward:
        """Maps x to (y, aux, None, ...): there is no residue."""

        def apply(*args):
            y = self.apply(*args)
            return trees.pair(y, "apply", "(y, aux)") if self.has_aux else (y, None)

        (y, aux), _, checksum = evaluate_branch(apply, params, x, context)
        return Forward(y, aux, None, checksum)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        """Computes x from y."""
        return self.undo(params, y, context)

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        """Computes x and all cotangents from (y, dy)."""
        x = self.undo(params, y, context)
        found, pullback = differentiate(self.forward, params, x, context)
        dparams, dx, dshared = pullback((dy, daux))
        return Rewound(x, dx, dparams, dshared, found.checksum)


@dataclass(frozen=True)
class PlainLayer:
    """A layer that cannot be inverted, for chains under `store` or `remat`.

    Attributes:
      apply: `(params, x, context) -> (y, aux)`, with x and y tuples of streams.
    """

    apply: Callable[[Any, Streams, Context], tuple[Streams, Any]]

    def forward(self, params: Any, x: Streams, context: Context) -> tuple[Streams, Any, Any]:
        """Maps x to (y, aux, None): there is no residue."""
        return *self.apply(params, x, context), None
