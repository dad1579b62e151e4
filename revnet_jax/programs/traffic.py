"""Counts the bytes that one run of a compiled program moves through memory and between devices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from revnet_jax.programs import collectives
from revnet_jax.programs.hlo import Array, Computation, Instruction, Module, parse, trip_count

# Instructions that move no bytes.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
}
_RUNS_OTHERS = ("call", "call-start", "async-start")
_HBM, _HOST = 0, 5  # memory spaces in XLA's numbering
# Within a fusion their elements are computed where they are read.
_ELEMENTWISE_NAMES = """
abs add and ceil compare convert divide exponential floor maximum minimum multiply negate not or
power round-nearest-even rsqrt select sign sqrt subtract tanh xor
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
# They reserve memory, or view arrays that lie side by side as one, without a copy.
_FREE_CUSTOM_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
_NVIDIA_LIBRARIES = ('"__cublas', '"__cudnn')  # targets of custom calls
# Asynchronous collectives whose result is a tuple of the operands, followed by the output.
_RESULT_HAS_OPERANDS = tuple(
    f"{kind}-start" for kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all")
)


class Traffic(NamedTuple):
    """The bytes that one device moves in one run of a program.

    Attributes:
      hbm_bytes: read from and written to its memory; values that stay on the chip do not count.
      host_bytes: read from and written to arrays that are offloaded to the host's memory.
      ici_bytes: sent to other devices of its slice, by kind of collective operation; on GPUs, to
        others of its host, by NVLink.
      dcn_bytes: sent to other slices (on GPUs, hosts), by kind of collective operation.
    """

    hbm_bytes: int
    host_bytes: int
    ici_bytes: dict[str, int]
    dcn_bytes: dict[str, int]


def traffic(text: str, slices: Sequence[int] = ()) -> Traffic:
    """Adds up the operands and results of every instruction that is not fused into another.

    Args:
      text: of a compiled program, `compiled.as_text()`.
      slices: the slice of each device, in the program's order (on GPUs its host); if empty, all are
        in one slice.

    A loop's body counts as often as it runs, and a conditional as its most expensive branch. A
    slice read from or written into a longer array counts by its own size, and so do rows gathered
    from it or scattered into it. This is an estimate: caches (of a CPU or GPU), values that a
    compiler prefetches twice, and the workspace of cuBLAS and cuDNN are not known.

    A collective operation among n devices counts as what each must send: (n - 1) / n of the data
    for an all-gather, reduce-scatter or all-to-all, twice that for an all-reduce, and all data for
    a permutation (as in a collective matrix product, which the compiler splits into rounds). An
    asynchronous collective that is fused into several instructions counts once. A collective that
    spans slices has two stages (`collectives.sent_by_network`). Each of several TPU slices runs a
    program of its own and leaves reductions over slices to the host, which are counted like all
    others.
    """
    module = parse(text)
    return _Counter(module, slices).computation(module.entry)


class Leaf(NamedTuple):
    """An instruction that is no control flow, how often a step runs it, and what one run moves."""

    instruction: Instruction
    computation: Computation
    times: int
    traffic: Traffic


def leaves(module: Module) -> Iterator[Leaf]:
    """Yields all instructions that one run of a program executes, as `traffic` counts them."""
    yield from _Counter(module, ()).leaves(module.entry, 1)


