"""What one run of a compiled program moves: bytes through memory, bytes between devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from revnet_jax.memory.hlo import Array, Computation, Instruction, Module, parse, trip_count

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
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
_HBM, _HOST = 0, 5  # memory spaces, as compilers number them
_FREE_CUSTOM_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')


class Traffic(NamedTuple):
    """Of one device, in one run of a program.

    hbm_bytes: read from and written to its memory; what stays on the chip does not count.
    host_bytes: the same of the host's memory, of what is kept there for the device.
    collectives: bytes that enter collective operations (all-gather: that leave), by their kind.
    """

    hbm_bytes: int
    host_bytes: int
    collectives: dict[str, int]


def traffic(text: str) -> Traffic:
    """Counts the operands and results of every instruction that is not fused into another.

    text: of a compiled program, `compiled.as_text()`.

    A loop's body counts as often as it runs, and of a condition's branches the dearest. A slice
    read from or written into a longer array counts by its own size. An estimate: caches (of a
    CPU or GPU) and what a compiler prefetches twice are unknown.
    """
    module = parse(text)
    return _Counter(module).computation(module.entry)


class _Counter:
    def __init__(self, module: Module):
        self._module = module
        self._known: dict[str, Traffic] = {}

    def computation(self, name: str) -> Traffic:
        if name not in self._known:
            computation = self._module.computations[name]
            parts = [self._instruction(i, computation) for i in computation.instructions.values()]
            self._known[name] = _total(parts)
        return self._known[name]

    def _instruction(self, instruction: Instruction, computation: Computation) -> Traffic:
        opcode = instruction.opcode
        inner = [self.computation(name) for name in instruction.callees]
        if opcode == "while":
            (body,) = inner
            n = trip_count(self._module, instruction)
            return _total([body], times=n)
        if opcode == "conditional":
            return max(inner, key=lambda branch: branch.hbm_bytes)
        if opcode in ("call", "async-start"):
            return _total(inner)
        if opcode in _FREE or opcode.endswith("-done") or opcode == "async-update":
            return _NOTHING
        if opcode == "custom-call" and any(t in instruction.attributes for t in _FREE_CUSTOM_CALLS):
            return _NOTHING
        operands = [computation.instructions[name].result for name in instruction.operands]
        collectives = _total(inner).collectives  # of a fusion with a collective inside
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            payload = _bytes(sum(operands, ()))
            if kind == "all-gather":  # by what it makes; an asynchronous one returns both
                payload = _bytes(instruction.result) - (payload if opcode != kind else 0)
            collectives = {kind: payload}
        hbm_bytes, host_bytes = (
            self._moved(instruction, operands, space) for space in (_HBM, _HOST)
        )
        return Traffic(hbm_bytes, host_bytes, collectives)

    def _moved(self, instruction, operands, space):
        """Bytes through a memory, for an instruction that is neither control flow nor free."""
        opcode, result = instruction.opcode, instruction.result
        if opcode == "fusion":
            body = self._module.computations[instruction.callees[0]]
            read = sum(
                min(_bytes(arrays, space), self._read(body, parameter.name))
                for arrays, parameter in zip(operands, body.parameters, strict=True)
            )
            return read + min(_bytes(result, space), self._written(body, body.root))
        if opcode in ("dynamic-slice", "slice"):
            return _through(operands[0], space, _bytes(result)) + _bytes(result, space)
        if opcode in ("dynamic-slice-start", "slice-start"):
            moved = result[len(operands) : len(operands) + 1]  # after the operands themselves
            return _through(operands[0], space, _bytes(moved)) + _bytes(moved, space)
        if opcode in ("dynamic-update-slice", "dynamic-update-slice-start"):
            return _bytes(operands[1], space) + _through(operands[0], space, _bytes(operands[1]))
        if opcode == "copy-start":  # its result is the copy, the original, and a context
            return _bytes(operands[0], space) + _bytes(result[:1], space)
        return sum(_bytes(arrays, space) for arrays in operands) + _bytes(result, space)

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
            elif user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
                total += _bytes(user.result)
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                total += _bytes(body.instructions[name].result)
        return total

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
        return _bytes(instruction.result)


def _total(parts: Iterable[Traffic], times: int = 1) -> Traffic:
    hbm_bytes, host_bytes, collectives = 0, 0, Counter()
    for part in parts:
        hbm_bytes += times * part.hbm_bytes
        host_bytes += times * part.host_bytes
        collectives.update({kind: times * n for kind, n in part.collectives.items()})
    return Traffic(hbm_bytes, host_bytes, dict(collectives))


_NOTHING = _total([])


def _bytes(arrays: Iterable[Array], space: int | None = None) -> int:
    """Of those in one memory, or of all."""
    return sum(array.num_bytes for array in arrays if space in (None, array.space))


def _through(arrays: Iterable[Array], space: int, num_bytes: int) -> int:
    """`num_bytes` of arrays that lie in this memory, or nothing."""
    return num_bytes if any(array.space == space for array in arrays) else 0
