"""Isolated functions: compiled apart from the code around them, to the same program everywhere.

Compilers fuse a sum with its neighbours and delete results that nobody reads, and either may
change the order of summation. What must give the same bits twice is therefore isolated: nothing is
fused across its boundary. That is each branch with its residuals, which the forward pass of every
strategy and the rewind of `reverse` evaluate, and the derivative that is computed from them. If an
isolated program is also `witnessed`, all of its outputs are computed, even those that nobody reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec


def isolate(function: Callable[..., Any], *arguments: Any) -> Any:
    """Evaluates `function(*arguments)`, on trees of arrays, in isolation.

    Forward and reverse mode, of any order, work as for the function itself.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    outputs = call(program, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def call(program: ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr in isolation and returns its outputs."""
    arguments, program = _without_constants(arguments, program)
    return _call_p.bind(*arguments, program=program, witnessed=False)


def call_witnessed(program: ClosedJaxpr, arguments: Sequence[Any]) -> tuple[list[Any], jax.Array]:
    """Evaluates a jaxpr in isolation: (outputs, checksum).

    If the first output (but for PRNG keys) or the checksum is read, all outputs are computed.

    checksum: int32, of the bits of a few elements of each output; it does not depend on the order
      of summation. A few elements, because reading all would double the memory traffic.
    """
    arguments, program = _without_constants(arguments, program)
    *outputs, checksum = _call_p.bind(*arguments, program=program, witnessed=True)
    return outputs, checksum


def depending_on(variables: Iterable[Any], jaxpr: Any) -> Callable[[Any], bool]:
    """Returns a test of whether a variable of the jaxpr is one of these or computed from them.

    The test is False for literals.
    """
    found = set(map(id, variables))  # by id, because literals are not hashable
    # The equations of a jaxpr stand in the order of evaluation, so one pass finds all.
    for equation in jaxpr.eqns:
        if any(id(variable) in found for variable in equation.invars):
            found.update(map(id, equation.outvars))
    return lambda variable: id(variable) in found


def _without_constants(arguments, program):
    """Turns the constants of a jaxpr into arguments, because they may be traced values."""
    jaxpr = program.jaxpr
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    return [*program.consts, *arguments], ClosedJaxpr(jaxpr, ())


def _witness(first, *others, add_two):
    """(first, checksum of all): compilers must assume that the result depends on every array.

    The value of `first` does not change.
    """
    # The leading axis of the first array is taken for that of the examples.
    sums = _checksums((first, *others), first.shape[0] if first.ndim else 1, add_two)
    # n (n + 1) is always even, but compilers do not know that, so `first` seems to depend on the
    # sums. A barrier alone would not do: compilers remove unread operands from it.
    # Where `never` holds, the sums are selected rather than a constant, because a compiler would
    # merge a constant array with an equal one inside the isolated program.
    by_example = sums.reshape((-1,) + (1,) * (first.ndim - 1) if first.ndim else ())
    # The product may wrap around modulo 2**32, which keeps it even.
    never = (by_example * (by_example + 1)) & 1 == 1
    first = jnp.where(never, by_example.astype(first.dtype), first)
    return first, jnp.sum(sums, dtype=jnp.int32)


def _sum_two(bits, axis):
    """Sums two elements of each example: int32 [rows]. axis: where they are."""
    # No reshape, by which TPU compilers would make the axis of examples the innermost one in
    # memory: a row of 128 numbers would hold as many as there are examples, say 4.
    return jnp.sum(bits, axis=tuple(range(1, bits.ndim)), dtype=jnp.int32)


def _add_two(bits, axis):
    """As `_sum_two`, for GPUs: a sum is a kernel each, all of these additions are one kernel."""
    first, second = lax.split(bits, (1, 1), axis)
    return (first + second).reshape(-1)


def _checksums(leaves, rows, add_two):
    """int32 [rows]: for each example, a sum over its own elements and those of unbatched arrays.

    With one sum per example, devices that hold different examples need no communication. The first
    elements of each array are taken: a shard has its first elements locally.
    """
    # int32 throughout: `jnp.sum` would widen to int64 where 64-bit types are enabled, and loops
    # carry the checksum as int32. Sums that wrap around do not depend on their order. The list
    # begins with a zero, because an empty one cannot be concatenated.
    sums, unbatched = jnp.zeros(rows, jnp.int32), [jnp.zeros(1, jnp.int32)]
    for leaf in leaves:
        if leaf.size:
            has_examples = leaf.shape[:1] == (rows,)
            # What is sliced: all examples, and the first element along every other axis.
            limits = [rows] * has_examples + [1] * (leaf.ndim - has_examples)
            # Two elements of each example, not one, see `_sum_two`.
            if longer := [i for i, n in enumerate(leaf.shape) if n > limits[i]]:
                limits[longer[-1]] = 2
            bits = _bits(lax.slice(leaf, [0] * leaf.ndim, limits))
            if has_examples:
                sums += _mixed(add_two(bits, longer[-1]) if longer else bits.reshape(rows))
            else:
                unbatched.append(bits.reshape(-1))
    # Concatenated, so that they take one kernel in total: a branch of a RevNet has ten such arrays.
    return sums + jnp.sum(_mixed(jnp.concatenate(unbatched)), dtype=jnp.int32)


def _bits(leaf):
    """The bits of each element as int32.

    Narrow numbers are first widened, exactly; numbers of 64 bits give the sum of their halves.
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        # Mixed, because in a plain sum two flipped signs would cancel.
        return _bits(lax.real(leaf)) + _mixed(_bits(lax.imag(leaf)))
    if leaf.dtype.itemsize == 8:
        return jnp.sum(lax.bitcast_convert_type(leaf, jnp.int32), axis=-1, dtype=jnp.int32)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(jnp.int32)
    return lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32)


def _mixed(bits):
    """Hashes int32 values, so that differences are unlikely to cancel in a sum.

    In a plain sum of bits two flipped signs would cancel. The finalizer of MurmurHash3 (Appleby).
    """
    bits = bits.astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).astype(jnp.int32)


