"""Checks for a new block: is it undone exactly, is its gradient right, is memory flat in depth?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import trees, validate
from revnet_jax.core.block import Block, Context, ReversibleLayer, Streams
from revnet_jax.core.chain import Section, chain, sequence_forward, sequence_inverse
from revnet_jax.core.exactness import Exactness, Tracked, compare_inputs, largest
from revnet_jax.core.grid import snap
from revnet_jax.core.resolution import count_updates
from revnet_jax.core.strategies import STRATEGIES

# Largest relative error (L2) of the gradient against `store`. With exact streams, only rounding
# differs: by the order of sums (float32), and where compilers keep more digits than bfloat16 has.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2, "float64": 1e-10}
_RANGE = "range of the grid"


class _NoBranches(Exception):
    pass


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
      passed: None for a measurement that cannot fail.
      advice: what to do if the check did not pass.
    """

    law: str
    passed: bool | None
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """The result of `check_reversible`; prints as a table."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(finding.passed is not False for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(finding.law) for finding in self.findings)
        words = {True: "ok", False: "FAIL", None: "-"}
        lines = []
        for finding in self.findings:
            word = words[finding.passed]
            lines.append(f"{finding.law:{width}}  {word:4}  {finding.measured}".rstrip())
            if finding.advice and finding.measured and not finding.passed:
                lines.append(f"{'':{width}}        -> {finding.advice}")
        return "\n".join(lines)

    __repr__ = __str__


def check_reversible(
    layer: ReversibleLayer,
    params: Any,
    x: Streams,
    *,
    shared: Any = None,
    data: Any = None,
    depth: int = 8,
    dtypes: Sequence[str] = tuple(TOLERANCES),
) -> Report:
    """Checks everything a reversible layer must satisfy: `print(check_reversible(...))`.

    Args:
      layer: a `Block`, `Invertible` or other reversible layer that keeps its streams' shapes.
      params: of a single layer; the checks run a chain of `depth` copies of it.
      data: of a single layer, too.
      dtypes: dtypes of the branches in which to compare gradients: "float32", "bfloat16",
        "float64".
      x: as for `chain`; float32 arrays, small enough to evaluate the chain several times.
      shared: as for `chain`, likewise.

    Compiles about a dozen programs, two for each dtype: seconds to a minute on a CPU. Does not
    raise for faults of the layer; the report describes them and what to do.
    """
    if isinstance(dtypes, str) or not TOLERANCES.keys() >= {*dtypes}:
        raise ValueError(
            f"got dtypes={dtypes!r}, expected a list of some of {', '.join(TOLERANCES)}"
        )
    try:
        one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], (params, data))
        section = Section(layer, *_repeat(one, depth), length=depth)
        (section,) = validate.checked_sections([section])
        x, shared = validate.streams("x", x), validate.arrays("shared", shared)
        validate.check_invertible([section])
        validate.check_sections([section], x, shared, "reverse", STRATEGIES)
    except Exception as error:
        return Report((Finding("maps streams to streams", False, _line(error), "as it says"),))
    # As a chain does, so that what is rebuilt is compared with what entered.
    x = snap(getattr(layer, "grid", None), x)
    findings = [
        Finding("maps streams to streams", True, f"{len(x)} streams, shapes and dtypes kept"),
        _closed_over(layer, params, x, shared, data),
        _randomness(layer, params, x, shared, data),
    ]
    if not findings[-1].passed:  # without reproducible branches the other checks mean nothing
        return Report(tuple(findings))
    try:
        findings.extend(_range_and_resolution(section, x, shared))
        is_in_range = all(finding.passed for finding in findings if finding.law == _RANGE)
        findings.extend(_round_trips(section, x, shared, is_in_range=is_in_range))
    except Exception as error:
        return Report((*findings, Finding("inverse of forward", False, _line(error), "as it says")))
    for dtype in dtypes:
        findings.extend(_gradients(section, x, shared, dtype))
    return Report((*findings, *_memory(section, x, shared)))


def _repeat(tree: Any, depth: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, depth, axis=0), tree)


def _line(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"


def _closed_over(layer, params, x, shared, data) -> Finding:
    forward = lambda *args: layer.forward(*args[:2], Context(*args[2:]))[0]
    consts = jax.make_jaxpr(forward)(params, x, shared, data).consts
    # Scalars are taken for constants, like the size of a step.
    arrays = [trees.describe_array(c) for c in consts if trees.is_inexact(c) and jnp.ndim(c)]
    law = "closes over no arrays"
    return Finding(
        law,
        None if arrays else True,
        ", ".join(arrays),
        "fine for constants; what is trained must come through params or shared",
    )


def _randomness(layer, params, x, shared, data) -> Finding:
    """Traces the layer twice: randomness that is not drawn from a key would then differ."""

    def trace_and_run():
        # A new function each time, because jit would not trace the same one again.
        return jax.jit(lambda *args: layer.forward(*args[:2], Context(*args[2:]))[0])(
            params, x, shared, data
        )

    differ = int(compare_inputs(trace_and_run(), trace_and_run(), Tracked.nothing()).mismatches)
    return Finding(
        "same bits when asked again",
        not differ,
        f"{differ} elements differ",
        "hidden randomness or state: draw it from a key in the context's data",
    )


def _range_and_resolution(section, x, shared) -> Iterator[Finding]:
    """How much of the grid's range the streams use, and how many updates round to zero."""
    layer = section.layer
    grid = getattr(layer, "grid", None)
    if grid is None:
        return

    def one(x, layer_slice):
        params, data = layer_slice
        context = Context(shared, data)
        counts = _count_updates(layer, params, x, context) if isinstance(layer, Block) else [(0, 0)]
        y = layer.forward(params, x, context)[0]
        return y, (largest(y), jnp.asarray(counts, jnp.float32))

    layers_L = section.params_L, section.data_L
    run = jax.jit(lambda x, layers_L: jax.lax.scan(one, x, layers_L, length=section.length))
    _, (largest_L, counts_L) = run(x, layers_L)
    # Half of the spacing: a smaller update is rounded to zero.
    smallest = 2.0 ** -(grid.bits + 1)
    most, limit = float(jnp.max(largest_L)), grid.limit(jnp.float32)
    yield Finding(
        _RANGE,
        # Half of the range, because other inputs and trained weights may reach further.
        most < limit / 2,
        f"|x| up to {most:.3g} of {limit:g} after {section.length} layers",
        "normalise what the branches read, or what they return; or take a grid of fewer bits",
    )
    shares = [float(lost / total) for total, lost in jnp.sum(counts_L, axis=0) if total]
    if not shares:
        yield Finding("resolution of the grid", None, "no update was other than 0")
        return
    share = max(shares)
    yield Finding(
        "resolution of the grid",
        # Over a half fails. Between a tenth and a half the advice is shown without a verdict.
        None if 0.1 < share <= 0.5 else share <= 0.5,
        f"{share:.1%} of a branch's updates rounded to nothing, below {smallest:.2g}",
        f"take a grid of more bits (here {grid.bits}; each halves the range), or larger updates",
    )


