"""The config.json of a published model, with checks that say in one line what is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revnet_jax.pretrained.files import WeightsError, read_json_object


class Description:
    """The fields of a config.json. A field that is null counts as absent, as it does there.

    Defaults are those of the published format: a field that is not there has a documented value.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any] | None = None):
        self.path, self._fields = path, read_json_object(path) if fields is None else fields

    @property
    def names(self) -> set[str]:
        """The names of the fields that are there."""
        return {name for name, value in self._fields.items() if value is not None}

    def part(self, name: str) -> Description:
        """The fields of an object, which may be absent."""
        return Description(self.path, self._group(name))

    def whole(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A whole number from `low`."""
        value = self._value(name, default)
        # The exact type, because a bool is an int too.
        if type(value) is not int or value < low:
            raise self._wrong(name, value, f"a whole number from {low}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def matching(self, name: str, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        """The match of a pattern with a whole string."""
        match = pattern.fullmatch(self.text(name))
        if match is None:
            raise self._wrong(name, self.text(name), expected)
        return match

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        return self._number(name, self._value(name, default))

    def numbers(
        self, name: str, length: int, default: Sequence[float] | None = None
    ) -> tuple[float, ...]:
        """Several numbers; one number stands for `length` equal ones."""
        value = self._value(name, default)
        several = value if isinstance(value, list | tuple) else [value] * length
        numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in several)
        # NaN fails the comparison, and so does a whole number too large for a float.
        if len(several) != length or not (
            numeric and all(abs(x) <= sys.float_info.max for x in several)
        ):
            raise self._wrong(name, value, f"{length} numbers")
        return tuple(several)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def only(self, name: str, *known: Any) -> None:
        """Checks that the field has one of these values; its default is the first."""
        value = self._value(name, known[0])
        # Types too, because True == 1.
        if not any(value == each and type(value) is type(each) for each in known):
            raise self._wrong(name, value, " or ".join(map(repr, known)))

    def end_token(self) -> int:
        """The id of the token that ends a text; -1 if there is none, or several."""
        # Models for chats may list several, but a run has one, so that it gets none of them.
        value = self._fields.get("eos_token_id")
        return value if type(value) is int and value >= 0 else -1

    def rotary(self) -> dict[str, Any]:
        """The settings of rotary positions, from the fields of either style.

        Before version 5 transformers wrote `rope_theta` and `rope_scaling`, now `rope_parameters`.
        """
        scaling, parameters = (self._group(name) for name in ("rope_scaling", "rope_parameters"))
        # Should a file have both, the newer one counts.
        rope = {**scaling, **parameters}
        # Older files have this field at the top, newer ones beside `rope_theta`: see below.
        self.only("partial_rotary_factor", 1.0)
        base = rope.get("rope_theta", self._value("rope_theta", 10_000.0))
        # "type" is the older name of "rope_type".
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise self._wrong("rope_scaling", rope, "of type default or llama3, for whole heads")
        names = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        numbers = tuple(self._number(name, rope.get(name)) for name in names if kind == "llama3")
        return {"rotary_base": self._number("rope_theta", base), "rotary_scaling": numbers}

    def _group(self, name: str) -> Mapping[str, Any]:
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return {key: each for key, each in value.items() if each is not None}

    def _value(self, name: str, default: Any) -> Any:
        value = self._fields.get(name)
        return default if value is None else value

    def _number(self, name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN, which Python's JSON reads, fails the second comparison. So does a whole number too
        # large for a float.
        if not fits or not 0 < value <= sys.float_info.max:
            raise self._wrong(name, value, "a number above 0")
        return float(value)

    def _wrong(self, name: str, value: Any, expected: str) -> WeightsError:
        return WeightsError(f"{self.path}: got {name}={str(value)[:80]}, expected {expected}")
