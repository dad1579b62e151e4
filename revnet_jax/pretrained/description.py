"""The config.json of a published model, with checks that say in one line what is wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revnet_jax.pretrained.files import WeightsError, read_json_object


class Description:
    """The fields of a config.json. A field that is null counts as absent, as it does there.

    Defaults are those of the published format: a field that is not there has a documented value.
    """

    def __init__(self, path: Path):
        self.path, self._fields = path, read_json_object(path)

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number from 1."""
        value = self._value(name, default)
        # The exact type, because a bool is an int too.
        if type(value) is not int or value < 1:
            raise self._wrong(name, value, "a whole number from 1")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self._value(name, None)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        return self._number(name, self._value(name, default))

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
