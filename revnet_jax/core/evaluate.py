"""One program for a branch: the only way in which a branch is evaluated, and differentiated.

In a forward loop, in a rewind and under `store` a compiler would fuse a branch with other
neighbours each time, keep other intermediates of it, and so round in other ways: on GPUs every
element of a rebuilt input differs. So wherever a gradient is wanted, the same isolated program
computes a branch's outputs *and* what its linearization needs; the linearization is isolated, too.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval as pe

from revnet_jax.core import trees
from revnet_jax.core.isolate import call_witnessed, isolate
from revnet_jax.core.residuals import computing_again, fewest_residuals

GATHERED = "gathered"  # the name of weights that a branch has gathered from other devices
_in_the_open = contextvars.ContextVar("in_the_open", default=False)


@contextlib.contextmanager
def in_the_open() -> Generator[None]:
    """Branches traced in here are not isolated: for policies that have to see what is in them."""
    token = _in_the_open.set(True)
    try:
        yield
    finally:
        _in_the_open.reset(token)


def evaluate(
    function: Callable[..., Any], params: Any, reads: Any, context: Any
) -> tuple[Any, Any, jax.Array]:
    """`(function(params, reads, context), reads, checksum)`; trees, derivatives in the floats.

    reads: as they came, to be used from here on: the cotangents of later uses are then added within
      the derivative, rather than by another pass over memory.
    checksum: int32, equal wherever the same function was evaluated on the same bits: of its outputs
      and, if it is differentiated, of the intermediates that its derivative needs.

    Cost: where it is differentiated, those intermediates are written, once, even if nobody keeps
    them: what products, convolutions and sums return; the derivative computes elementwise
    arithmetic again (see `fewest_residuals`). Derivatives of any order, `vmap` and `jax.checkpoint`
    work as without.
    """
    arguments = params, reads, context
    if _in_the_open.get():
        return function(*arguments), reads, jnp.int32(0)
    # Parameters and the context are kept by others; what is read has to be kept for this.
    of_reads = (False, True, False)
    outputs, passed, checksum = _evaluate(function, arguments, call_witnessed, of_reads, of_reads)
    floats, others = trees.split(reads)
    reads = trees.join(jax.tree.unflatten(jax.tree.structure(floats), passed), others)
    return outputs, reads, checksum


def isolated_derivative(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` of elementwise arithmetic, whose derivative alone is isolated."""
    run = lambda program, leaves: (jaxpr_as_fun(program)(*leaves), jnp.int32(0))
    every, none = (True,) * len(arguments), (False,) * len(arguments)
    return _evaluate(function, arguments, run, costly=every, passes=none)[0]


def _evaluate(function, arguments, run_program, costly, passes):
    """(outputs, the floats of the arguments that `passes`, checksum)."""
    leaves, structure = jax.tree.flatten(arguments)
    is_float = [trees.is_inexact(leaf) for leaf in leaves]
    floats = [leaf for leaf, is_it in zip(leaves, is_float, strict=True) if is_it]
    others = [leaf for leaf, is_it in zip(leaves, is_float, strict=True) if not is_it]

    def by_float(by_argument):
        by_leaf = [
            value
            for tree, value in zip(arguments, by_argument, strict=True)
            for _ in jax.tree.leaves(tree)
        ]
        return [value for value, is_it in zip(by_leaf, is_float, strict=True) if is_it]

    costs, passes = by_float(costly), by_float(passes)
    select = lambda values, chosen: [v for v, is_it in zip(values, chosen, strict=True) if is_it]

    def called(floats, others):
        floats, others = iter(floats), iter(others)
        leaves = [next(floats if is_it else others) for is_it in is_float]
        return function(*structure.unflatten(leaves))

    @jax.custom_jvp
    def run(floats, others):
        program, shapes = jax.make_jaxpr(called, return_shape=True)(floats, others)
        outputs, checksum = run_program(program, [*floats, *others])
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return outputs, select(floats, passes), checksum

    def run_jvp(primals, tangents):
        moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents[0]]
        (floats, others), given, linear_map, checksum = _linearize(
            called, *primals, moves, run_program, costs
        )

        def linear_map_and_reads(given, moving):
            return linear_map(given, moving), select(moving, select(passes, moves))

        found = isolate(linear_map_and_reads, given, select(tangents[0], moves))
        output_tangents, passed_tangents = found[0], iter(found[1])
        passed = select(primals[0], passes)
        passed_tangents = [
            next(passed_tangents) if does else zero_from_primal(leaf, symbolic_zeros=True)
            for leaf, does in zip(passed, select(moves, passes), strict=True)
        ]
        no_tangents = zero_from_primal((others, checksum))
        outputs = trees.join(floats, others), passed, checksum
        tangents = trees.join(output_tangents, no_tangents[0]), passed_tangents, no_tangents[1]
        return outputs, tangents

    run.defjvp(run_jvp, symbolic_zeros=True)
    return run(floats, others)


