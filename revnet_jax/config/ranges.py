"""The range of every numeric setting, in one table.

Imports nothing heavy: a number out of its range is refused before JAX starts.
"""

from __future__ import annotations

import json
import math
import numbers
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten

_INT32 = 2**31 - 1  # steps, positions and tokens are 32 bit integers on a device
_AHEAD = 1_000  # most batches in memory, and threads that prepare them
_DEEP = 100_000  # most layers, because some code makes a list with an entry per layer


class Range(NamedTuple):
    """A range of values.

    Attributes:
      expected: describes the range in error messages.
      holds: says whether a value, of any type, is in the range.
    """

    expected: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int = _INT32, *, or_else: int | None = None) -> Range:
    """Integers from low to high. or_else: one more value, with a special meaning."""
    special = "" if or_else is None else f"{or_else}, or "

    def holds(value: Any) -> bool:
        integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return integral and (low <= value <= high or value == or_else)

    return Range(f"{special}a whole number, {low:,} to {high:,}", holds)


def real(interval: str) -> Range:
    """Numbers that lie in an interval, such as `[0, 1)`, after rounding to float32.

    Devices compute in float32, where 1 - 1e-9 is 1 and 1e39 is infinite.
    """
    low, high = map(float, interval[1:-1].split(","))

    def holds(value: Any) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        try:
            (rounded,) = struct.unpack("f", struct.pack("f", value))
        except OverflowError:
            return False
        above = low < rounded if interval[0] == "(" else low <= rounded
        return above and (rounded < high if interval[-1] == ")" else rounded <= high)

    if math.isfinite(high):
        return Range(f"a number in {interval}", holds)
    bound = f"{low:g} or more" if interval[0] == "[" else f"more than {low:g}"
    return Range(f"a finite number, {bound}", holds)


def several(
    each: Range,
    *,
    length: int | None = None,
    increasing: bool = False,
    or_empty: bool = False,
) -> Range:
    """Tuples of numbers in a range. length: of the tuple; None for any. or_empty: () too."""

    def holds(values: Any) -> bool:
        return (
            isinstance(values, tuple)
            and (length is None or len(values) == length or (or_empty and not values))
            and all(map(each.holds, values))
            and (not increasing or list(values) == sorted(set(values)))
        )

    kind = "an increasing tuple" if increasing else "a tuple"
    size = "" if length is None else f" of {length}"
    kind = f"(), or {kind}" if or_empty else kind
    return Range(f"{kind}{size}, each element {each.expected}", holds)


RANGES = {
    "seed": whole(0, 2**32 - 1),
    "num_steps": whole(1),
    "batch_size": whole(1),
    "eval_batch_size": whole(1),
    "microbatches": whole(1),
    "ema_decay": real("[0, 1)"),
    "memory_limit_gib": real("[0, 1e6]"),
    "label_smoothing": real("[0, 1)"),
    "mixup": real("[0, inf)"),
    "balance": real("[0, inf)"),
    "log_every_steps": whole(1),
    "eval_every_steps": whole(1),
    "checkpoint_every_steps": whole(1),
    "mesh.data": whole(1, or_else=-1),
    "mesh.fsdp": whole(1, or_else=-1),
    "mesh.sequence": whole(1, or_else=-1),
    "mesh.tensor": whole(1, or_else=-1),
    "profile.start_step": whole(1),
    "profile.num_steps": whole(0),
    "data.image_shape": several(whole(1, 65_536), length=3),
    "data.num_classes": whole(1),
    "data.crop_padding": whole(0, 65_536),
    "data.affine": real("[0, 1)"),
    "data.min_crop_area": real("(0, 1]"),
    "data.mean": several(real("[0, 1]")),
    "data.std": several(real("(0, 1]")),
    "data.num_threads": whole(0, _AHEAD),
    "data.prefetch": whole(0, _AHEAD),
    "data.train_share": real("(0, 1)"),
    "data.vocab_size": whole(1),
    "data.end_token": whole(0, or_else=-1),
    "data.context": whole(1),
    "data.eval_batches": whole(0),
    "model.units": several(whole(1, _DEEP)),
    "model.channels": several(whole(1)),
    "model.layers": whole(1, _DEEP),
    "model.width": whole(1),
    "model.heads": whole(1),
    "model.kv_heads": whole(1),
    "model.hidden": whole(1),
    "model.patch": whole(1),
    "model.dropout": real("[0, 1)"),
    "model.experts": whole(0),
    "model.experts_per_token": whole(1),
    "model.head_size": whole(0),
    "model.norm_eps": real("(0, 1]"),
    "model.learned_positions": whole(0),
    "model.rotary_base": real("(0, inf)"),
    "model.rotary_scaling": several(real("(0, inf)"), length=4, or_empty=True),
    "model.window": whole(0),
    "model.integrator_steps": whole(1),
    "model.adapter_rank": whole(1),
    "model.lora_rank": whole(0),
    "model.lora_alpha": real("(0, inf)"),
    "model.feed_forward_chunks": whole(1),
    "model.loss_chunk": whole(1),
    "model.stored_layers": whole(0, _DEEP, or_else=-1),
    "model.unroll": whole(1),
    "model.grid_bits": whole(0, 22),
    "optimizer.momentum": real("[0, 1)"),
    "optimizer.b1": real("[0, 1)"),
    "optimizer.b2": real("[0, 1)"),
    "optimizer.weight_decay": real("[0, inf)"),
    "optimizer.clip_norm": real("[0, inf)"),
    "schedule.learning_rate": real("[0, inf)"),
    "schedule.warmup_steps": whole(0),
    "schedule.decay_steps": whole(0),
    "schedule.boundaries": several(whole(1), increasing=True),
    "schedule.factor": real("[0, inf)"),
}


def check_ranges(config: ConfigDict) -> None:
    """Raises ConfigError for a number that is not finite or out of its range.

    Settings that are not in the table, such as those of a user's own model, need only be such that
    config.json can hold them.
    """
    for name, value in flatten(config).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"config.{name}: got {value!r} of type {type(value).__name__}, expected Python "
                "numbers, text, or tuples of these, which config.json can hold: give the name of "
                "anything else"
            ) from error
        if name in RANGES and not RANGES[name].holds(value):
            raise ConfigError(f"config.{name}: got {value!r}, expected {RANGES[name].expected}")
