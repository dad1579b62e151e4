"""Was a branch compiled to the same program in the forward pass and in its rewind?

Exactness rests on it (see `core/evaluate.py`), and it needs no device to be seen: compilers keep
the names that JAX gave to operations, and with them the scopes that they were traced in.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from revnet_jax.core.isolate import SCOPE

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
# What computes nothing; and what is said of where an instruction came from, when it runs, and in
# which memory its arrays lie.
_NOT_COMPUTED = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy")
_NOISE = (
    r", metadata=\{[^}]*\}",
    r", frontend_attributes=\{[^}]*\}",
    r", stack_frame_id=\d+",
    r'scheduling_name="[^"]*"',
    r"(?:, )?backend_config=\{.*\}",
    r"/\*.*?\*/",
    r"S\(\d+\)",
)


class Part(NamedTuple):
    """An instruction of an isolated program as it was compiled: a fusion, a product, a call.

    name, op_name: as the text has them. program: all that is computed in it, names left out.
    """

    name: str
    op_name: str
    program: str


def isolated_parts(text: str, scope: str) -> list[Part]:
    """What was isolated under a `jax.named_scope`: of a chain "forward", "rewind" or "backward".

    text: of a compiled program, `compiled.as_text()`.
    """
    computations = _computations(text)

    @cache
    def normal(name: str) -> str:
        names: dict[str, str] = {}
        lines = sorted(computations[name][1:], key=_parameters_first)
        return "\n".join(_normal(line, names, normal) for line in lines)

    inside = {name for lines in computations.values() for line in lines for name in _fused(line)}
    parts = []
    for name, lines in computations.items():
        if name in inside:
            continue
        for line in lines:
            found, op_name = _INSTRUCTION.match(line), _OP_NAME.search(line)
            if not found or not op_name or found[2] in _NOT_COMPUTED:
                continue
            if f"/{SCOPE}" in op_name[1] and re.search(rf"(^|[/(]){scope}[)/]", op_name[1]):
                parts.append(Part(found[1], op_name[1], _normal(line, {}, normal)))
    return parts


def not_found(these: list[Part], those: list[Part]) -> list[Part]:
    """The parts among these that have no equal among those: they may round in another way."""
    left = defaultdict(int)
    for part in those:
        left[part.program] += 1
    missing = []
    for part in these:
        left[part.program] -= 1
        if left[part.program] < 0:
            missing.append(part)
    return missing


def _computations(text):
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and line.endswith("{"):
            lines = computations.setdefault(header[1], [])
        if line.strip() != "}":
            lines.append(line)
    return computations


def _fused(line):
    """Computations that are part of an instruction, unlike those that a loop or a call runs."""
    runs_others = re.search(r" (?:while|call|conditional|async-start)\(", line)
    return [] if runs_others else _CALLED.findall(line)


def _parameters_first(line):
    """The order in which they are printed varies; a sort keeps that of all else."""
    found = re.search(r" parameter\((\d+)\)", line)
    return int(found[1]) if found else math.inf


def _normal(line, names, normal):
    called = _CALLED.findall(line)
    for noise in _NOISE:
        line = re.sub(noise, "", line)
    line = _CALLED.sub("", line)
    line = re.sub(r"%[\w.\-]+", lambda match: names.setdefault(match[0], f"v{len(names)}"), line)
    # a + b is b + a, to the bit.
    in_order = lambda match: f"{match[1]}({', '.join(sorted(match[2].split(', ')))})"
    line = re.sub(r"\b(add|multiply|maximum|minimum)\(([^()]*)\)", in_order, line)
    return "\n".join([line.strip().removeprefix("ROOT "), *map(normal, called)])