SCOPE = "isolated"  # appears in the operation names of compiled programs
_call_p = Primitive(SCOPE)
_call_p.multiple_results = True


@_call_p.def_impl
def _compute(*arguments, **params):
    # Always compiled: under jax.disable_jit only the code between isolated programs runs eagerly.
    with jax.disable_jit(False):
        return jax.jit(functools.partial(_call_p.bind, **params))(*arguments)


@_call_p.def_abstract_eval
def _abstract(*avals, program, witnessed):
    checksum = [ShapedArray((), jnp.int32)] if witnessed else []
    return [*program.out_avals, *checksum]


def _lower_between_barriers(context, *arguments, program, witnessed, fix_layouts=None):
    # The scope marks the operations in the compiled text, where tests look for isolated parts.
    run = jax.named_scope(SCOPE)(jaxpr_as_fun(program))
    # On several devices layouts are left free: XLA would gather sharded arrays, because it does not
    # split a constraint of layouts over devices.
    # The context is private to JAX. Within a `shard_map` it has a mesh, and no number of devices.
    on_one = getattr(context.module_context.axis_context, "num_devices", None) == 1
    lay = fix_layouts if fix_layouts and on_one else lambda leaves: leaves
    # Layouts are fixed on the inner side of each barrier, where the program itself sees them.
    enter, leave = lambda *leaves: lay(_barrier(*leaves)), lambda *leaves: _barrier(*lay(leaves))
    arguments = _lowered(context, enter, context.avals_in, arguments)
    outputs = mlir.lower_fun(lambda *arguments: run(*arguments))(context, *arguments)
    outputs = _lowered(context, leave, program.out_avals, outputs)
    # Layouts are fixed on GPUs.
    add_two = _add_two if fix_layouts else _sum_two
    return _lower_witness(context, outputs, program, add_two) if witnessed else outputs