class _Counter:
    def __init__(self, module: Module, slices: Sequence[int]):
        self._module, self._slices = module, slices
        self._known: dict[str, Traffic] = {}

    def computation(self, name: str) -> Traffic:
        # Computed once: loops nest, and a computation may be called from several places.
        if name not in self._known:
            computation = self._module.computations[name]
            parts = [self._instruction(i, computation) for i in computation.instructions.values()]
            self._known[name] = _total(parts)
            # XLA's TPU compiler fuses an all-reduce and a slice into a reduce-scatter.
            if name.startswith("all-reduce-scatter"):
                self._known[name] = _as_reduce_scatter(self._known[name])
        return self._known[name]

    def leaves(self, name: str, times: int) -> Iterator[Leaf]:
        computation = self._module.computations[name]
        for instruction in computation.instructions.values():
            opcode, callees = instruction.opcode, instruction.callees
            if opcode == "while":
                yield from self.leaves(*callees, times * trip_count(self._module, instruction))
            elif opcode == "conditional":
                dearest = max(callees, key=lambda branch: self.computation(branch).hbm_bytes)
                yield from self.leaves(dearest, times)
            elif opcode in _RUNS_OTHERS:
                for callee in callees:
                    yield from self.leaves(callee, times)
            elif opcode not in _FREE:
                moved = self._instruction(instruction, computation)
                yield Leaf(instruction, computation, times, moved)

    def _instruction(self, instruction: Instruction, computation: Computation) -> Traffic:
        opcode = instruction.opcode
        inner = [self.computation(name) for name in instruction.callees]
        if opcode == "while":
            (body,) = inner
            n = trip_count(self._module, instruction)
            return _total([body], times=n)
        if opcode == "conditional":
            return max(inner, key=lambda branch: branch.hbm_bytes)
        if opcode in _RUNS_OTHERS:
            return _total(inner)
        # The end of an asynchronous operation: all was counted at its start.
        if opcode in _FREE or opcode.endswith("-done") or opcode == "async-update":
            return _NOTHING
        if opcode == "custom-call" and any(t in instruction.attributes for t in _FREE_CUSTOM_CALLS):
            return _NOTHING
        operands = [computation.instructions[name].result for name in instruction.operands]
        sent = _total(inner)  # a fusion may have a collective inside
        if collectives.kind_of(instruction) or collectives.megascale(instruction):
            sent = self._sent(instruction, computation, _bytes(sum(operands, ())))
        hbm_bytes, host_bytes = (
            self._moved(instruction, operands, space) for space in (_HBM, _HOST)
        )
        return sent._replace(hbm_bytes=hbm_bytes, host_bytes=host_bytes)

    def _sent(self, instruction, computation, payload):
        """The bytes that one collective sends. payload: bytes of its operands."""
        if exchange := collectives.megascale(instruction):
            kind, n = exchange
            # What is sent is the slice's own part of what will be gathered.
            gathered = n * payload if kind == "all-gather" else payload
            return _NOTHING._replace(dcn_bytes={kind: collectives.sent_bytes(kind, gathered, n)})
        kind = collectives.kind_of(instruction)
        if kind is None or not _starts(instruction, computation):
            return _NOTHING
        # An all-gather counts by its output; an asynchronous one returns its operands too.
        if kind == "all-gather":
            payload = _bytes(instruction.result) - (payload if instruction.opcode != kind else 0)
        members = collectives.members(instruction, self._module.num_devices)
        found = collectives.sent_by_network(kind, payload, members, self._slices)
        ici_bytes, dcn_bytes = ({kind: num_bytes} if num_bytes else {} for num_bytes in found)
        return _NOTHING._replace(ici_bytes=ici_bytes, dcn_bytes=dcn_bytes)

    def _moved(self, instruction, operands, space):
        """Bytes read and written in a memory space by an instruction that is no control flow."""
        opcode, result = instruction.opcode, instruction.result
        if opcode == "fusion":
            return self._fused(instruction, operands, result, space)
        if opcode == "fusion-start":  # returns its operands, its results, and a context
            made = result[sum(map(len, operands)) : -1]
            return self._fused(instruction, operands, made, space)
        if opcode in ("dynamic-slice", "slice"):
            return _through(operands[0], space, _bytes(result)) + _bytes(result, space)
        if opcode in ("dynamic-slice-start", "slice-start"):
            moved = result[len(operands) : len(operands) + 1]  # after the operands themselves
            return _through(operands[0], space, _bytes(moved)) + _bytes(moved, space)
        # In place: the update is read, and written over a part of the longer array.
        if opcode in ("dynamic-update-slice", "dynamic-update-slice-start"):
            return _bytes(operands[1], space) + _through(operands[0], space, _bytes(operands[1]))
        if opcode == "copy-start":  # its result is the copy, the original, and a context
            return _bytes(operands[0], space) + _bytes(result[:1], space)
        if opcode == "send":
            return _bytes(operands[0], space)
        if opcode == "recv":  # its result is the received array and a context
            return _bytes(result[:1], space)
        if opcode in _RESULT_HAS_OPERANDS:
            return _bytes(result, space)
        if _is_by_rows(instruction):
            rows = _bytes(result if opcode == "gather" else operands[-1])
            rest = sum(_bytes(arrays, space) for arrays in operands[1:])
            # A gather reads the rows and writes them to its result; a scatter reads the old rows
            # and writes the new ones.
            return _through(operands[0], space, 2 * rows) + rest
        if opcode == "custom-call" and any(t in instruction.attributes for t in _NVIDIA_LIBRARIES):
            result = result[:-1]  # leave out the workspace, which comes last
        return sum(_bytes(arrays, space) for arrays in operands) + _bytes(result, space)

    def _fused(self, instruction, operands, result, space):
        """Bytes of a fusion: what its body reads of each operand, and writes of each result."""
        body = self._module.computations[instruction.callees[0]]
        given, made = _passed_on(instruction, body)
        read = sum(
            # Once at most, however many instructions of the fusion read it.
            min(_bytes(arrays, space), self._read(body, parameter.name))
            for i, (arrays, parameter) in enumerate(zip(operands, body.parameters, strict=True))
            if i not in given
        )
        result = [array for i, array in enumerate(result) if i not in made]
        return read + min(_bytes(result, space), self._written(body, body.root))

    def _read(self, body: Computation, name: str) -> int:
        """Bytes of `name` that a fused computation reads."""
        total = 0
        for user in body.users[name]:
            # Another view of the same bytes: what is read of it is read here.
            if user.opcode == "bitcast":
                total += self._read(body, user.name)
            elif user.opcode == "fusion":
                nested = self._module.computations[user.callees[0]]
                total += sum(
                    self._read(nested, parameter.name)
                    for parameter, operand in zip(nested.parameters, user.operands, strict=True)
                    if operand == name
                )
                if self._passes_through(nested, user, name):
                    total += self._read(body, user.name)
            elif user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
                total += _bytes(user.result)
            elif _is_by_rows(user) and user.operands[0] == name:
                rows = user if user.opcode == "gather" else body.instructions[user.operands[-1]]
                total += _bytes(rows.result)
            elif user.opcode in _ELEMENTWISE and self._only_sliced(body, user.name):
                # Computed where it is read: of each operand as many elements as of the result.
                whole, part = _bytes(user.result), self._read(body, user.name)
                total += _bytes(body.instructions[name].result) * part // whole
            # The longer array that is updated in place is not read, everything else is read whole.
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                total += _bytes(body.instructions[name].result)
        return total

    def _only_sliced(self, body: Computation, name: str) -> bool:
        """Whether slices of `name` are all that a fused computation needs of it."""
        users = body.users[name]
        return bool(users) and all(
            user.opcode == "slice"
            or (user.opcode in _ELEMENTWISE and self._only_sliced(body, user.name))
            for user in users
        )

    def _passes_through(self, nested: Computation, user: Instruction, name: str) -> bool:
        """Whether a nested fusion returns its operand `name` unchanged."""
        root = nested.instructions[nested.root]
        while root.opcode == "bitcast":
            root = nested.instructions[root.operands[0]]
        return root.opcode == "parameter" and user.operands[int(root.arguments)] == name

    def _written(self, body: Computation, name: str) -> int:
        """Bytes that a fused computation writes for its result `name`."""
        instruction = body.instructions[name]
        if instruction.opcode in ("bitcast", "tuple"):
            return sum(self._written(body, operand) for operand in instruction.operands)
        if instruction.opcode == "fusion":
            nested = self._module.computations[instruction.callees[0]]
            return self._written(nested, nested.root)
        if instruction.opcode == "dynamic-update-slice":
            return _bytes(body.instructions[instruction.operands[1]].result)
        if instruction.opcode == "scatter" and _is_by_rows(instruction):  # updates in place
            return _bytes(body.instructions[instruction.operands[-1]].result)
        return _bytes(instruction.result)


