"""One program for a branch: the only way in which a branch is evaluated and differentiated.

In the forward loop, in the rewind and under `store` a compiler would fuse a branch with different
neighbours, keep different intermediates, and so round differently: on GPUs every element of the
rebuilt input then differs. So wherever a gradient is taken, the same isolated program computes a
branch's outputs *and* the residuals that its linearization needs. The linearization is isolated
too.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval as pe

from revnet_jax.core import trees
from revnet_jax.core.isolate import call_witnessed, isolate
from revnet_jax.core.residuals import computing_again, fewest_residuals

GATHERED = "gathered"  # checkpoint_name of weights that a branch has all-gathered
# A context variable in place of a global, because threads may trace at the same time.
_in_the_open = contextvars.ContextVar("in_the_open", default=False)
_gathers_again = contextvars.ContextVar("gathers_again", default=False)


def without_isolation() -> contextlib.AbstractContextManager[None]:
    """Switches isolation off for branches traced inside this context.

    Checkpoint policies such as that of `remat_dots` must see the operations inside a branch.
    """
    return _switched_on(_in_the_open)


def gathering_again() -> contextlib.AbstractContextManager[None]:
    """Derivatives of branches traced inside this context do not keep weights named `GATHERED`.

    They compute them again, from the parts of the weights that the device holds.
    """
    return _switched_on(_gathers_again)


@contextlib.contextmanager
def _switched_on(switch: contextvars.ContextVar[bool]) -> Generator[None]:
    token = switch.set(True)
    try:
        yield
    finally:
        switch.reset(token)


def evaluate_branch(
    function: Callable[..., Any],
    params: Any,
    reads: Any,
    context: Any,
    *,
    keep_operands: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """Evaluates a branch as an isolated program: `(outputs, reads, checksum)`.

    `outputs` is `function(params, reads, context)`. All are trees; floating-point leaves are
    differentiated.

    - reads: returned with the same values. Later code must use the returned ones: the cotangents of
      those uses are then added inside the derivative, rather than by another pass over memory.
    - checksum: int32, over the outputs and, if the function is differentiated, over the residuals
      that its derivative needs. Equal wherever the same function was evaluated on the same bits.

    Cost: under differentiation the residuals (results of products, convolutions and sums) are
    written to memory once, even if no strategy keeps them. The derivative recomputes elementwise
    arithmetic, but for the operands of products with `keep_operands` (see `fewest_residuals`).
    Derivatives of any order, `vmap` and `jax.checkpoint` work as for a plain call.
    """
    arguments = params, reads, context
    if _in_the_open.get():
        return function(*arguments), reads, jnp.int32(0)
    # Keeping parameters and context costs nothing, because the chain holds them anyway. Keeping
    # the streams that are read costs memory.
    of_reads = (False, True, False)
    outputs, passed, checksum = _evaluate(
        function, arguments, call_witnessed, of_reads, of_reads, keep_operands
    )
    # `passed` are the floating-point leaves of `reads`, in their order.
    floats, others = trees.split(reads)
    reads = trees.join(jax.tree.unflatten(jax.tree.structure(floats), passed), others)
    return outputs, reads, checksum


def isolated_derivative(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` for elementwise arithmetic; only its derivative is isolated."""
    run = lambda program, leaves: (jaxpr_as_fun(program)(*leaves), jnp.int32(0))
    every, none = (True,) * len(arguments), (False,) * len(arguments)
    return _evaluate(function, arguments, run, costly=every, passes=none)[0]


def _evaluate(function, arguments, run_program, costly, passes, keep_operands=False):
    """(outputs, the floating-point leaves of the arguments marked in `passes`, checksum).

    run_program: `(program, leaves) -> (outputs, checksum)`.
    costly, passes: one bool per argument: whether keeping it for the derivative costs memory, and
      whether it is returned as well.
    """
    leaves, structure = jax.tree.flatten(arguments)
    is_float = [trees.is_inexact(leaf) for leaf in leaves]
    floats = [leaf for leaf, is_it in zip(leaves, is_float, strict=True) if is_it]
    others = [leaf for leaf, is_it in zip(leaves, is_float, strict=True) if not is_it]

    def by_float(by_argument):
        # From one value for each argument to one for each of its leaves, then for floats alone.
        by_leaf = [
            value
            for tree, value in zip(arguments, by_argument, strict=True)
            for _ in jax.tree.leaves(tree)
        ]
        return [value for value, is_it in zip(by_leaf, is_float, strict=True) if is_it]

    costs, passes = by_float(costly), by_float(passes)
    # Read here, because JAX may call the rule below when it has left the context.
    gathers_again = _gathers_again.get()
    select = lambda values, chosen: [v for v, is_it in zip(values, chosen, strict=True) if is_it]

    def called(floats, others):
        floats, others = iter(floats), iter(others)
        leaves = [next(floats if is_it else others) for is_it in is_float]
        return function(*structure.unflatten(leaves))

    # A rule for forward mode serves reverse mode too: JAX transposes the isolated linear map.
    @jax.custom_jvp
    def run(floats, others):
        program, shapes = jax.make_jaxpr(called, return_shape=True)(floats, others)
        outputs, checksum = run_program(program, [*floats, *others])
        outputs = jax.tree.unflatten(jax.tree.structure(shapes), outputs)
        return outputs, select(floats, passes), checksum

    def run_jvp(primals, tangents):
        # What has no tangent (a frozen weight, a constant) asks for no residuals.
        moves = [not isinstance(tangent, SymbolicZero) for tangent in tangents[0]]
        (floats, others), given, linear_map, checksum = _linearize(
            called, *primals, moves, run_program, costs, keep_operands
        )

        # Transposed, it adds two cotangents of each read: that by the branch, and that by later
        # uses of the stream that was passed on.
        def linear_map_and_reads(given, moving):
            return linear_map(given, moving), select(moving, select(passes, moves))

        moving = select(tangents[0], moves)
        found = given.isolate(linear_map_and_reads, moving, gathers_again)
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


