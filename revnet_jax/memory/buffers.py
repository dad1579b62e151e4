"""Where a compiled program keeps what: its schedule and its temporary buffers, with addresses.

Both are in what the compiler hands out with a program, as protocol buffers. The few fields needed
are decoded here; their numbers are those of `hlo.proto` in XLA.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

Place = tuple[int, tuple[int, ...]]  # an instruction, and the path into its result's tuples


class Instruction(NamedTuple):
    """One step of a computation, its operands and callees by id.

    index: the element that a get-tuple-element takes. dims: of a result that is one array.
    trips: how often a loop runs, 1 where that is unknown. name: what JAX called it.
    """

    id: int
    opcode: str
    operands: tuple[int, ...]
    callees: tuple[int, ...]
    index: int
    dims: tuple[int, ...]
    trips: int
    name: str


class Computation(NamedTuple):
    """Instructions in the order in which they run. root: the id of the result's."""

    instructions: tuple[Instruction, ...]
    root: int


class Buffer(NamedTuple):
    """A value in temporary memory: an allocation, an offset in it, and bytes.

    Several share an address where one is given up for the next, or is changed in place.
    definition: the instruction that makes it, and where in its result it is.
    """

    allocation: int
    offset: int
    num_bytes: int
    definition: Place


class Assignment(NamedTuple):
    """Of a program: computations by id, the entry's id, and the temporary buffers."""

    computations: dict[int, Computation]
    entry: int
    buffers: list[Buffer]


def assignment(compiled: jax.stages.Compiled) -> Assignment:
    """Decodes what the compiler says; ValueError for one that does not say it.

    Temporary means: neither argument, nor result, nor constant; what `memory_analysis` calls so.
    """
    memory = compiled.memory_analysis()
    buffers = getattr(memory, "serialized_buffer_assignment_proto", None)
    executable = compiled.runtime_executable()
    if not buffers or executable is None:
        raise ValueError("got a program without its buffers, expected a compiler that tells them")
    (module,) = executable.hlo_modules()
    computations, entry = _computations(module.as_serialized_hlo_module_proto())
    return Assignment(computations, entry, _temporary(buffers))


def compiled_for_gpu(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Assignment]:
    """Compiles for an NVIDIA GPU, and reads what its compiler writes down of its buffers.

    That compiler hands out no buffers with a program, but dumps an `HloProto` that has both.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True}
        compiled = lowered.compile(compiler_options=options)
        (dumped,) = Path(folder).glob("*.sm_*gpu_after_optimizations.hlo.pb")
        fields = dict(_fields(dumped.read_bytes()))
    computations, entry = _computations(fields[1])  # hlo_module
    return compiled, Assignment(computations, entry, _temporary(fields[3]))  # buffer_assignment


def _computations(module):
    orders = {}
    for sequence in _all(next(_all(module, 7)), 1):
        fields = dict(_fields(sequence))
        orders[fields[1]] = list(_numbers(fields.get(2, b""), 1))
    computations = {}
    for computation in _all(module, 3):
        found = {i.id: i for i in map(_instruction, _all(computation, 2))}
        fields = dict(_fields(computation))
        # Those inside a fusion have no order of their own: they are one instruction.
        order = orders.get(fields[5], found)
        instructions = tuple(found[i] for i in order)
        computations[fields[5]] = Computation(instructions, fields[6])
    return computations, dict(_fields(module))[6]


def _instruction(message):
    fields = dict(_fields(message))
    opcode = fields[2].decode()
    config = fields.get(43, b"") if opcode == "while" else b""
    trips = json.loads(config).get("known_trip_count", {}).get("n", 1) if config else 1
    return Instruction(
        id=fields[35],
        opcode=opcode,
        operands=tuple(_numbers(message, 36)),
        callees=tuple(_numbers(message, 38)),
        index=fields.get(13, 0),
        dims=tuple(_numbers(fields[3], 3)),
        trips=int(trips),
        name=dict(_fields(fields.get(7, b""))).get(2, b"").decode(),
    )


def _temporary(message):
    defined = {}
    for logical in _all(message, 1):
        fields = dict(_fields(logical))
        defined[fields.get(1, 0)] = _place(fields[3])
    buffers = []
    for index, allocation in enumerate(_all(message, 3)):
        fields = dict(_fields(allocation))
        if any(fields.get(kind) for kind in (3, 5, 7, 12)):
            continue  # a thread's own, an argument, a result, a constant
        for assigned in _all(allocation, 9):
            fields = dict(_fields(assigned))
            number, offset, num_bytes = (fields.get(i, 0) for i in (1, 2, 3))
            buffers.append(Buffer(index, offset, num_bytes, defined[number]))
    return buffers


def _place(message):
    return dict(_fields(message)).get(4, 0), tuple(_numbers(message, 3))


def _all(message, field):
    return (value for number, value in _fields(message) if number == field)


def _numbers(message: bytes, field: int) -> Iterator[int]:
    """A field of repeated whole numbers, packed into bytes or each on its own."""
    for value in _all(message, field):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a protocol buffer; numbers as int, all else as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            length, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = message[at : at + length], at + length
        yield tag >> 3, value


def _varint(message, at):
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
