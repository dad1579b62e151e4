"""Chooses the residuals of a derivative: the intermediates to keep, in as few bytes as possible.

Elementwise arithmetic costs less than writing its results and reading them back. So a derivative
recomputes it from the results of products, convolutions and sums. The residuals are a minimum cut
between those results and the values that the derivative needs (He & Yu 2023, "Transcending
runtime-memory tradeoffs in checkpointing by being fusion aware", MLSys).

With `keep_operands` the operands of products are kept as well. To compute one again is not as
cheap, because no product fuses it: it is written to memory once more, and read. Keeping it pays
where the residuals of one layer live at a time, as under `reverse`.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from jax.interpreters import partial_eval as pe

from revnet_jax.core.isolate import depending_on

# Primitives that are recomputed rather than kept, because compilers fuse them into their readers.
_CHEAP_NAMES = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type broadcast_in_dim
cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2 expand_dims
expm1 floor ge gt imag integer_pow iota is_finite le log log1p logistic lt max min mul name ne neg
nextafter not one_minus_square or pow pvary real rem reshape rev round rsqrt select_n
sharding_constraint sign sin sinh slice split sqrt square squeeze stop_gradient sub tan tanh
transpose unstack xor
"""
_CHEAP = frozenset(_CHEAP_NAMES.split())
# Primitives that only call another jaxpr, and the parameter that holds it.
# `jit` was called pjit in earlier versions of JAX.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
}


def fewest_residuals(
    jaxpr: Any, needed: Sequence[Any], costly: Sequence[Any], *, keep_operands: bool = False
) -> list[Any]:
    """The variables to keep, from which cheap arithmetic computes all that are needed.

    Args:
      needed: variables and literals of the jaxpr.
      costly: those of its inputs that cost memory to keep. The other inputs are available in the
        backward pass anyway, as is everything that depends on no input.
      keep_operands: keep also every needed operand of a product or convolution that depends on a
        costly input (weights in another dtype do not, and are as large as weights). Sums over the
        last axis of what is at hand are then computed again: without another reader of its sum, a
        norm can be one pass, and in the derivative the sum shares a pass with another.

    Among cuts of equal size, takes the one nearest to the needed variables.
    """
    # What no input enters (tables, masks) is made anew in the derivative and costs no memory.
    varies = depending_on(jaxpr.invars, jaxpr)
    at_hand = set(map(id, jaxpr.invars)) - set(map(id, costly))
    is_in_graph = lambda variable: varies(variable) and id(variable) not in at_hand
    # Each variable is two nodes, "in" and "out". Cutting the edge between them means keeping it;
    # all other edges are infinite and cannot be cut. Nodes go by id: literals are not hashable.
    written, source, sink = set(map(id, costly)), "source", "sink"
    given, edges, operands = list(costly), [], set()
    for equation in jaxpr.eqns:
        outputs = [v for v in equation.outvars if is_in_graph(v)]
        inputs = [v for v in equation.invars if is_in_graph(v)]
        if _is_cheap(equation) or (keep_operands and _sums_last_axis(equation)):
            # To compute b again, each input a must be kept, or computed again in its turn.
            edges += [((id(a), "out"), (id(b), "in"), math.inf) for a in inputs for b in outputs]
            continue
        # Costly results are never computed again. The source feeds them, so something is kept on
        # each path from them to what is needed.
        given += outputs
        written |= set(map(id, outputs))
        # A product or convolution reads its inputs from memory, so they are written anyway. A
        # reduction is fused with the arithmetic that computes its inputs.
        if not equation.primitive.name.startswith("reduce"):
            written |= set(map(id, inputs))
            operands |= set(map(id, inputs))
    variables = {id(v): v for e in jaxpr.eqns for v in e.outvars if is_in_graph(v)}
    variables |= {id(v): v for v in costly}
    for key, variable in variables.items():
        # Keeping a variable costs a write and a read; only the read if it is written anyway.
        edges.append(((key, "in"), (key, "out"), _bytes(variable) * (1 if key in written else 2)))
    edges += [(source, (id(v), "in"), math.inf) for v in given]
    is_costly = depending_on(costly, jaxpr)
    anyway = {id(v) for v in needed if keep_operands and id(v) in operands and is_costly(v)}
    computed = [v for v in needed if is_in_graph(v) and id(v) not in anyway]
    edges += [((id(v), "out"), sink, math.inf) for v in computed]
    # Kept are the variables whose own edge crosses the cut.
    behind = _behind_minimum_cut(edges, source, sink)
    is_cut = lambda key: (key, "out") in behind and (key, "in") not in behind
    return [v for key, v in variables.items() if key in anyway or is_cut(key)]


def computing_again(jaxpr: Any, kept: Sequence[Any], needed: Sequence[Any]) -> tuple[Any, list]:
    """(a jaxpr that computes `needed` from inputs and kept variables, which of them it reads).

    The second is a list of bools: inputs of the original jaxpr first, then the kept variables.
    """
    given = set(map(id, kept))
    # What computed a kept variable now writes to a fresh name, which nobody reads, so it is
    # deleted. The old name becomes an input.
    renamed = lambda variable: type(variable)(variable.aval) if id(variable) in given else variable
    equations = [e.replace(outvars=list(map(renamed, e.outvars))) for e in jaxpr.eqns]
    again = jaxpr.replace(invars=[*jaxpr.invars, *kept], outvars=list(needed), eqns=equations)
    return pe.dce_jaxpr(again, True)


def _is_cheap(equation):
    inner = equation.params.get(_CALLS.get(equation.primitive.name, ""))
    if inner is not None:
        # Only equations that depend on an input count: on a mesh there is also a `reshard` of each
        # constant, which costs nothing.
        varies = depending_on(inner.jaxpr.invars, inner.jaxpr)
        return all(_is_cheap(e) for e in inner.eqns if any(map(varies, e.outvars)))
    return equation.primitive.name in _CHEAP


def _sums_last_axis(equation):
    if equation.primitive.name != "reduce_sum":
        return False
    (operand,) = equation.invars
    return tuple(equation.params["axes"]) == (operand.aval.ndim - 1,)


def _bytes(variable):
    aval = variable.aval
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "dtype") else math.inf


def _behind_minimum_cut(edges, source, sink):
    """The nodes on the sink's side of a minimum cut (Edmonds & Karp 1972)."""
    room: dict[Any, dict[Any, float]] = defaultdict(dict)
    for start, end, capacity in edges:
        room[start][end] = room[start].get(end, 0) + capacity
        # Backwards there is room only for flow that was sent forwards, to take it back.
        room[end].setdefault(start, 0)

    def reaching_sink():
        """{node: the next node on its shortest path to the sink}, for nodes that have a path."""
        follows, queue = {sink: sink}, deque([sink])
        while queue:
            end = queue.popleft()
            for start in room[end]:
                if start not in follows and room[start][end] > 0:
                    follows[start] = end
                    queue.append(start)
        return follows

    while source in (follows := reaching_sink()):
        path, node = [], source
        while node != sink:
            path.append((node, follows[node]))
            node = follows[node]
        # As much as the narrowest edge lets through. That edge is then full, so the path is closed.
        flow = min(room[start][end] for start, end in path)
        for start, end in path:
            room[start][end] -= flow
            room[end][start] += flow
    return follows