def _count_updates(block, params, x, context):
    """For each half-step: (elements with an update, elements whose update rounds to zero)."""
    streams, found = list(x), []
    for step, step_params in zip(block.half_steps, params, strict=True):
        u, _, streams, _ = step.evaluate(step_params, streams, context)
        before = streams[step.updates]
        found.append(count_updates(step.coupling, before, u, block.grid))
        streams[step.updates] = step.merge(before, u, block.grid)[0]
    return found


def _round_trips(section, x, shared, *, is_in_range) -> Iterator[Finding]:
    @jax.jit
    def both_ways(x):
        y, _, residues = sequence_forward([section], x, shared=shared)
        rebuilt_x = sequence_inverse([section], y, residues, shared=shared)
        if jax.tree.leaves(residues):  # an arbitrary y has no residue: take one computed from x
            before, true_y = rebuilt_x, y
        else:
            before, true_y = sequence_inverse([section], x, shared=shared), x
        rebuilt_y = sequence_forward([section], before, shared=shared)[0]
        nothing = Tracked.nothing()
        return compare_inputs(rebuilt_x, x, nothing), compare_inputs(rebuilt_y, true_y, nothing)

    for name, found in zip(("inverse of forward", "forward of inverse"), both_ways(x), strict=True):
        yield Finding(
            name,
            not found.mismatches,
            f"{int(found.mismatches)} elements differ, by up to {float(found.max_difference):.2g}",
            _exactness_advice(section.layer, is_in_range=is_in_range),
        )


def _exactness_advice(layer, *, is_in_range) -> str:
    if not is_in_range:
        return f"beyond its range a grid is not exact: see '{_RANGE}'"
    if not isinstance(layer, Block):
        return "`undo` is not the exact inverse of `apply`: compare them on one stream at a time"
    if layer.grid is None:
        return "streams are on no grid: give the block a Grid()"
    return (
        "merge and unmerge do not undo each other on the grid: snap what is added, keep a residue"
    )


def _gradients(section, x, shared, dtype) -> Iterator[Finding]:
    law = f"gradient = store, {dtype}"
    try:
        # Otherwise JAX makes float32 of float64.
        with jax.enable_x64(dtype == "float64"):
            error, exactness = _gradient_error(section, x, shared, jnp.dtype(dtype))
    except _NoBranches as error:
        yield Finding(law, None, f"could not be run: {error}")
        return
    except Exception as error:
        yield Finding(law, False, f"could not be run: {_line(error)}", "as it says")
        return
    mismatches = int(exactness.mismatches)
    grid = getattr(section.layer, "grid", None)
    yield Finding(
        law,
        # Without a grid the input is rebuilt with rounding errors, which are no fault by
        # themselves.
        error <= TOLERANCES[dtype] and not (grid and mismatches),
        f"relative error {error:.2g}, {mismatches} elements of the input not rebuilt",
        "see the first law that fails above; if there is none, compare with fewer layers",
    )


