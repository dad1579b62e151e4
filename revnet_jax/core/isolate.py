"""A function compiled apart from what is around it: the same program wherever it is evaluated.

Compilers fuse a sum with its neighbours, delete what nobody reads, and add in another order
afterwards. What must give the same bits twice is therefore isolated: nothing is fused across its
edges, and where `witnessed`, all that it returns is computed whoever reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe


def isolate(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, trees of arrays; differentiable, in any way, as the function is."""
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    outputs = call(program, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def call(program: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """The outputs of a program, isolated."""
    arguments, program = _without_constants(arguments, program)
    return _call_p.bind(*arguments, program=program, witnessed=False)


def call_witnessed(program: ClosedJaxpr, arguments: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """(outputs, checksum): who reads the first output, or the checksum, makes all be computed.

    checksum: int32, of the bits of some elements of each output, in whatever order they are added.
      A few, because reading all would cost as much as computing them.
    """
    arguments, program = _without_constants(arguments, program)
    *outputs, checksum = _call_p.bind(*arguments, program=program, witnessed=True)
    return outputs, checksum


def depending_on(variables: Iterable[Any], jaxpr: Any) -> Callable[[Any], bool]:
    """Whether a variable of a jaxpr is among these, or computed from them; no literal is."""
    found = set(map(id, variables))  # literals have no hash
    for equation in jaxpr.eqns:
        if any(id(variable) in found for variable in equation.invars):
            found.update(map(id, equation.outvars))
    return lambda variable: id(variable) in found


def _without_constants(arguments, program):
    """Constants may be traced values, which have to be passed like all others."""
    jaxpr = program.jaxpr
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    return [*program.consts, *arguments], ClosedJaxpr(jaxpr, ())


def _witness(first, *others):
    """The same and a checksum; the first depends on all of them, for all that compilers know."""
    sums = _checksums((first, *others), rows=first.shape[0] if first.ndim else 1)
    # n (n + 1) is even, which compilers do not know. A barrier alone would not do: they remove from
    # it what nobody reads.
    # A constant in the place of the sums would become one array with equal constants inside.
    by_example = sums.reshape((-1,) + (1,) * (first.ndim - 1) if first.ndim else ())
    never = (by_example * (by_example + 1)) & 1 == 1
    first = jnp.where(never, by_example.astype(first.dtype), first)
    return first, jnp.sum(sums, dtype=jnp.int32)


def _checksums(leaves, rows):
    """int32 [rows]: each example sums up its own elements, and those that belong to none.

    So devices that have examples of their own need not wait for one another. The first elements,
    because those of a part of an array are where it begins: nothing is sent to find them.
    """
    sums, of_none = jnp.zeros(rows, jnp.int32), [jnp.zeros(1, jnp.int32)]
    for leaf in leaves:
        if leaf.size:
            has_examples = leaf.shape[:1] == (rows,)
            limits = [rows] * has_examples + [1] * (leaf.ndim - has_examples)
            # Two of them: of one, a sum is a reshape, from which TPU compilers conclude that all of
            # the array has examples side by side in memory: 4 of them in the place of 128.
            if longer := [i for i, n in enumerate(leaf.shape) if n > limits[i]]:
                limits[longer[-1]] = 2
            bits = _bits(lax.slice(leaf, [0] * leaf.ndim, limits))
            if has_examples:
                sums += _mixed(jnp.sum(bits, axis=tuple(range(1, leaf.ndim)), dtype=jnp.int32))
            else:
                of_none.append(bits.reshape(-1))
    # Side by side, so that they take one kernel, not one each: a branch of a RevNet has ten.
    return sums + jnp.sum(_mixed(jnp.concatenate(of_none)), dtype=jnp.int32)


def _bits(leaf):
    """As int32: of a float64 the sum of its halves; narrower floats are widened first, exactly."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(jnp.int32)
    if leaf.dtype == jnp.float64:
        return jnp.sum(lax.bitcast_convert_type(leaf, jnp.int32), axis=-1, dtype=jnp.int32)
    return lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32)


def _mixed(bits):
    """int32 whose differences hardly cancel in a sum: every bit depends on all of the bits.

    Summed as they are, two flips of a sign would be none. The finalizer of MurmurHash3 (Appleby).
    """
    bits = bits.astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).astype(jnp.int32)


SCOPE = "isolated"  # in the names that compiled programs give to what was isolated
_call_p = Primitive(SCOPE)
_call_p.multiple_results = True


@_call_p.def_impl
def _compute(*arguments, **params):
    with jax.disable_jit(False):  # whoever has switched it on gets what is in between step by step
        return jax.jit(functools.partial(_call_p.bind, **params))(*arguments)


@_call_p.def_abstract_eval
def _abstract(*avals, program, witnessed):
    return [*program.out_avals, *[ShapedArray((), jnp.int32)] * witnessed]


def _lower_between_barriers(context, *arguments, program, witnessed):
    run = jax.named_scope(SCOPE)(jaxpr_as_fun(program))
    arguments = _lowered(context, _barrier, context.avals_in, arguments)
    outputs = mlir.lower_fun(lambda *arguments: run(*arguments))(context, *arguments)
    outputs = _lowered(context, _barrier, program.out_avals, outputs)
    return _lower_witness(context, outputs, program) if witnessed else outputs


def _lower_as_call(context, *arguments, program, witnessed):
    """On CPU barriers are gone before anything is fused; but functions stay apart if told to."""
    context = context.replace(avals_out=program.out_avals)
    outputs = mlir.core_call_lowering(context, *arguments, name=SCOPE, call_jaxpr=program)
    if outputs:
        attributes: dict[str, Any] = {"inlineable": mlir.ir.StringAttr.get("false")}
        function_call = mlir.ir_tree_registry.flatten(outputs)[0][0].owner
        function_call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(attributes)
    return _lower_witness(context, outputs, program) if witnessed else outputs


def _lower_witness(context, outputs, program):
    avals = program.out_avals
    seen = [i for i, a in enumerate(avals) if not jnp.issubdtype(a.dtype, jax.dtypes.extended)]
    first, checksum = _lowered(
        context, _witness, [avals[i] for i in seen], [outputs[i] for i in seen]
    )
    return [first, *outputs[1:], checksum]


def _lowered(context, function, avals, values):
    # Without the sharding and the axes of `shard_map` in their types, over which JAX would refuse
    # to put behind one barrier, or to add up, what lies each in its own way on a mesh.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals]
    return mlir.lower_fun(function)(context.replace(avals_in=plain, tokens_out=None), *values)


def _barrier(*leaves):
    return lax.optimization_barrier(leaves)


def _jvp(primals, tangents, *, program, witnessed):
    outputs = _call_p.bind(*primals, program=program, witnessed=witnessed)
    moves = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def of_moving(*moving):
        moving = iter(moving)
        pairs = zip(primals, moves, strict=True)
        return jaxpr_as_fun(program)(*(next(moving) if does else leaf for leaf, does in pairs))

    select = lambda values: [v for v, does in zip(values, moves, strict=True) if does]
    _, output_tangents = jax.jvp(of_moving, select(primals), select(tangents))
    no_tangent = lambda leaf: ad.Zero(jax.typeof(leaf).to_tangent_aval())
    output_tangents = [
        no_tangent(leaf) if tangent.dtype == jax.dtypes.float0 else tangent
        for leaf, tangent in zip(outputs, output_tangents, strict=False)
    ]
    return outputs, output_tangents + [no_tangent(outputs[-1])] * witnessed


def _transpose(cotangents, *arguments, program, witnessed):
    moves = [ad.is_undefined_primal(argument) for argument in arguments]
    given = [i for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]
    known = [a for a, does in zip(arguments, moves, strict=True) if not does]
    avals = [a.aval for a, does in zip(arguments, moves, strict=True) if does]

    def transposed(known, cotangents):
        def linear(*moving):
            rest, moving = iter(known), iter(moving)
            outputs = jaxpr_as_fun(program)(*(next(moving if does else rest) for does in moves))
            return [outputs[i] for i in given]

        like = [ad.instantiate_zeros(ad.Zero(aval)) for aval in avals]  # on a mesh as they are
        return jax.linear_transpose(linear, *like)(cotangents)

    found = iter(isolate(transposed, known, [cotangents[i] for i in given]))
    return [next(found) if does else None for does in moves]


def _batch(axis, arguments, places, *, program, witnessed):
    """What depends on nothing that is batched, weights in another dtype, stays as it is."""
    batched = {v for v, i in zip(program.jaxpr.invars, places, strict=True) if i is not None}
    is_batched = depending_on(batched, program.jaxpr)
    out_places = [0 if is_batched(v) else None for v in program.jaxpr.outvars]
    mapped = jax.vmap(
        jaxpr_as_fun(program), places, out_places, axis_name=axis.name, axis_size=axis.size
    )
    program = jax.make_jaxpr(mapped)(*arguments)
    outputs = _call_p.bind(*arguments, program=program, witnessed=witnessed)
    return outputs, out_places + [None] * witnessed


def _delete_unread(used, *others):
    """What `jax.checkpoint` need not compute again in a backward pass."""
    equation = others[-1]  # jax 0.12 says before it which inputs are alive
    program, witnessed = equation.params["program"], equation.params["witnessed"]
    if witnessed and (used[0] or used[-1]):
        return [True] * len(equation.invars), equation
    used = used[: len(program.out_avals)]
    if not any(used):
        return [False] * len(equation.invars), None
    jaxpr, used_inputs = pe.dce_jaxpr(program.jaxpr, used)
    keep = lambda values, used: [
        value for value, is_used in zip(values, used, strict=True) if is_used
    ]
    equation = equation.replace(
        invars=keep(equation.invars, used_inputs),
        outvars=keep(equation.outvars[: len(used)], used),
        params={"program": ClosedJaxpr(jaxpr, ()), "witnessed": False},
    )
    return used_inputs, equation


mlir.register_lowering(_call_p, _lower_between_barriers)
mlir.register_lowering(_call_p, _lower_as_call, platform="cpu")
ad.primitive_jvps[_call_p] = _jvp
ad.primitive_transposes[_call_p] = _transpose
batching.fancy_primitive_batchers[_call_p] = _batch
pe.dce_rules[_call_p] = _delete_unread
