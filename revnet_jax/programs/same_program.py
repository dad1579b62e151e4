"""Checks that a branch is compiled to the same program in the forward pass and in the rewind.

Exactness depends on this (see `core/evaluate.py`). The check needs no device: compiled programs
keep JAX's names of operations, which include the scopes that they were traced in.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from revnet_jax.core.isolate import SCOPE

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_PARAMETER = re.compile(r" parameter\((\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONVERTED = re.compile(r"^(\w+)\[([\d,]*)\](?= convert\()")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
# Instructions that compute nothing.
_NOT_COMPUTED = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy")
_MOVES = ("bitcast", "copy", "reshape")
_OPERAND = "operand "
_SPACE = r"S\(\d+\)"
# Text that does not change values: where an instruction came from, when it runs, and in which
# memory space its arrays are.
_NOISE = (
    r", metadata=\{[^}]*\}",
    r", frontend_attributes=\{[^}]*\}",
    r", control-predecessors=\{[^}]*\}",
    r", stack_frame_id=\d+",
    r'scheduling_name="[^"]*"',
    r"(?:, )?backend_config=\{.*\}",
    r"/\*.*?\*/",
    _SPACE,
)


class Part(NamedTuple):
    """One compiled instruction of an isolated program: a fusion, a matrix product, a call.

    Attributes:
      name: as in the text.
      op_name: as in the text.
      program: a digest of the computation, independent of names and of the order of printing.
    """

    name: str
    op_name: str
    program: str


def isolated_parts(text: str, scope: str, *, layouts: bool = True) -> list[Part]:
    """The instructions of isolated programs that were traced under a `jax.named_scope`.

    Args:
      text: of a compiled program, `compiled.as_text()`.
      scope: of a chain, "forward", "rewind" or "backward".
      layouts: whether programs that differ only in array layouts, and in copies between layouts,
        count as different.
    """
    program = _Program(text if layouts else _LAYOUT.sub("", text), layouts)
    # What is inside a fusion is compared together with the fusion.
    fused = {
        name for c in program.computations.values() for line in c.values() for name in _fused(line)
    }
    parts = []
    for name, lines in program.computations.items():
        for instruction, line in lines.items() if name not in fused else ():
            found, op_name = _INSTRUCTION.match(line), _OP_NAME.search(line)
            if not found or not op_name or found[2] in (*_NOT_COMPUTED, *program.moves):
                continue
            if f"/{SCOPE}" in op_name[1] and re.search(rf"(^|[/(]){scope}[)/]", op_name[1]):
                digest = program.digest(lines, line)
                if not digest.startswith(_OPERAND):  # else it only moves its operand
                    parts.append(Part(instruction, op_name[1], digest))
    return parts


def not_found(these: list[Part], those: list[Part]) -> list[Part]:
    """The parts in `these` without an equal in `those`; such parts may round differently."""
    # Counted, since a program may have the same part several times.
    left = Counter(part.program for part in those)
    missing = []
    for part in these:
        left[part.program] -= 1
        if left[part.program] < 0:
            missing.append(part)
    return missing


class _Program:
    """A program's text. computations: {name: {instruction: its line}}, in the order of the text."""

    def __init__(self, text: str, layouts: bool):
        self.computations: dict[str, dict[str, str]] = {}
        self.moves = () if layouts else _MOVES
        lines: dict[str, str] = {}
        for line in text.splitlines():
            if (header := _HEADER.match(line)) and line.endswith("{"):
                lines = self.computations.setdefault(header[1], {})
            elif found := _NAME.match(line):
                lines[found[1]] = line

    def digest(self, lines: dict[str, str], line: str) -> str:
        """The digest of an instruction; operands count by position, not by how they are computed.

        An operand is named by its first use and its dtype, so that it matters which ones are equal.
        """
        labels: dict[str, str] = {}

        def operand(name):
            # Without layouts a transposed or copied array counts as the array itself.
            while (found := _INSTRUCTION.match(lines.get(name, ""))) and found[2] in self.moves:
                (name,) = _operands(lines[name])
            dtype = _type(lines.get(name, "")).partition("[")[0]
            return labels.setdefault(name, f"{_OPERAND}{len(labels)} {dtype}")

        return self._digest(line, operand)

    def _digest(self, line: str, value: Callable[[str], str]) -> str:
        """The digest of an instruction's line. value: the text that stands for a named operand."""
        called, operands = _CALLED.findall(line), _operands(line)
        for noise in _NOISE:
            line = re.sub(noise, "", line)
        # Names differ between equal computations: their digests stand for them, at the end.
        _, _, line = _CALLED.sub("", line).partition(" = ")
        if fusion := re.search(r"(?<= fusion\()[^()]*(?=\))", line):
            # Replace the fusion's operands by its body: their order is up to the compiler.
            inside = self._result(called.pop(), lambda i: value(operands[i]))
            if self.moves and inside.startswith(_OPERAND):
                return inside
            line = line.replace(fusion[0], inside)
        else:
            line = re.sub(r"%([\w.\-]+)", lambda match: value(match[1]), line)
        if self.moves:  # a conversion is elementwise, so that the order of axes does not matter
            line = _CONVERTED.sub(lambda m: f"{m[1]}{sorted(m[2].split(','))}", line)
        # These operations commute exactly, to the bit: sort their operands.
        in_order = lambda match: f"{match[1]}({', '.join(sorted(match[2].split(', ')))})"
        line = re.sub(r"\b(add|multiply|maximum|minimum)\(([^()]*)\)", in_order, line)
        reducers = [self._result(name, lambda i: f"argument {i}") for name in called]
        return _hash(line, *reducers)

    def _result(self, name: str, argument: Callable[[int], str]) -> str:
        """The digest of a computation: of its root, and so of all that the root depends on."""
        lines = self.computations[name]

        # Each value once: through values that are read twice, recursion would take exponential
        # time.
        @cache
        def value(name: str) -> str:
            line = lines[name]
            if parameter := _PARAMETER.search(line):
                given = argument(int(parameter[1]))
                # With layouts, also how the fusion sees its operand in memory.
                return given if self.moves else _hash(given, _type(line))
            if (found := _INSTRUCTION.match(line)) and found[2] in self.moves:
                return value(*_operands(line))
            return self._digest(line, value)

        (root,) = (name for name, line in lines.items() if line.lstrip().startswith("ROOT "))
        return value(root)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _type(line: str) -> str:
    """The type of an instruction's result, without its memory space: f32[8,4]{1,0}."""
    return re.sub(_SPACE, "", line.partition(" = ")[2].partition(" ")[0])


def _operands(line: str) -> list[str]:
    """Names of an instruction's operands."""
    found = _INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0]) if found else []


def _fused(line):
    """Computations inside an instruction, such as a fusion's body; not those of loops or calls."""
    runs_others = re.search(r" (?:while|call|conditional|async-start)\(", line)
    return [] if runs_others else _CALLED.findall(line)
