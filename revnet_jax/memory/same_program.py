"""Was a branch compiled to the same program in the forward pass and in its rewind?

Exactness rests on it (see `core/evaluate.py`), and it needs no device to be seen: compilers keep
the names that JAX gave to operations, and with them the scopes that they were traced in.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from functools import cache
from typing import NamedTuple

from revnet_jax.core.isolate import SCOPE

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_PARAMETER = re.compile(r" parameter\((\d+)")
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

    name, op_name: as the text has them. program: a digest of all that is computed in it, whatever
      its parts are called and in whatever order they are printed.
    """

    name: str
    op_name: str
    program: str


def isolated_parts(text: str, scope: str, *, layouts: bool = True) -> list[Part]:
    """What was isolated under a `jax.named_scope`: of a chain "forward", "rewind" or "backward".

    text: of a compiled program, `compiled.as_text()`. layouts: whether programs differ that do the
      same to arrays that lie in memory in another order.
    """
    text = text if layouts else _LAYOUT.sub("", text)
    computations = _computations(text)

    @cache
    def computed(name: str, numbered: bool) -> tuple[str, tuple[int, ...]]:
        """(a digest of a computation: of its root, and so of what the root is computed from; the
        order in which it meets its parameters, whose numbers count only where `numbered`)."""
        lines = {found[1]: line for line in computations[name] if (found := _NAME.match(line))}
        order: list[int] = []

        @cache
        def value(name: str) -> str:
            line = lines[name]
            if (found := _PARAMETER.search(line)) and not numbered:
                order.append(int(found[1]))
                line = line.replace(found[0], f" parameter({len(order) - 1}")
            return _digest(line, value, computed)

        (root,) = (name for name, line in lines.items() if line.lstrip().startswith("ROOT "))
        return value(root), tuple(order)

    inside = {name for lines in computations.values() for line in lines for name in _fused(line)}
    parts = []
    for line in itertools.chain(*(lines for n, lines in computations.items() if n not in inside)):
        found, op_name = _INSTRUCTION.match(line), _OP_NAME.search(line)
        if not found or not op_name or found[2] in _NOT_COMPUTED:
            continue
        if f"/{SCOPE}" in op_name[1] and re.search(rf"(^|[/(]){scope}[)/]", op_name[1]):
            # From which arrays it is computed is not part of it; but if they are the same ones is.
            operands: dict[str, str] = {}
            value = lambda name, seen=operands: seen.setdefault(name, f"operand {len(seen)}")
            parts.append(Part(found[1], op_name[1], _digest(line, value, computed)))
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


def _computations(text):
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and line.endswith("{"):
            lines = computations.setdefault(header[1], [])
        else:
            lines.append(line)
    return computations


def _fused(line):
    """Computations that are part of an instruction, unlike those that a loop or a call runs."""
    runs_others = re.search(r" (?:while|call|conditional|async-start)\(", line)
    return [] if runs_others else _CALLED.findall(line)


def _digest(line, value, computed):
    """An instruction's digest; value: an operand's; computed: that of a computation it calls."""
    called = _CALLED.findall(line)
    for noise in _NOISE:
        line = re.sub(noise, "", line)
    _, _, line = _CALLED.sub("", line).partition(" = ")
    if fusion := re.search(r"(?<= fusion\()[^()]*(?=\))", line):
        # Compilers put the operands of a fusion in any order: here in that of its arithmetic.
        digest, order = computed(called.pop(), numbered=False)
        operands = fusion[0].split(", ")
        line = line.replace(fusion[0], ", ".join(operands[i] for i in order)) + digest
    line = re.sub(r"%([\w.\-]+)", lambda match: value(match[1]), line)
    # a + b is b + a, to the bit.
    in_order = lambda match: f"{match[1]}({', '.join(sorted(match[2].split(', ')))})"
    line = re.sub(r"\b(add|multiply|maximum|minimum)\(([^()]*)\)", in_order, line)
    digests = [computed(name, numbered=True)[0] for name in called]
    return hashlib.sha256("\n".join([line, *digests]).encode()).hexdigest()[:16]