def _lower_as_call(context, *arguments, program, witnessed):
    """For CPU: XLA drops barriers there before it fuses, but keeps functions marked not inlineable.

    The mark is the frontend attribute `inlineable`, which has no public API in JAX.
    """
    # The function returns the program's outputs alone; the checksum is added after the call.
    context = context.replace(avals_out=program.out_avals)
    outputs = mlir.core_call_lowering(context, *arguments, name=SCOPE, call_jaxpr=program)
    if outputs:
        attributes: dict[str, Any] = {"inlineable": mlir.ir.StringAttr.get("false")}
        # The owner of an MLIR value is the operation that computed it: here the call.
        function_call = mlir.ir_tree_registry.flatten(outputs)[0][0].owner
        function_call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get(attributes)
    return _lower_witness(context, outputs, program, _sum_two) if witnessed else outputs


def _lower_witness(context, outputs, program, add_two):
    avals, seen, outputs = program.out_avals, _not_keys(program), list(outputs)
    if not seen:
        return [*outputs, *_lowered(context, lambda: [jnp.int32(0)], [], [])]
    witness = functools.partial(_witness, add_two=add_two)
    outputs[seen[0]], checksum = _lowered(
        context, witness, [avals[i] for i in seen], [outputs[i] for i in seen]
    )
    return [*outputs, checksum]


def _not_keys(program):
    """Places of the outputs that have bits here: PRNG keys have an extended dtype."""
    extended = [jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in program.out_avals]
    return [i for i, is_key in enumerate(extended) if not is_key]


def _lowered(context, function, avals, values):
    # Types without sharding and `shard_map` axes: with them JAX refuses to put arrays of different
    # shardings behind one barrier, or to add them.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in avals]
    return mlir.lower_fun(function)(context.replace(avals_in=plain, tokens_out=None), *values)


def _barrier(*leaves):
    return lax.optimization_barrier(leaves)


def _row_major(leaves):
    """The arrays in memory with the last axis contiguous.

    A barrier does not fix layouts. XLA may lay out residuals that are stacked in another way than
    those that are used at once. It then transposes the operands of a product, and the product
    rounds differently. Seen on GPUs. TPUs choose layouts of their own and are left to it.
    """
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    laid = lambda leaf: with_layout_constraint(leaf, Layout(tuple(range(leaf.ndim))))
    return [leaf if leaf.ndim < 2 or is_key(leaf) else laid(leaf) for leaf in leaves]


def _jvp(primals, tangents, *, program, witnessed):
    # The values are those of the isolated program, so that differentiating changes none of their
    # bits. `jax.jvp` evaluates the program again, and only its tangents are used.
    outputs = _call_p.bind(*primals, program=program, witnessed=witnessed)
    has_tangent = [not isinstance(tangent, ad.Zero) for tangent in tangents]

    def of_differentiated(*values):
        values = iter(values)
        pairs = zip(primals, has_tangent, strict=True)
        return jaxpr_as_fun(program)(*(next(values) if has else leaf for leaf, has in pairs))

    select = lambda values: [v for v, has in zip(values, has_tangent, strict=True) if has]
    _, output_tangents = jax.jvp(of_differentiated, select(primals), select(tangents))
    # `jax.jvp` gives integers tangents of dtype float0, where rules of primitives use symbolic
    # zeros. The zip is not strict, because a checksum may follow the outputs.
    no_tangent = lambda leaf: ad.Zero(jax.typeof(leaf).to_tangent_aval())
    output_tangents = [
        no_tangent(leaf) if tangent.dtype == jax.dtypes.float0 else tangent
        for leaf, tangent in zip(outputs, output_tangents, strict=False)
    ]
    return outputs, output_tangents + [no_tangent(outputs[-1])] * witnessed


