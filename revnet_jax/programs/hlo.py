"""Parses the text of compiled programs: computations, instructions, and sizes of arrays.

Covers the parts of the format of `compiled.as_text()` that this package needs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# As bf16[8,128]{1,0:T(8,128)(2,1)S(1)}: dtype, shape, layout.
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLEES = re.compile(r"\b(calls|body|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:true|false)_computation=%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


class Array(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      num_bytes: in memory, padding included: TPU tiles pad the two innermost axes, often to 8 x
        128.
      space: memory space: 0 is HBM (on CPU: RAM); others are on chip, or the host's memory.
      dtype: in XLA's notation: "bf16", "f32".
      dims: shape.
    """

    num_bytes: int
    space: int
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Instruction:
    """`name = result opcode(arguments), attributes`. operands: the names among the arguments."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Names of the computations it runs; of a loop the body, without the condition."""
        # The function that a reduction applies to each element is not counted as a computation.
        found = [
            match[2]
            for match in _CALLEES.finditer(self.attributes)
            if match[1] != "to_apply" or self.opcode in ("call", "call-start")
        ]
        names = [name.strip(" %") for group in found for name in group.strip("{}").split(",")]
        return tuple(names + _BRANCHES.findall(self.attributes))


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run. root: name of the result."""

    instructions: dict[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> list[Instruction]:
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        # By their numbers, which the operands of a call follow; the text has them in any order.
        return sorted(found, key=lambda parameter: int(parameter.arguments))

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            # A set, because x * x uses x once.
            for name in set(instruction.operands):
                users[name].append(instruction)
        return users


@dataclass(frozen=True)
class Module:
    """A compiled program. num_devices: that run it; each TPU slice has a program of its own."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse(text: str) -> Module:
    """Parses a program's text; ValueError if it has no entry computation."""
    computations, entry, name = {}, None, None
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name, instructions, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(instructions, root)
            name = None
        elif name and " = " in line:
            instruction = _instruction(line)
            instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                root = instruction.name
    if entry is None:
        raise ValueError(f"got {text[:80]!r}, expected the text of a compiled program")
    # Both are in the first line, and missing there where they are 1.
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, math.prod(map(int, counts)))


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a while loop runs, by the compiler's note or its counter; 1 if neither is found."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted[1])
    # The TPU compiler notes nothing; its loops count from 0 up to a constant.
    (name,) = re.findall(r"\bcondition=%?([\w.\-]+)", loop.attributes)
    condition = module.computations[name].instructions
    test = condition[module.computations[name].root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return 1
    counter, bound = (condition[operand] for operand in test.operands)
    if bound.opcode != "constant":
        return 1
    # Rounded up, since the last step may pass the bound.
    return -(-int(bound.arguments) // _step(module, loop, counter))


def _step(module, loop, counter):
    """The increment of a loop's counter, as 2 if the compiler unrolled it twice; 1 if not found."""
    body = module.computations[loop.callees[0]]
    index = re.search(r"\bindex=(\d+)", counter.attributes)
    root = body.instructions[body.root]
    if counter.opcode != "get-tuple-element" or root.opcode != "tuple" or not index:
        return 1
    added = 0
    # From the counter's next value back to the parameter, adding up what is added on the way.
    value = body.instructions[root.operands[int(index[1])]]
    while value.opcode in ("add", "copy"):
        terms = [body.instructions[name] for name in value.operands]
        constants = [term for term in terms if term.opcode == "constant"]
        added += sum(int(constant.arguments) for constant in constants)
        others = [term for term in terms if term.opcode != "constant"]
        # Not one variable and constants: the increment is unknown.
        if len(others) != 1:
            return 1
        (value,) = others
    return added if value.opcode == "get-tuple-element" and added > 0 else 1


def _instruction(line):
    # The text counts the elements of long tuples in comments, as /*index=5*/.
    left, _, right = re.sub(r"/\*.*?\*/", "", line).partition(" = ")
    # A result that is a tuple has spaces in it, and may be nested.
    result, rest = _cut(right, 0) if right.startswith("(") else right.split(" ", 1)
    opening = rest.index("(")
    opcode = rest[:opening].strip()
    arguments, attributes = _cut(rest, opening)
    return Instruction(
        # Names are printed with % or without, after ROOT or not.
        name=_NAME.findall(left if "%" in left else f"%{left.split()[-1]}")[0],
        opcode=opcode,
        result=tuple(_array(*match.groups()) for match in _ARRAY.finditer(result)),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments[1:-1],
        attributes=attributes,
    )


def _cut(text, opening):
    """Splits off the parenthesis that opens at `opening`: (it with its contents, the rest)."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return text[opening : i + 1], text[i + 1 :]
    raise ValueError(f"got {text[:80]!r}, expected as many closing parentheses as opening ones")


def _array(dtype, dims, layout):
    """Parses f32[8,4]{1,0:T(8,128)S(5)}: a shape, minor-to-major axes, tiling, memory space."""
    shape = tuple(int(n) for n in dims.split(",") if n)
    order, _, rest = (layout or "").partition(":")
    minor_to_major = [int(n) for n in order.split(",") if n]
    # From the outermost axis to the innermost, since tiles pad the innermost ones.
    sizes = [shape[i] for i in reversed(minor_to_major)] if minor_to_major else list(shape)
    # Only the first tile pads. A second one, as (2,1), packs narrow numbers within it.
    if tile := re.search(r"T\(([\d,]+)\)", rest):
        tile = [int(n) for n in tile[1].split(",")]
        # A tile may have more axes than the array.
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        for i, n in enumerate(tile, start=len(sizes) - len(tile)):
            sizes[i] = -(-sizes[i] // n) * n
    space = re.search(r"S\((\d+)\)", rest)
    num_bytes = math.ceil(math.prod(sizes) * _bits(dtype) / 8)
    return Array(num_bytes, int(space[1]) if space else 0, dtype, shape)


def _bits(dtype):
    """Bits of one element; 0 for tokens."""
    # The first number in a name is its width: bf16, s4, f8e4m3fn.
    bits = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(bits[0]) if bits else 0
