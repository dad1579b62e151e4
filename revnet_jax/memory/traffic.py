"""What one run of a compiled program moves: bytes through memory, bytes between devices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from revnet_jax.memory import collectives
from revnet_jax.memory.hlo import Array, Computation, Instruction, Module, parse, trip_count

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
_HBM, _HOST = 0, 5  # memory spaces, as compilers number them
_FREE_CUSTOM_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
_NVIDIA_LIBRARIES = ('"__cublas', '"__cudnn')  # targets of custom calls
# Asynchronous ones whose result is what they take, followed by what they make.
_RESULT_HAS_OPERANDS = tuple(
    f"{kind}-start" for kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all")
)


class Traffic(NamedTuple):
    """Of one device, in one run of a program.

    hbm_bytes: read from and written to its memory; what stays on the chip does not count.
    host_bytes: the same of the host's memory, of what is kept there for the device.
    ici_bytes: what it sends to others of its slice, by kind of collective operation; a GPU, to
      others of its host, by NVLink.
    dcn_bytes: what it sends to other slices or hosts, likewise.
    """

    hbm_bytes: int
    host_bytes: int
    ici_bytes: dict[str, int]
    dcn_bytes: dict[str, int]


def traffic(text: str, slices: Sequence[int] = ()) -> Traffic:
    """Counts the operands and results of every instruction that is not fused into another.

    text: of a compiled program, `compiled.as_text()`.
    slices: of each device, in the program's order, on GPUs the host; without any, all are in one.

    A loop's body counts as often as it runs, and of a condition's branches the dearest. A slice
    read from or written into a longer array counts by its own size, rows that are gathered from or
    scattered into it likewise. An estimate: caches (of a CPU or GPU), what a compiler prefetches
    twice, and the workspace of cuBLAS and cuDNN are unknown.

    Of a collective operation among n devices counts what each must send: (n - 1) / n of what is
    gathered, scattered or exchanged, twice that where all learn a sum, and all that is permuted
    (as in products that a compiler splits into rounds, each sending a part on). An operation that
    runs beside others, and is in the text of each, counts once. Within slices and between them it
    goes in two stages (`collectives.sent_by_network`). TPUs of several slices run a program each,
    whose sums over slices are left to the host: those count here as if done like any other.
    """
    module = parse(text)
    return _Counter(module, slices).computation(module.entry)


class Leaf(NamedTuple):
    """An instruction that does something itself, how often a step runs it, and what that moves."""

    instruction: Instruction
    computation: Computation
    times: int
    traffic: Traffic


def leaves(module: Module) -> Iterator[Leaf]:
    """All that one run of a program runs, as `traffic` counts it."""
    yield from _Counter(module, ()).leaves(module.entry, 1)


class _Counter:
    def __init__(self, module: Module, slices: Sequence[int]):
        self._module, self._slices = module, slices
        self._known: dict[str, Traffic] = {}

    def computation(self, name: str) -> Traffic:
        if name not in self._known:
            computation = self._module.computations[name]
            parts = [self._instruction(i, computation) for i in computation.instructions.values()]
            self._known[name] = _total(parts)
            if name.startswith("all-reduce-scatter"):  # a sum of which each keeps a part
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
        if opcode in _FREE or opcode.endswith("-done") or opcode == "async-update":
            return _NOTHING
        if opcode == "custom-call" and any(t in instruction.attributes for t in _FREE_CUSTOM_CALLS):
            return _NOTHING
        operands = [computation.instructions[name].result for name in instruction.operands]
        sent = _total(inner)  # of a fusion with a collective inside
        if collectives.kind_of(instruction) or collectives.megascale(instruction):
            sent = self._sent(instruction, computation, _bytes(sum(operands, ())))
        hbm_bytes, host_bytes = (
            self._moved(instruction, operands, space) for space in (_HBM, _HOST)
        )
        return sent._replace(hbm_bytes=hbm_bytes, host_bytes=host_bytes)

    def _sent(self, instruction, computation, payload):
        """What one collective sends; `payload` is the bytes of its operands."""
        if exchange := collectives.megascale(instruction):
            kind, n = exchange
            gathered = n * payload if kind == "all-gather" else payload
            return _NOTHING._replace(dcn_bytes={kind: collectives.sent_bytes(kind, gathered, n)})
        if not _starts(instruction, computation):
            return _NOTHING
        kind = collectives.kind_of(instruction)
        if kind == "all-gather":  # by what it makes; an asynchronous one returns both
            payload = _bytes(instruction.result) - (payload if instruction.opcode != kind else 0)
        members = collectives.members(instruction, self._module.num_devices)
        found = collectives.sent_by_network(kind, payload, members, self._slices)
        ici_bytes, dcn_bytes = ({kind: num_bytes} if num_bytes else {} for num_bytes in found)
        return _NOTHING._replace(ici_bytes=ici_bytes, dcn_bytes=dcn_bytes)

    def _moved(self, instruction, operands, space):
        """Bytes through a memory, for an instruction that is neither control flow nor free."""
        opcode, result = instruction.opcode, instruction.result
        if opcode == "fusion":
            return self._fused(instruction, operands, result, space)
        if opcode == "fusion-start":  # returns its operands, then what it makes, and a context
            made = result[sum(map(len, operands)) : -1]
            return self._fused(instruction, operands, made, space)
        if opcode in ("dynamic-slice", "slice"):
            return _through(operands[0], space, _bytes(result)) + _bytes(result, space)
        if opcode in ("dynamic-slice-start", "slice-start"):
            moved = result[len(operands) : len(operands) + 1]  # after the operands themselves
            return _through(operands[0], space, _bytes(moved)) + _bytes(moved, space)
        if opcode in ("dynamic-update-slice", "dynamic-update-slice-start"):
            return _bytes(operands[1], space) + _through(operands[0], space, _bytes(operands[1]))
        if opcode == "copy-start":  # its result is the copy, the original, and a context
            return _bytes(operands[0], space) + _bytes(result[:1], space)
        if opcode == "send":
            return _bytes(operands[0], space)
        if opcode == "recv":  # its result is what is received, and a context
            return _bytes(result[:1], space)
        if opcode in _RESULT_HAS_OPERANDS:
            return _bytes(result, space)
        if _is_by_rows(instruction):
            rows = _bytes(result if opcode == "gather" else operands[-1])
            rest = sum(_bytes(arrays, space) for arrays in operands[1:])
            # What is gathered is written to the result; what is scattered into, read and written.
            return _through(operands[0], space, 2 * rows) + rest
        if opcode == "custom-call" and any(t in instruction.attributes for t in _NVIDIA_LIBRARIES):
            result = result[:-1]  # the last is a workspace
        return sum(_bytes(arrays, space) for arrays in operands) + _bytes(result, space)

    def _fused(self, instruction, operands, result, space):
        body = self._module.computations[instruction.callees[0]]
        given, made = _passed_on(instruction, body)
        read = sum(
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
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                total += _bytes(body.instructions[name].result)
        return total

    def _passes_through(self, nested: Computation, user: Instruction, name: str) -> bool:
        """Whether a fusion inside another one returns its operand `name` as it is."""
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
        if instruction.opcode == "scatter" and _is_by_rows(instruction):  # in place
            return _bytes(body.instructions[instruction.operands[-1]].result)
        return _bytes(instruction.result)


def _is_by_rows(instruction: Instruction) -> bool:
    """Whether it reads or changes a few rows of its first operand, one array."""
    is_scatter = instruction.opcode == "scatter" and len(instruction.operands) == 3
    return is_scatter or instruction.opcode == "gather"


def _starts(instruction: Instruction, computation: Computation) -> bool:
    """False in the later ones of the fusions that carry on an asynchronous collective."""
    if "chain_id=" not in instruction.attributes:
        return True
    users = computation.users[instruction.name]
    return any('"AsyncCollectiveStart"' in user.attributes for user in users)


def _passed_on(instruction: Instruction, body: Computation) -> tuple[set[int], set[int]]:
    """Operands and results that a fusion carries through, of a collective under way beside it."""
    if not any("chain_id=" in inner.attributes for inner in body.instructions.values()):
        return set(), set()
    _, _, aliases = instruction.attributes.partition("output_to_operand_aliasing={")
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", aliases)
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _as_reduce_scatter(found: Traffic) -> Traffic:
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
    """Of those in one memory, or of all."""
    return sum(array.num_bytes for array in arrays if space in (None, array.space))


def _through(arrays: Iterable[Array], space: int, num_bytes: int) -> int:
    """`num_bytes` of arrays that lie in this memory, or nothing."""
    return num_bytes if any(array.space == space for array in arrays) else 0
