"""How many bytes a collective operation of a compiled program sends, and over which network."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from revnet_jax.programs.hlo import Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# The forms in which XLA prints the devices that exchange data. Axes of a mesh: mesh['a'=4,'b'=2],
# device_ids=([2,4]T(1,0)) {'b'}.
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([\d,]*\))*)\))? \{([^}]*)\}"
)
# [2,4]<=[4,2]T(1,0): the numbers from 0 to 7 as [4, 2], transposed, then as [2, 4]: two groups.
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# {{0,1},{2,3}}: two groups of two.
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
# {{0,1},{1,0}}: 0 sends to 1, and 1 to 0.
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_AXIS = re.compile(r"'?(\w+)'?=(\d+)")
_USED = re.compile(r"'?(\w+)'?(?::\((\d+)\)(\d+))?(?:,|$)")


def kind_of(instruction: Instruction) -> str | None:
    """The one of `KINDS` that an instruction is or starts; None for others, "-done" included."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def sent_bytes(kind: str, payload_bytes: int, n: int) -> int:
    """Bytes that each of n devices sends, by the cheapest algorithm.

    Args:
      payload_bytes: on one device, of the gathered result, or of the operand of all other kinds.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return payload_bytes if n > 1 else 0
    # An all-reduce is a reduce-scatter and an all-gather.
    return (2 if kind == "all-reduce" else 1) * payload_bytes * (n - 1) // n


def sent_by_network(
    kind: str, payload_bytes: int, members: np.ndarray, slices: Sequence[int]
) -> tuple[int, int]:
    """Bytes that each device sends within its slice, and to other slices.

    Args:
      kind: as in `sent_bytes`.
      payload_bytes: as in `sent_bytes`.
      members: [groups, devices in each], device indices in the program.
      slices: the slice of every device by index (on GPUs its host); if empty, all are in one slice.

    A group with k devices in each of h slices is assumed to work in two stages, as NCCL's rings do
    in effect: the k devices of a slice exchange the whole payload; then the h devices at the same
    position in their slices exchange their 1/k of it. Both together send as much as one stage.
    """
    slice_of = np.asarray(slices)[members] if len(slices) else np.zeros_like(members)
    # All groups count like the one that spans the most slices: the slowest group decides.
    h = max(len(set(row)) for row in slice_of.tolist())
    if h == 1:
        return sent_bytes(kind, payload_bytes, members.shape[1]), 0
    if kind in ("collective-permute", "collective-broadcast"):
        return 0, sent_bytes(kind, payload_bytes, members.shape[1])
    # Rounded up where a group has more devices in one slice than in another.
    k = -(-members.shape[1] // h)
    if kind == "all-to-all":  # every pair has its own data, so that two stages would save nothing
        # k - 1 of the h k parts are for devices of the same slice.
        inside = payload_bytes * (k - 1) // (h * k)
        return inside, sent_bytes(kind, payload_bytes, h * k) - inside
    # (k - 1) / k + (h - 1) / (h k) = (h k - 1) / (h k): together as much as in one stage.
    return sent_bytes(kind, payload_bytes, k), sent_bytes(kind, payload_bytes // k, h)


def members(instruction: Instruction, num_devices: int) -> np.ndarray:
    """[groups, devices in each]: which devices exchange; a permutation's pairs are groups of two.

    Raises ValueError for an unknown format of `replica_groups`.
    """
    text = instruction.attributes
    if found := _PAIRS.search(text):
        return np.asarray(_integers(found[1]), int).reshape(-1, 2)
    if found := _MESH.search(text):
        return _of_mesh(*found.groups())
    if found := _IOTA.search(text):
        shape, *numbering = found.groups()
        return _numbered(*numbering).reshape(_integers(shape))
    if found := _LISTS.search(text):
        groups = [_integers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        # No lists, as in replica_groups={}, mean all devices.
        if groups:
            return np.asarray(groups, int)
    elif "replica_groups=" in text:
        raise ValueError(f"got {text[:120]!r}, expected replica_groups in a format that is known")
    return np.arange(num_devices)[None]  # no groups given: all devices together


def megascale(instruction: Instruction) -> tuple[str, int] | None:
    """(kind, slices) of a `send` to the host process that exchanges data with other TPU slices.

    None for all other instructions.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "send" or not kind:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', instruction.attributes)
    slices = 0
    # {0,2:4} are the slices 0, 2, 3 and 4.
    for part in target[1].split(",") if target else ():
        first, _, last = part.partition(":")
        slices += int(last or first) - int(first) + 1
    return kind[1].lower().replace("_", "-"), slices


def _of_mesh(mesh, device_ids, used):
    """Groups of a mesh: for mesh['a'=4,'b'=2] {'b'}, groups along b.

    'a':(2)2 is a sub-axis of a, of size 2, after a part of size 2.
    """
    used = [match.groups() for match in _USED.finditer(used)]
    shape, grouped = [], []
    for name, size in _AXIS.findall(mesh):
        spans = [
            (int(before or 1), int(before or 1) * int(length or size))
            for other, before, length in used
            if other == name
        ]
        # Cut the axis wherever a sub-axis begins or ends. Each piece is an axis of its own, which
        # groups run along or not.
        bounds = sorted({1, int(size), *itertools.chain(*spans)})
        for low, high in itertools.pairwise(bounds):
            shape.append(high // low)
            grouped.append(any(first <= low < last for first, last in spans))
    # Axes along which groups run go last, so that each row is a group.
    order = [i for i, inside in enumerate(grouped) if not inside]
    inside = [i for i, inside in enumerate(grouped) if inside]
    size = int(np.prod([shape[i] for i in inside], dtype=int))
    ids = _of_text(device_ids) if device_ids else np.arange(np.prod(shape, dtype=int))
    return ids.reshape(shape).transpose(order + inside).reshape(-1, size)


def _of_text(device_ids):
    """Device ids from a list, "0,2,1,3", or an iota, "[2,2]T(1,0)"."""
    found = re.match(r"(?:<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$", device_ids)
    return _numbered(*found.groups()) if found else np.asarray(_integers(device_ids))


def _numbered(dims, order):
    dims = _integers(dims)
    return np.arange(np.prod(dims)).reshape(dims).transpose(_integers(order) if order else None)


def _integers(text):
    return [int(n) for n in re.findall(r"\d+", text)]
