import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import keeping_operands, reversible_block
from revnet_jax.core.block import Context
from revnet_jax.core.evaluate import evaluate_branch
from revnet_jax.core.isolate import depending_on
from revnet_jax.core.residuals import computing_again, fewest_residuals


def gelu(w, x):
    return jax.nn.gelu(x @ w)


def gated(w, x):
    gate, value = jnp.split(x @ w, 2, axis=-1)
    return jax.nn.silu(gate) * value


def unstacked(w, x):
    gate, value = jnp.unstack((x @ w).reshape(len(x), 2, -1), axis=1)
    return jax.nn.silu(gate) * value


def normalised(w, x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) @ w


def rectified(w, x):
    return jax.nn.relu((x @ w).astype(jnp.bfloat16)).astype(jnp.float32) @ w


def linearized(function):
    """(the jaxpr of residuals, which of its inputs is x, the residuals)."""
    w, x = jnp.ones((6, 6)), jnp.ones((4, 6))
    program = jax.make_jaxpr(lambda w, x: jax.linearize(function, w, x)[1])(w, x)
    return program, program.jaxpr.invars[1], program.jaxpr.outvars


def cheapest(program, x, needed):
    """The fewest bytes, by trying every set of variables."""
    jaxpr = program.jaxpr
    varies = depending_on(jaxpr.invars, jaxpr)
    written = lambda e: e.primitive.name in ("dot_general", "reduce_sum")
    at_cost = {x: 1}
    for e in jaxpr.eqns:
        at_cost |= {v: 1 if written(e) else 2 for v in e.outvars if varies(v)}
    at_cost |= {v: 1 for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.invars}
    at_cost.pop(jaxpr.invars[0])
    size = lambda v: v.aval.size * v.aval.dtype.itemsize * at_cost[v]

    def suffices(kept):
        known = {jaxpr.invars[0], *kept}
        for e in jaxpr.eqns:
            if not written(e) and all(map(lambda v: not varies(v) or v in known, e.invars)):
                known.update(e.outvars)
        return all(not varies(v) or v in known for v in needed)

    sets = itertools.chain.from_iterable(
        itertools.combinations(at_cost, n) for n in range(min(len(at_cost), 4) + 1)
    )
    return min(sum(map(size, kept)) for kept in sets if suffices(kept)), size


@pytest.mark.parametrize("function", [gelu, gated, normalised, rectified])
def test_no_other_set_costs_less(function):
    program, x, needed = linearized(function)
    kept = fewest_residuals(program.jaxpr, needed, [x])
    least, size = cheapest(program, x, needed)
    assert sum(map(size, kept)) == least > 0


@pytest.mark.parametrize("keep_operands", [False, True])
@pytest.mark.parametrize("function", [gelu, gated, normalised, rectified])
def test_what_is_computed_again_is_what_was_needed(function, keep_operands):
    program, x, needed = linearized(function)
    kept = fewest_residuals(program.jaxpr, needed, [x], keep_operands=keep_operands)
    again, is_read = computing_again(program.jaxpr, kept, needed)
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(6, 6), (4, 6)]))
    run = lambda outputs: jax.core.eval_jaxpr(program.jaxpr.replace(outvars=outputs), [], w, x)
    given = [value for value, is_it in zip([w, x, *run(kept)], is_read, strict=True) if is_it]
    names = {equation.primitive.name for equation in again.eqns}
    assert not names & {"dot_general", "reduce_sum"} or (keep_operands and function is normalised)
    assert "dot_general" not in names
    for value, expected in zip(jax.core.eval_jaxpr(again, [], *given), run(needed), strict=True):
        np.testing.assert_array_equal(value, expected)


def kept_bytes(function, w, x, **options):
    """What the pullback of an evaluated branch holds, without its parameters."""
    branch = lambda w, x, context: function(w, x)
    run = lambda w, x: evaluate_branch(branch, w, x, None, **options)[0]
    _, pullback = jax.eval_shape(lambda w, x: jax.vjp(run, w, x), w, x)
    leaves = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape != w.shape]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("branch", [gated, unstacked])
def test_a_gated_branch_keeps_what_it_read_and_one_product(branch):
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 64), (1000, 8)])
    assert kept_bytes(branch, w, x) == 4 * 1000 * (8 + 64)


def test_operands_of_products_are_kept_if_asked_for():
    """What the second product reads, beside what the branch read and the first product."""
    twice = lambda w, x: gelu(w, x) @ w.T
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 64), (1000, 8)])
    assert kept_bytes(twice, w, x) == 4 * 1000 * (8 + 64)
    assert kept_bytes(twice, w, x, keep_operands=True) == 4 * 1000 * (8 + 64 + 64)


def test_blocks_keep_operands_if_asked_for():
    block = reversible_block(*[lambda w, x, c: gelu(w, x) @ w.T] * 2)
    x, params = (jax.ShapeDtypeStruct((1000, 8), jnp.float32),) * 2, (jnp.ones((8, 64)),) * 2

    def kept(block):
        run = lambda params, x: block.forward(params, x, Context(None, None)).y
        pullback = jax.eval_shape(lambda params, x: jax.vjp(run, params, x)[1], params, x)
        return [leaf.shape for leaf in jax.tree.leaves(pullback)].count((1000, 64))

    assert (kept(block), kept(keeping_operands(block))) == (2, 4)


def test_the_sum_of_a_norm_is_computed_again_where_its_product_is_kept():
    """So that the norm can be one pass: its sum has no reader but the norm itself."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(8, 8), (1000, 8)])
    assert kept_bytes(normalised, w, x) == 4 * 1000 * (8 + 1)
    assert kept_bytes(normalised, w, x, keep_operands=True) == 4 * 1000 * (8 + 8)


def test_a_branch_of_bfloat16_does_not_keep_what_it_read_in_float32():
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(64, 64), (1000, 64)])
    product = lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    assert kept_bytes(product, w, x) == 2 * 1000 * 64


def test_a_branch_that_is_computed_from_no_input():
    block = reversible_block(lambda p, x, c: jnp.ones_like(x) * p, lambda p, x, c: jnp.tanh(p + x))
    run = lambda params, x: block.forward(params, x, Context(None, None)).y[0].sum()
    gradient = jax.grad(run)((jnp.float32(2), jnp.float32(1)), (jnp.ones((3, 2)),) * 2)
    assert gradient == (6, 0)
