"""Live bytes over the run of a compiled program, from its schedule and buffer addresses.

Outer loops are followed iteration by iteration. A stacked array, which a loop writes or reads one
slice per iteration, is allocated whole by the compiler; here only its slices that are written and
yet to be read are live. All other buffers count as the compiler allocates them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from revnet_jax.programs.buffers import AssignedInstruction, Assignment, Buffer

# Instructions that compute nothing: they take no time step.
_FORWARDING = {"get-tuple-element", "tuple", "bitcast", "parameter", "constant"}


class Liveness(NamedTuple):
    """Bytes at every executed instruction; of inner loops one iteration is shown.

    Attributes:
      live_bytes: temporary memory that holds values yet to be read.
      allocated_bytes: the same with stacked arrays counted whole.
      turn: the instruction where the first loop of the backward pass starts.
    """

    live_bytes: np.ndarray
    allocated_bytes: np.ndarray
    turn: int


class _Interval(NamedTuple):
    """A buffer is live from instruction `start` up to `stop`, exclusive."""

    start: int
    stop: int
    buffer: Buffer
    share: float = 1.0  # the live part of a stacked array


class _Walk:
    """Follows the program and records when each buffer is live."""

    def __init__(self, program: Assignment):
        self.program = program
        self.time = 0
        self.intervals: list[_Interval] = []
        self.shares: list[_Interval] = []
        self.turn: int | None = None
        self._holders = _Holders(program)

    def run(self, computation_id: int, *, depth: int = 0) -> None:
        """Follows one run of a computation and of the computations that it calls."""
        computation = self.program.computations[computation_id]
        held = self._holders.of(computation_id)
        spans: dict[Buffer, tuple[int, int]] = {}
        loops = []
        for instruction in computation.instructions:
            start = self.time
            turns = self._step(instruction, depth)
            if instruction.opcode not in _FORWARDING:
                # Operands are read until the instruction ends; for a loop or call, until what it
                # runs ends.
                for operand in instruction.operands:
                    for buffer in _flat(held[operand]):
                        spans[buffer] = (spans[buffer][0], self.time)
            for buffer in _flat(held[instruction.id]):
                spans.setdefault(buffer, (start, self.time))
            if turns:
                loops.append((instruction, turns))
        # The caller still reads the result.
        for buffer in _flat(held[computation.root]):
            spans[buffer] = (spans[buffer][0], self.time)
        self.intervals += [_Interval(*span, buffer) for buffer, span in spans.items()]
        for loop, turns in loops:
            self._fill(loop, turns, spans, held)

    def _step(self, instruction, depth):
        """Advances time by one instruction.

        For an outermost loop, returns the start times of its iterations, and its end; else None.
        """
        if instruction.opcode == "while":
            # JAX names an operation of a backward pass "transpose(...)".
            if self.turn is None and instruction.trips > 1 and "transpose(" in instruction.name:
                self.turn = self.time
            turns = []
            # One iteration of an inner loop stands for all: otherwise trip counts would multiply.
            for _ in range(instruction.trips if depth == 0 else 1):
                turns.append(self.time)
                self.run(instruction.callees[0], depth=depth + 1)
            return [*turns, self.time] if depth == 0 else None
        if instruction.opcode == "call":
            self.run(instruction.callees[0], depth=depth)
        elif instruction.opcode == "conditional":
            # Which branch runs is not known; the longest is taken to be the one that does the work.
            longest = lambda i: len(self.program.computations[i].instructions)
            self.run(max(instruction.callees, key=longest), depth=depth)
        elif instruction.opcode not in _FORWARDING:
            self.time += 1
        return None

    def _fill(self, loop, turns, spans, held):
        """Records the live share of a loop's stacked arrays at each of its iterations."""
        for index, fills in _stacked(self.program, loop):
            carried = held[loop.id].get((index,), ())
            if fills:
                # Nothing of an array that the loop will fill is live before it.
                for buffer in held[loop.operands[0]].get((index,), ()):
                    self.shares.append(_Interval(spans[buffer][0], turns[0], buffer, 0.0))
            elif any(spans[buffer][1] > turns[-1] for buffer in carried):
                continue  # read again after the loop, so that it stays live as a whole
            for buffer in carried:
                for i in range(loop.trips):
                    # In iteration i, i + 1 slices are written, or trips - i have yet to be read.
                    share = (i + 1 if fills else loop.trips - i) / loop.trips
                    self.shares.append(_Interval(turns[i], turns[i + 1], buffer, share))


