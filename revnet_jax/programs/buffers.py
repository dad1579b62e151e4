"""The schedule of a compiled program and its temporary buffers, with their addresses.

The compiler gives both with a program, as serialized protocol buffers. The few fields needed are
decoded by hand, because XLA's generated Python classes are not installed with JAX. Field numbers
are those of `hlo.proto` in XLA.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

Place = tuple[int, tuple[int, ...]]  # an instruction, and the path into its result's tuples


class AssignedInstruction(NamedTuple):
    """One instruction of a computation; operands and callees are ids.

    Attributes:
      index: the element that a get-tuple-element takes.
      dims: the shape of a result that is one array.
      trips: how often a loop runs, 1 if unknown.
      name: JAX's name for the operation.
    """

    id: int
    opcode: str
    operands: tuple[int, ...]
    callees: tuple[int, ...]
    index: int
    dims: tuple[int, ...]
    trips: int
    name: str


class AssignedComputation(NamedTuple):
    """Instructions in the order in which they run. root: id of the instruction that is returned."""

    instructions: tuple[AssignedInstruction, ...]
    root: int


class Buffer(NamedTuple):
    """A value in temporary memory: an allocation, an offset in it, and bytes.

    Buffers share an address if one is dead before the next is written, or is changed in place.
    definition: the instruction that makes it, and the path into the tuples of its result.
    """

    allocation: int
    offset: int
    num_bytes: int
    definition: Place


class Assignment(NamedTuple):
    """The computations of a program by id, the entry's id, and the temporary buffers."""

    computations: dict[int, AssignedComputation]
    entry: int
    buffers: list[Buffer]


def assignment(compiled: jax.stages.Compiled) -> Assignment:
    """Decodes the buffer assignment; ValueError for a compiler that does not report it.

    Temporary buffers are as in `memory_analysis`: neither arguments, nor results, nor constants.
    """
    memory = compiled.memory_analysis()
    # Missing or empty unless the backend reports its buffers, as that of CPUs does.
    buffers = getattr(memory, "serialized_buffer_assignment_proto", None)
    executable = compiled.runtime_executable()
    if not buffers or executable is None:
        raise ValueError("got a program without its buffers, expected a compiler that lists them")
    (module,) = executable.hlo_modules()
    computations, entry = _computations(module.as_serialized_hlo_module_proto())
    return Assignment(computations, entry, _temporary(buffers))


def compiled_for_gpu(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Assignment]:
    """Compiles for an NVIDIA GPU, and reads the buffers from the compiler's dump.

    XLA's GPU compiler does not give buffers with a program, but the `HloProto` that it dumps has
    both schedule and buffers.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        compiled = lowered.compile(compiler_options=options)
        # The dump is named after the module, the GPU's architecture, and the stage of compiling.
        (dumped,) = Path(folder).glob("*.sm_*gpu_after_optimizations.hlo.pb")
        fields = dict(_fields(dumped.read_bytes()))
    computations, entry = _computations(fields[1])  # hlo_module
    return compiled, Assignment(computations, entry, _temporary(fields[3]))  # buffer_assignment


def _computations(module):
    """Decodes an `HloModuleProto`: (computations by id, id of the entry)."""
    orders = {}
    # Field 7 is the schedule, a map from computation id (1) to a sequence of instruction ids (2).
    for sequence in _all(next(_all(module, 7)), 1):
        fields = dict(_fields(sequence))
        orders[fields[1]] = list(_numbers(fields.get(2, b""), 1))
    computations = {}
    # Field 3: computations. In each: 2 instructions, 5 its id, 6 the id of the root.
    for computation in _all(module, 3):
        found = {i.id: i for i in map(_instruction, _all(computation, 2))}
        fields = dict(_fields(computation))
        # Computations inside a fusion are not in the schedule: they run as one instruction.
        order = orders.get(fields[5], found)
        instructions = tuple(found[i] for i in order)
        computations[fields[5]] = AssignedComputation(instructions, fields[6])
    return computations, dict(_fields(module))[6]  # entry_computation_id


def _instruction(message):
    """Decodes an `HloInstructionProto`.

    Fields: 2 opcode, 3 shape, 7 metadata, 13 tuple_index, 35 id, 36 operand_ids, 38
    called_computation_ids, 43 backend_config (where the compiler notes trip counts).
    """
    fields = dict(_fields(message))
    opcode = fields[2].decode()
    # Other instructions have settings of their own there, which need not be JSON.
    config = fields.get(43, b"") if opcode == "while" else b""
    trips = json.loads(config).get("known_trip_count", {}).get("n", 1) if config else 1
    return AssignedInstruction(
        id=fields[35],
        opcode=opcode,
        operands=tuple(_numbers(message, 36)),
        callees=tuple(_numbers(message, 38)),
        # Proto3 leaves out fields that are 0.
        index=fields.get(13, 0),
        # ShapeProto: 3 dimensions. A tuple has none, its elements have.
        dims=tuple(_numbers(fields[3], 3)),
        # The JSON of protocol buffers writes 64-bit integers as strings.
        trips=int(trips),
        # OpMetadata: 2 op_name.
        name=dict(_fields(fields.get(7, b""))).get(2, b"").decode(),
    )


def _temporary(message):
    """Decodes a `BufferAssignmentProto`: 1 logical buffers, 3 allocations."""
    defined = {}
    for logical in _all(message, 1):
        fields = dict(_fields(logical))
        # LogicalBufferProto: 1 id, 3 defined_at.
        defined[fields.get(1, 0)] = _place(fields[3])
    buffers = []
    for index, allocation in enumerate(_all(message, 3)):
        fields = dict(_fields(allocation))
        if any(fields.get(kind) for kind in (3, 5, 7, 12)):
            continue  # thread-local, an argument, a result, a constant
        # Field 9: the buffers in it. In each: 1 the logical buffer's id, 2 offset, 3 size.
        for assigned in _all(allocation, 9):
            fields = dict(_fields(assigned))
            number, offset, num_bytes = (fields.get(i, 0) for i in (1, 2, 3))
            buffers.append(Buffer(index, offset, num_bytes, defined[number]))
    return buffers


def _place(message):
    """Decodes a `LogicalBufferProto.Location`: 3 shape_index, 4 instruction_id."""
    return dict(_fields(message)).get(4, 0), tuple(_numbers(message, 3))


def _all(message, field):
    return (value for number, value in _fields(message) if number == field)


def _numbers(message: bytes, field: int) -> Iterator[int]:
    """The values of a repeated integer field, packed or not."""
    for value in _all(message, field):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of every field of a message; varints as int, all else as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7  # the wire type: 0 varint, 1 64-bit, 2 length-delimited, 5 32-bit
        if kind == 0:
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
        yield tag >> 3, value


def _varint(message, at):
    """(number, position after it): 7 bits a byte, least first; the high bit says more follow."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
