"""Predicts the time of each part of a model in a step, from the compiled program.

This is a roofline: a kernel takes as long as its arithmetic or its memory traffic, whichever is
longer. The shares of the peaks that kernels reach were measured on a device: see `PRODUCTS`.
Transfers between devices, or to the host, are not counted.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from revnet_jax.planning.chips import Chip
from revnet_jax.programs.counts import pairs_read
from revnet_jax.programs.hlo import Array, Computation, Instruction, Module, parse
from revnet_jax.programs.traffic import leaves

# `jax.named_scope`s. An operation belongs to the first one here that its name contains.
PARTS = ("stem", "head", "transition", "update", "rewind", "backward", "forward")
_OTHER = "other"

# The shares that kernels reach of the chip's peak for bfloat16 products, or of its memory
# bandwidth. Measured on an H200 in a step of lm_124m (jax 0.11.2), see docs/planning.md; for other
# chips they are a guess.
PRODUCTS = {"bf16": 0.72, "f16": 0.72, "f32": 0.25, "f64": 0.06}  # float32: TensorFloat-32
FULL_FLOAT32 = 0.05  # products of `Precision.HIGHEST`
MISALIGNED = 0.3  # factor where row lengths are no multiple of 8, which fast kernels need
ATTENTION, ATTENTION_BACKWARD = 0.28, 0.235
MEMORY = 0.75
LAUNCH = 1.5e-6  # seconds, the least that a kernel takes


class Kernel(NamedTuple):
    """One kernel, launched `times` in a step; all other figures are of one launch.

    Attributes:
      part: one of `PARTS`, or "other".
      flops: of products, convolutions, and cuDNN's attention.
      seconds: at the shares of the peaks above, and at least `LAUNCH`.
    """

    name: str
    part: str
    times: int
    flops: int
    hbm_bytes: int
    seconds: float


def kernels(text: str, chip: Chip) -> list[Kernel]:
    """The kernels that one step launches. text: of its program, `compiled.as_text()`."""
    module = parse(text)
    found, of_most = [], {}
    for instruction, computation, times, moved in leaves(module):
        if moved.ici_bytes or moved.dcn_bytes:  # a collective
            continue
        products = _products(module, computation, instruction)
        # Products in one fusion take turns; the kernel's memory traffic overlaps with them.
        seconds = sum(flops / (share * chip.peak_flops) for flops, share in products)
        seconds = max(seconds, moved.hbm_bytes / (MEMORY * chip.hbm_bandwidth))
        # What neither computes nor moves anything, as the end of a copy, launches no kernel.
        if seconds:
            flops = sum(flops for flops, _ in products)
            if not (part := _part(instruction)):
                # Without a name of its own, a kernel counts to the part of most around it.
                # Keyed by id, because a computation holds a dict and cannot be hashed.
                key = id(computation)
                part = of_most[key] = of_most.get(key) or _part_of_most(computation)
            seconds = max(seconds, LAUNCH)
            found.append(Kernel(instruction.name, part, times, flops, moved.hbm_bytes, seconds))
    return found


def by_part(text: str, chip: Chip) -> list[dict[str, Any]]:
    """A row for each part of the model, the slowest first, and one for all together.

    Keys, for one step of one device: `ms`, `flops`, `hbm_bytes`, `kernels` (number of launches),
    `slowest` (milliseconds of the five slowest kernels, by name).
    """
    all_kernels = kernels(text, chip)
    parts = dict.fromkeys(kernel.part for kernel in all_kernels)
    rows = [_row(part, [k for k in all_kernels if k.part == part]) for part in parts]
    return [*sorted(rows, key=lambda row: -row["ms"]), _row("all", all_kernels)]


def _row(part, kernels):
    total = lambda value: sum(k.times * value(k) for k in kernels)
    slowest = sorted(kernels, key=lambda k: -k.times * k.seconds)[:5]
    return {
        "part": part,
        "ms": 1e3 * total(lambda k: k.seconds),
        "flops": total(lambda k: k.flops),
        "hbm_bytes": total(lambda k: k.hbm_bytes),
        "kernels": total(lambda k: 1),
        "slowest": {k.name: 1e3 * k.times * k.seconds for k in slowest},
    }


def _part(instruction: Instruction) -> str | None:
    """The part of an instruction; None if the compiler kept no JAX name for it."""
    if not (op_name := re.search(r'op_name="([^"]*)"', instruction.attributes)):
        return None
    # Transformations wrap the scopes of a name: jit(step)/transpose(jvp(head))/dot_general.
    scopes = (scope for scope in PARTS if re.search(rf"(^|[/(]){scope}[/)]", op_name[1]))
    return next(scopes, _OTHER)


def _part_of_most(computation: Computation) -> str:
    """The most frequent part among the instructions of a computation."""
    counts = Counter(part for i in computation.instructions.values() if (part := _part(i)))
    return counts.most_common(1)[0][0] if counts else _OTHER


def _products(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[int, float]]:
    """(FLOPs, share of the peak) of each product in an instruction, or in a fusion's body."""
    if instruction.opcode in ("fusion", "fusion-start"):
        inner = module.computations[instruction.callees[0]]
        return [p for i in inner.instructions.values() for p in _products(module, inner, i)]
    count = _COUNTS.get(instruction.opcode)
    if instruction.opcode == "custom-call":
        # cuBLAS and cuDNN are known by their targets. Other calls, such as kernels written by hand,
        # count by their bytes alone.
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        count = next((c for name, c in _LIBRARIES if target and target[1].startswith(name)), None)
    if count is None:
        return []
    operands = [computation.instructions[name].result[0] for name in instruction.operands]
    return [count(instruction, operands)]