class _Holders:
    """Finds the buffers in the result of each instruction, by path into its tuples."""

    def __init__(self, program: Assignment):
        self._program = program
        self._made: dict[int, dict[tuple[int, ...], list[Buffer]]] = {}
        for buffer in program.buffers:
            instruction, path = buffer.definition
            self._made.setdefault(instruction, {}).setdefault(path, []).append(buffer)
        self._known: dict[int, dict[int, dict]] = {}

    def of(self, computation_id: int) -> dict[int, dict[tuple[int, ...], list[Buffer]]]:
        """The buffers of every instruction of a computation: {instruction: {path: buffers}}."""
        if computation_id not in self._known:
            held: dict[int, dict] = {}
            for instruction in self._program.computations[computation_id].instructions:
                passed = self._passed_on(instruction, held)
                held[instruction.id] = passed | self._made.get(instruction.id, {})
            self._known[computation_id] = held
        return self._known[computation_id]

    def _passed_on(self, instruction, held):
        """The buffers in a result that other instructions have defined."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "tuple":
            inner = enumerate(held[operand] for operand in operands)
            return {(i, *path): buffers for i, of in inner for path, buffers in of.items()}
        if opcode == "get-tuple-element":
            of = held[operands[0]].items()
            return {path[1:]: buffers for path, buffers in of if path[:1] == (instruction.index,)}
        # These return the memory of their operand: a loop updates what it carries in place.
        if opcode in ("while", "bitcast", "opt-barrier"):
            return held[operands[0]]
        if opcode == "call":
            (callee,) = instruction.callees
            return self.of(callee)[self._program.computations[callee].root]
        return {}


def liveness(program: Assignment) -> Liveness:
    """Computes the live bytes of a program at each of its instructions.

    An address that several buffers share counts once. Raises ValueError for a program without a
    loop in its backward pass.
    """
    walk = _Walk(program)
    walk.run(program.entry)
    if walk.turn is None:
        raise ValueError("got a program without a backward loop, expected a gradient of chains")
    # Cut each allocation at all offsets where a buffer starts or ends. The resulting cells are live
    # if any buffer that covers them is.
    edges: dict[int, np.ndarray] = {}
    for allocation in {buffer.allocation for buffer in program.buffers}:
        of = [b for b in program.buffers if b.allocation == allocation]
        points = [b.offset for b in of] + [b.offset + b.num_bytes for b in of]
        edges[allocation] = np.unique(points)
    live, allocated = np.zeros(walk.time), np.zeros(walk.time)
    for allocation, points in edges.items():
        # [cells, instructions]: the live share of each cell of the allocation.
        cells = np.zeros((len(points) - 1, walk.time), np.float32)

        def rows(buffer, points=points):
            ends = np.searchsorted(points, [buffer.offset, buffer.offset + buffer.num_bytes])
            return slice(*ends)

        for interval in walk.intervals:
            if interval.buffer.allocation == allocation:
                cells[rows(interval.buffer), interval.start : interval.stop] = 1
        sizes = np.diff(points).astype(float)
        # Before stacked arrays are reduced to their live shares.
        allocated += sizes @ cells
        for interval in walk.shares:
            if interval.buffer.allocation == allocation:
                part = cells[rows(interval.buffer), interval.start : interval.stop]
                np.minimum(part, interval.share, out=part)
        live += sizes @ cells
    return Liveness(live, allocated, walk.turn)


def _flat(held):
    return (buffer for buffers in held.values() for buffer in buffers)


def _stacked(program: Assignment, loop: AssignedInstruction) -> list[tuple[int, bool]]:
    """The stacked arrays in a loop's carry: (index, True if written and False if only read)."""
    body = program.computations[loop.callees[0]]
    by_id = {i.id: i for i in body.instructions}
    taken = {i.index: i for i in body.instructions if _takes_parameter(i, by_id)}
    found = []
    for index, operand in enumerate(by_id[body.root].operands):
        result = by_id[operand]
        # A stack has a slice for each iteration, and is carried at the same index throughout.
        if loop.trips == 1 or result.dims[:1] != (loop.trips,) or index not in taken:
            continue
        if result.id != taken[index].id:
            if _contains(program, result, "dynamic-update-slice"):
                found.append((index, True))
            continue
        # Returned as it came, so only read: slice by slice, unless another reader needs all of it.
        readers = [i for i in body.instructions if result.id in i.operands and i.id != body.root]
        if readers and all(_contains(program, i, "dynamic-slice") for i in readers):
            found.append((index, False))
    return found


def _takes_parameter(instruction, by_id):
    if instruction.opcode != "get-tuple-element":
        return False
    return by_id[instruction.operands[0]].opcode == "parameter"


def _contains(program, instruction, opcode):
    """Whether an instruction has this opcode, or calls or fuses one that has."""
    return instruction.opcode == opcode or any(
        _contains(program, inner, opcode)
        for callee in instruction.callees
        for inner in program.computations[callee].instructions
    )