def _transpose(cotangents, *arguments, program, witnessed):
    # An argument without a value is a linear one, whose cotangent is asked for.
    is_linear = [ad.is_undefined_primal(argument) for argument in arguments]
    # Outputs whose cotangent is zero are left out, so that nothing is computed for them.
    given = [i for i, cotangent in enumerate(cotangents) if not isinstance(cotangent, ad.Zero)]
    known = [a for a, linear in zip(arguments, is_linear, strict=True) if not linear]
    avals = [a.aval for a, linear in zip(arguments, is_linear, strict=True) if linear]

    def transposed(known, cotangents):
        def linear(*values):
            rest, values = iter(known), iter(values)
            outputs = jaxpr_as_fun(program)(*(next(values if is_ else rest) for is_ in is_linear))
            return [outputs[i] for i in given]

        like = [ad.instantiate_zeros(ad.Zero(aval)) for aval in avals]  # zeros keep the sharding
        found = jax.linear_transpose(linear, *like)(cotangents)
        # On meshes of Explicit axes JAX gives an unsharded factor of a sharded array a sharded
        # cotangent, and refuses it where it is added to others.
        return [sharded_as(a.sharding.spec, ct) for a, ct in zip(avals, found, strict=True)]

    found = iter(isolate(transposed, known, [cotangents[i] for i in given]))
    return [next(found) if linear else None for linear in is_linear]


def sharded_as(spec: PartitionSpec, array: Any) -> Any:
    """The array, split over its mesh of Explicit axes as `spec` says; on Auto axes as it is."""
    found = jax.typeof(array).sharding
    if found.spec == spec:
        return array
    return jax.sharding.reshard(array, NamedSharding(found.mesh, spec))


def _batch(axis, arguments, places, *, program, witnessed):
    """The rule for `vmap`: outputs that depend on no batched input stay unbatched.

    Weights that were cast to another dtype are such outputs.
    """
    batched = [v for v, i in zip(program.jaxpr.invars, places, strict=True) if i is not None]
    # What asks for its place along the axis differs along it, whatever its inputs.
    for equation in program.jaxpr.eqns:
        if any(getattr(effect, "name", None) == axis.name for effect in equation.effects):
            batched += equation.outvars
    is_batched = depending_on(batched, program.jaxpr)
    out_places = [0 if is_batched(v) else None for v in program.jaxpr.outvars]
    mapped = jax.vmap(
        jaxpr_as_fun(program),
        places,
        out_places,
        axis_name=axis.name,
        axis_size=axis.size,
        spmd_axis_name=axis.spmd_name,
    )
    # The batched form is one isolated program too, and one checksum covers all of its batch.
    program = jax.make_jaxpr(mapped)(*arguments)
    outputs = _call_p.bind(*arguments, program=program, witnessed=witnessed)
    return outputs, out_places + [None] * witnessed


def _delete_unread(used, *others):
    """The rule for dead code elimination, by which `jax.checkpoint` skips unread outputs.

    A witnessed program stays whole if the output with the witness or its checksum is read.
    """
    equation = others[-1]  # jax 0.12 passes the live inputs as another argument before it
    program, witnessed = equation.params["program"], equation.params["witnessed"]
    if witnessed and (used[-1] or any(used[i] for i in _not_keys(program)[:1])):
        return [True] * len(equation.invars), equation
    # Without the flag of the checksum, which is unread in this case.
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


# The rule without a platform is used on TPUs. On a single NVIDIA GPU layouts are fixed as well.
mlir.register_lowering(_call_p, _lower_between_barriers)
mlir.register_lowering(_call_p, _lower_as_call, platform="cpu")
_lower_on_gpu = functools.partial(_lower_between_barriers, fix_layouts=_row_major)
mlir.register_lowering(_call_p, _lower_on_gpu, platform="cuda")
ad.primitive_jvps[_call_p] = _jvp
ad.primitive_transposes[_call_p] = _transpose
# A "fancy" rule is also given the axis, which collectives inside the program refer to by name.
batching.fancy_primitive_batchers[_call_p] = _batch
pe.dce_rules[_call_p] = _delete_unread