def _gradient_error(section, x, shared, dtype) -> tuple[float, Exactness]:
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    layer, arguments = section.layer, (section.params_L, x, shared, section.data_L)
    if dtype == jnp.float64:
        arguments = _cast(arguments, wide)
    # Mixed precision: branches compute in bfloat16, streams stay in float32.
    elif dtype == jnp.bfloat16 and isinstance(layer, Block):
        steps = [
            dataclasses.replace(step, branch=_computed_in(dtype, step.branch))
            for step in layer.half_steps
        ]
        layer = dataclasses.replace(layer, half_steps=tuple(steps))
    elif dtype == jnp.bfloat16:
        raise _NoBranches("only a Block's branches can be computed in another dtype")

    def gradient(backprop):
        loss = _loss(layer, backprop, length=section.length)
        # All but the per-layer data, which has no gradient; the last is the probe. Integers among
        # the parameters are allowed, and their empty gradients are dropped below.
        gradient = jax.grad(loss, argnums=(0, 1, 2, 4), allow_int=True)
        return jax.jit(gradient)(*arguments, Exactness.probe())

    *got, exactness = gradient("reverse")
    *expected, _ = gradient("store")
    got, expected = (jax.tree.leaves(trees.split(tree)[0]) for tree in (got, expected))
    norm = lambda leaves: sum(float(jnp.sum(jnp.abs(leaf).astype(wide) ** 2)) for leaf in leaves)
    difference = norm([a - b for a, b in zip(got, expected, strict=True)])
    # A layer may have a gradient of zero: 1e-300 avoids 0 / 0.
    return (difference / max(norm(expected), 1e-300)) ** 0.5, exactness


def _loss(layer, backprop, *, length=None, with_aux=True) -> Callable[..., jax.Array]:
    def loss(params_L, x, shared, data_L, probe):
        y, aux_L = chain(
            layer,
            params_L,
            x,
            shared=shared,
            data_L=data_L,
            length=length,
            backprop=backprop,
            probe=probe,
        )
        leaves = jax.tree.leaves((y, trees.split(aux_L)[0] if with_aux else None))
        wide = trees.dtype_of(jax.tree.leaves(y)[0])
        # A sine of each leaf, at a frequency of its own, so that cotangents differ between elements
        # and between leaves. A plain sum would not notice streams that were exchanged.
        return sum(jnp.mean(jnp.sin(leaf.astype(wide) * (i + 1))) for i, leaf in enumerate(leaves))

    return loss


def _cast(tree: Any, dtype: Any) -> Any:
    """Casts floats to the dtype, and complex numbers to complex128 if it is float64."""

    def cast(leaf):
        kind = trees.dtype_of(leaf)
        if jnp.issubdtype(kind, jnp.complexfloating):
            return leaf.astype(jnp.complex128) if dtype == jnp.float64 else leaf
        return leaf.astype(dtype) if jnp.issubdtype(kind, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _computed_in(dtype, branch):
    return lambda *args: branch(*_cast(args, dtype))


def _memory(section, x, shared) -> Iterator[Finding]:
    # A single layer runs outside of a loop, in another amount of memory.
    depth = max(section.length, 2)
    one = jax.tree.map(lambda leaf: leaf[:1], (section.params_L, section.data_L))

    def temporary_bytes(backprop, times):
        params_L, data_L = _repeat(one, depth * times)
        arguments = params_L, x, shared, data_L, None
        # Without auxiliary outputs, which every strategy keeps for all layers.
        loss = _loss(section.layer, backprop, length=depth * times, with_aux=False)
        gradient = jax.grad(loss, argnums=(0, 1), allow_int=True)
        program: Any = jax.jit(gradient).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    try:
        growth = {
            # Bytes a layer, from chains of `depth` and of 9 times `depth` layers: what does not
            # grow with depth cancels.
            backprop: (temporary_bytes(backprop, 9) - temporary_bytes(backprop, 1)) / (8 * depth)
            for backprop in ("reverse", "store")
        }
    except Exception as error:
        yield Finding(
            "memory flat in depth", False, f"could not be measured: {_line(error)}", "as it says"
        )
        return
    residues = jax.eval_shape(lambda x: sequence_forward([section], x, shared=shared)[2], x)
    residue = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residues))
    residue /= section.length
    elements = sum(leaf.size for leaf in jax.tree.leaves(x))
    yield Finding(
        "memory flat in depth",
        growth["reverse"] - residue <= 0.01 * growth["store"],
        f"{growth['reverse']:,.0f} bytes a layer under reverse, {growth['store']:,.0f} under store",
        "the layer keeps something besides its residue: does it have its own gradient?",
    )
    yield Finding(
        "residue", None, f"{8 * residue / elements:.2f} bits per element of the streams per layer"
    )