def _linearize(called, floats, others, moves, run_program, costs):
    """(outputs: floats and others, what their derivative is given, the derivative, checksum).

    The derivative is `(given, tangents of what moves) -> tangents of the floats`.
    """

    def linearized(floats, others):
        def of_moving(*moving):
            moving = iter(moving)
            pairs = zip(floats, moves, strict=True)
            full = [next(moving) if does else leaf for leaf, does in pairs]
            return trees.split(called(full, others))

        moving = [leaf for leaf, does in zip(floats, moves, strict=True) if does]
        outputs, linear_map, other_outputs = jax.linearize(of_moving, *moving, has_aux=True)
        return (outputs, other_outputs), linear_map

    program, shapes = jax.make_jaxpr(linearized, return_shape=True)(floats, others)
    num_outputs = len(jax.tree.leaves(shapes[0]))
    costly = [v for v, cost in zip(program.jaxpr.invars, costs, strict=False) if cost]
    arguments, program = _gather_first([*floats, *others], program)
    jaxpr, constants = program.jaxpr, program.consts
    outputs, needed = jaxpr.outvars[:num_outputs], jaxpr.outvars[num_outputs:]
    kept = [v for v in fewest_residuals(jaxpr, needed, costly) if v not in jaxpr.invars]
    results, checksum = run_program(
        ClosedJaxpr(jaxpr.replace(outvars=[*outputs, *kept]), constants), arguments
    )
    again, is_read = computing_again(jaxpr, kept, needed)
    given = [*arguments, *results[num_outputs:]]
    given = [value for value, is_it in zip(given, is_read, strict=True) if is_it]

    def linear_map(given, moving):
        leaves = jaxpr_as_fun(ClosedJaxpr(again, constants))(*given)
        return jax.tree.unflatten(jax.tree.structure(shapes[1]), leaves)(*moving)

    outputs = jax.tree.unflatten(jax.tree.structure(shapes[0]), results[:num_outputs])
    return outputs, given, linear_map, checksum


def _gather_first(arguments, program):
    """The program as one of gathered weights, too, which are computed here: (arguments, program).

    So they are among what is at hand: `store` gathers them again rather than keep them.
    """
    jaxpr = program.jaxpr
    is_gather = lambda e: e.primitive.name == "name" and e.params["name"] == GATHERED
    gathered = [v for e in jaxpr.eqns if is_gather(e) for v in e.outvars]
    if not gathered:
        return arguments, program
    before, used = pe.dce_jaxpr(jaxpr.replace(outvars=gathered), [True] * len(gathered))
    inputs = [a for a, is_used in zip(arguments, used, strict=True) if is_used]
    values = jaxpr_as_fun(ClosedJaxpr(before, program.consts))(*inputs)
    after = jaxpr.replace(
        invars=[*gathered, *jaxpr.invars], eqns=[e for e in jaxpr.eqns if not is_gather(e)]
    )
    after, _ = pe.dce_jaxpr(after, [True] * len(after.outvars), instantiate=True)
    return [*values, *arguments], ClosedJaxpr(after, program.consts)