class _Given(NamedTuple):
    """What a derivative reads besides tangents: `whole`, then `others`.

    `gather(parts)` computes the gathered weights `whole` again, from what a device holds of them.
    """

    whole: list[Any]
    others: list[Any]
    parts: list[Any]
    gather: Callable[[list[Any]], list[Any]]

    def isolate(self, derivative, moving, gathers_again):
        """Evaluates `derivative(what it reads, moving)` in isolation."""
        if not (gathers_again and self.whole):
            return isolate(derivative, [*self.whole, *self.others], moving)
        evaluate = lambda parts, others, moving: isolate(
            derivative, [*self.gather(parts), *others], moving
        )
        # The checkpoint keeps its arguments alone.
        return jax.checkpoint(evaluate, prevent_cse=False)(self.parts, self.others, moving)


def _linearize(called, floats, others, moves, run_program, costs, keep_operands):
    """(outputs as (floats, others), what the derivative reads, the derivative, checksum).

    moves: for each float, whether it has a tangent.
    The derivative maps (what it reads, tangents of the floats that have one) to tangents of the
    float outputs.
    """

    def linearized(floats, others):
        def of_moving(*moving):
            moving = iter(moving)
            pairs = zip(floats, moves, strict=True)
            full = [next(moving) if does else leaf for leaf, does in pairs]
            return trees.split(called(full, others))

        moving = [leaf for leaf, does in zip(floats, moves, strict=True) if does]
        # The linear map is a tree whose leaves are the intermediates that it needs. Returned from
        # here, they become outputs of the traced program.
        outputs, linear_map, other_outputs = jax.linearize(of_moving, *moving, has_aux=True)
        return (outputs, other_outputs), linear_map

    program, shapes = jax.make_jaxpr(linearized, return_shape=True)(floats, others)
    num_outputs = len(jax.tree.leaves(shapes[0]))
    # Found before `_gather_first` puts other inputs in front. Floats come first among the inputs,
    # and `costs` covers them alone.
    costly = [v for v, cost in zip(program.jaxpr.invars, costs, strict=False) if cost]
    gather, parts, program = _gather_first([*floats, *others], program)
    whole = gather(parts)
    arguments = [*whole, *floats, *others]
    jaxpr, constants = program.jaxpr, program.consts
    outputs, needed = jaxpr.outvars[:num_outputs], jaxpr.outvars[num_outputs:]
    # Inputs that are kept go to the derivative as arguments; only intermediates are returned.
    kept = fewest_residuals(jaxpr, needed, costly, keep_operands=keep_operands)
    kept = [v for v in kept if v not in jaxpr.invars]
    results, checksum = run_program(
        ClosedJaxpr(jaxpr.replace(outvars=[*outputs, *kept]), constants), arguments
    )
    again, is_read = computing_again(jaxpr, kept, needed)
    # An argument that the derivative does not read would be kept for nothing.
    is_whole_read, is_other_read = is_read[: len(whole)], is_read[len(whole) :]
    given = _Given(
        whole=list(compress(whole, is_whole_read)),
        others=list(compress([*floats, *others, *results[num_outputs:]], is_other_read)),
        parts=parts,
        # Behind a barrier, so that no compiler takes what the forward pass gathered.
        gather=lambda parts: list(compress(gather(lax.optimization_barrier(parts)), is_whole_read)),
    )

    def linear_map(given, moving):
        leaves = jaxpr_as_fun(ClosedJaxpr(again, constants))(*given)
        return jax.tree.unflatten(jax.tree.structure(shapes[1]), leaves)(*moving)

    outputs = jax.tree.unflatten(jax.tree.structure(shapes[0]), results[:num_outputs])
    return outputs, given, linear_map, checksum


def _gather_first(arguments, program):
    """Moves the all-gathers of weights in front of the program: (gather, parts, program).

    The weights that `gather(parts)` returns become the first inputs of the program. So they are not
    kept as residuals of it, and `store` can gather them again in the backward pass.
    """
    jaxpr = program.jaxpr
    is_gather = lambda e: e.primitive.name == "name" and e.params["name"] == GATHERED
    gathered = [v for e in jaxpr.eqns if is_gather(e) for v in e.outvars]
    if not gathered:
        return (lambda parts: []), [], program
    # Whatever the gathered weights are computed from: casts and all-gathers.
    before, used = pe.dce_jaxpr(jaxpr.replace(outvars=gathered), [True] * len(gathered))
    parts = [a for a, is_used in zip(arguments, used, strict=True) if is_used]
    gather = lambda parts: jaxpr_as_fun(ClosedJaxpr(before, program.consts))(*parts)
    after = jaxpr.replace(
        invars=[*gathered, *jaxpr.invars], eqns=[e for e in jaxpr.eqns if not is_gather(e)]
    )
    # Deletes the gathers, whose results are inputs now; `instantiate` keeps all the inputs.
    after, _ = pe.dce_jaxpr(after, [True] * len(after.outvars), instantiate=True)
    return gather, parts, ClosedJaxpr(after, program.consts)