def _dot(instruction: Instruction, operands: Sequence[Array]) -> tuple[int, float]:
    # An outer product contracts no axis: its attribute is empty or missing.
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    contracted = [operands[0].dims[int(i)] for i in axes[1].split(",") if i] if axes else []
    return _of_product(instruction, operands, contracted)


def _cublas(instruction: Instruction, operands: Sequence[Array]) -> tuple[int, float]:
    # A cuBLAS call has its axes in JSON, as strings, in place of HLO's own attributes.
    axes = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes)
    contracted = [operands[0].dims[int(i)] for i in json.loads(axes[1])] if axes else []
    return _of_product(instruction, operands, contracted)


def _of_product(instruction, operands, contracted):
    # cuBLAS returns its workspace after the product, hence the first result only.
    (result, *_), sizes = instruction.result, math.prod(contracted)
    # 2 m n k: a multiplication and an addition for each element of each sum.
    flops = 2 * math.prod(result.dims) * sizes
    arrays = [array for array in (*operands[:2], result) if array.dims]
    # Fast kernels load 16 bytes at a time, 8 numbers of bfloat16. `MISALIGNED` was measured for
    # bfloat16 products alone.
    aligned = all(array.dims[-1] % 8 == 0 for array in arrays) or operands[0].dtype == "f32"
    return flops, _share(instruction, operands[0].dtype) * (1 if aligned else MISALIGNED)


def _convolution(instruction: Instruction, operands: Sequence[Array]) -> tuple[int, float]:
    """Finds the forward convolution's output: the result, or an operand of a gradient kernel."""
    target = instruction.attributes
    result, (first, second) = instruction.result[0], operands[:2]
    output, weights = result, second
    # Both gradients take the multiplications of the forward convolution.
    if "$convBackwardInput" in target:
        output = first
    elif "$convBackwardFilter" in target:
        output, weights = second, result
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    outputs = weights.dims[labels[1].index("o")] if labels else 1
    # 2 x output elements x taps x input channels. The filter has taps x input channels elements for
    # each output channel.
    flops = 2 * math.prod(output.dims) * math.prod(weights.dims) // max(outputs, 1)
    return flops, _share(instruction, first.dtype)


def _attention(instruction: Instruction, operands: Sequence[Array]) -> tuple[int, float]:
    """cuDNN's attention on [B, T, N, K] queries and keys: 2 products forward, 5 backward."""
    (B, T, N, K), S = operands[0].dims, operands[1].dims[1]
    backward = "Backward" in instruction.attributes
    window = re.search(r'"sliding_window_length": ?"?(\d+)', instruction.attributes)
    causal = '"CAUSAL"' in instruction.attributes
    pairs = pairs_read(T, S, causal=causal, window=int(window[1]) if window else None)
    flops = (5 if backward else 2) * 2 * B * N * K * pairs
    return flops, ATTENTION_BACKWARD if backward else ATTENTION


def _share(instruction, dtype):
    # HLO writes the precision in small letters, the settings of a cuBLAS call in capitals.
    if dtype == "f32" and re.search(r"highest|HIGHEST", instruction.attributes):
        return FULL_FLOAT32
    # Dtypes whose rate was not measured, such as float8, count as bfloat16.
    return PRODUCTS.get(dtype, PRODUCTS["bf16"])


_Count = Callable[[Instruction, Sequence[Array]], tuple[int, float]]
_COUNTS: dict[str, _Count] = {"dot": _dot, "convolution": _convolution}
# Beginnings of targets, which name the operation too: __cublas$lt$matmul, __cudnn$fmhaSoftmax.
_LIBRARIES: tuple[tuple[str, _Count], ...] = (
    ("__cublas", _cublas),
    ("__cudnn$fmha", _attention),
    ("__cudnn$conv", _convolution),
)