def _is_by_rows(instruction: Instruction) -> bool:
    """Whether it is a gather, or a scatter into one array: it touches only rows of that array."""
    is_scatter = instruction.opcode == "scatter" and len(instruction.operands) == 3
    return is_scatter or instruction.opcode == "gather"


def _starts(instruction: Instruction, computation: Computation) -> bool:
    """Whether a collective starts here; False in later fusions that continue an asynchronous one.

    The TPU compiler may spread one collective over a chain of fusions, with a `chain_id`.
    """
    if "chain_id=" not in instruction.attributes:
        return True
    users = computation.users[instruction.name]
    return any('"AsyncCollectiveStart"' in user.attributes for user in users)


def _passed_on(instruction: Instruction, body: Computation) -> tuple[set[int], set[int]]:
    """Indices of operands and results that a fusion passes through unchanged.

    They belong to an asynchronous collective that overlaps with the fusion.
    """
    if not any("chain_id=" in inner.attributes for inner in body.instructions.values()):
        return set(), set()
    _, _, aliases = instruction.attributes.partition("output_to_operand_aliasing={")
    # {0}: (2, {}) says that result 0 is operand 2; {} in its place that there is one result.
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", aliases)
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _as_reduce_scatter(found: Traffic) -> Traffic:
    """Counts an all-reduce as a reduce-scatter, which sends half as much."""
    half = lambda sent: {"reduce-scatter": sum(sent.values()) // 2} if sent else {}
    return found._replace(ici_bytes=half(found.ici_bytes), dcn_bytes=half(found.dcn_bytes))


def _total(parts: Iterable[Traffic], times: int = 1) -> Traffic:
    hbm_bytes, host_bytes, ici, dcn = 0, 0, Counter(), Counter()
    for part in parts:
        hbm_bytes += times * part.hbm_bytes
        host_bytes += times * part.host_bytes
        for total, sent in ((ici, part.ici_bytes), (dcn, part.dcn_bytes)):
            total.update({kind: times * n for kind, n in sent.items()})
    return Traffic(hbm_bytes, host_bytes, dict(ici), dict(dcn))


_NOTHING = _total([])


def _bytes(arrays: Iterable[Array], space: int | None = None) -> int:
    """Bytes of the arrays in one memory space, or in all if `space` is None."""
    return sum(array.num_bytes for array in arrays if space in (None, array.space))


def _through(arrays: Iterable[Array], space: int, num_bytes: int) -> int:
    """`num_bytes` if the arrays are in this memory space, else 0."""
    return num_bytes if any(array.space == space for array in arrays) else 0
