"""Was a branch compiled to the same program in the forward pass and in its rewind?

Exactness rests on it (see `core/evaluate.py`), and it needs no device to be seen: compilers keep
the names that JAX gave to operations, and with them the scopes that they were traced in.
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
# What computes nothing; and what is said of where an instruction came from, when it runs, and in
# which memory its arrays lie.
_NOT_COMPUTED = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy")
_MOVES = ("bitcast", "copy", "reshape")
_OPERAND = "operand "
_SPACE = r"S\(\d+\)"
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
    """An instruction of an isolated program as it was compiled: a fusion, a product, a call.

    name, op_name: as the text has them. program: a digest of all that is computed in it, whatever
      its parts are called and in whatever order they are printed.
    """

    name: str
    op_name: str
    program: str


def isolated_parts(text: str, scope: str, *, layouts: bool = True) -> list[Part]:
    """What was isolated under a `jax.named_scope`: of a chain "forward", "rewind" or "backward".

    text: of a compiled program, `compiled.as_text()`. layouts: whether programs differ that do the
      same to arrays that lie in memory in another order, or to a copy of them in another.
    """
    program = _Program(text if layouts else _LAYOUT.sub("", text), layouts)
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
                if not digest.startswith(_OPERAND):  # it moves what it was given
                    parts.append(Part(instruction, op_name[1], digest))
    return parts


def not_found(these: list[Part], those: list[Part]) -> list[Part]:
    """The parts among these that have no equal among those: they may round in another way."""
    left = Counter(part.program for part in those)
    missing = []
    for part in these:
        left[part.program] -= 1
        if left[part.program] < 0:
            missing.append(part)
    return missing


class _Program:
    """computations: {name: {instruction: its line}}, in the order of the text."""

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
        """An instruction's: which operands are the same counts, not what they are computed from."""
        labels: dict[str, str] = {}

        def operand(name):
            while (found := _INSTRUCTION.match(lines.get(name, ""))) and found[2] in self.moves:
                (name,) = _operands(lines[name])
            dtype = _type(lines.get(name, "")).partition("[")[0]
            return labels.setdefault(name, f"{_OPERAND}{len(labels)} {dtype}")

        return self._digest(line, operand)

    def _digest(self, line: str, value: Callable[[str], str]) -> str:
        """value: of an operand, by name."""
        called, operands = _CALLED.findall(line), _operands(line)
        for noise in _NOISE:
            line = re.sub(noise, "", line)
        _, _, line = _CALLED.sub("", line).partition(" = ")
        if fusion := re.search(r"(?<= fusion\()[^()]*(?=\))", line):
            # Compilers number what a fusion is given in any order.
            inside = self._result(called.pop(), lambda i: value(operands[i]))
            if self.moves and inside.startswith(_OPERAND):
                return inside
            line = line.replace(fusion[0], inside)
        else:
            line = re.sub(r"%([\w.\-]+)", lambda match: value(match[1]), line)
        if self.moves:  # a conversion is of each element alone, in whatever order axes are named
            line = _CONVERTED.sub(lambda m: f"{m[1]}{sorted(m[2].split(','))}", line)
        # a + b is b + a, to the bit.
        in_order = lambda match: f"{match[1]}({', '.join(sorted(match[2].split(', ')))})"
        line = re.sub(r"\b(add|multiply|maximum|minimum)\(([^()]*)\)", in_order, line)
        reducers = [self._result(name, lambda i: f"argument {i}") for name in called]
        return _hash(line, *reducers)

    def _result(self, name: str, argument: Callable[[int], str]) -> str:
        """A computation's: that of its root, and so of what the root is computed from."""
        lines = self.computations[name]

        @cache
        def value(name: str) -> str:
            line = lines[name]
            if parameter := _PARAMETER.search(line):
                given = argument(int(parameter[1]))
                return given if self.moves else _hash(given, _type(line))
            if (found := _INSTRUCTION.match(line)) and found[2] in self.moves:
                return value(*_operands(line))
            return self._digest(line, value)

        (root,) = (name for name, line in lines.items() if line.lstrip().startswith("ROOT "))
        return value(root)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _type(line: str) -> str:
    """What an instruction returns, but for the memory it lies in: f32[8,4]{1,0}."""
    return re.sub(_SPACE, "", line.partition(" = ")[2].partition(" ")[0])


def _operands(line: str) -> list[str]:
    """Names of what an instruction is given."""
    found = _INSTRUCTION.match(line)
    return re.findall(r"%([\w.\-]+)", line[found.end() :].partition(")")[0]) if found else []


def _fused(line):
    """Computations that are part of an instruction, unlike those that a loop or a call runs."""
    runs_others = re.search(r" (?:while|call|conditional|async-start)\(", line)
    return [] if runs_others else _CALLED.findall(line)
