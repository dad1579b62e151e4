"""Every number of every config has a range, and one out of it is refused by name."""

import math
import pathlib
import runpy

import numpy as np
import pytest
from ml_collections import config_dict

from revnet_jax.config import (
    ConfigError,
    flatten,
    image_classification,
    language_model,
    vision_transformer,
)
from revnet_jax.config.ranges import RANGES, check_ranges

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
KNOBS = (image_classification, language_model, vision_transformer)


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(config):
    """Its settings that are numbers or tuples of them, empty ones too."""
    return {
        name: value
        for name, value in flatten(config).items()
        if is_number(value) or (isinstance(value, tuple) and all(map(is_number, value)))
    }


def refusal(name, value, knobs):
    config = knobs()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError) as caught:
        check_ranges(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_number_of_every_config_has_a_range_that_it_is_in(path):
    for arm in ("", "laptop"):
        config = runpy.run_path(str(path))["get_config"](arm)
        assert numeric(config).keys() <= RANGES.keys(), "give a new setting its range"
        check_ranges(config)


def test_every_range_is_of_a_setting():
    assert RANGES.keys() == set().union(*(numeric(knobs()) for knobs in KNOBS))


@pytest.mark.parametrize("knobs", KNOBS)
def test_no_number_may_be_nonsense(knobs):
    for name, value in numeric(knobs()).items():
        nonsense = {int: (-(10**30), 10**30), float: (math.nan, math.inf, -math.inf, -1.0, 1e39)}
        tuples = ((0,), (2.5,), ("a", "b"), (10**30,), (math.nan,), (True,))
        if name == "data.mean":
            tuples = tuples[1:]  # a mean of 0 leaves pixels where they are
        for wrong in nonsense.get(type(value), tuples):
            shown = repr(wrong)
            assert refusal(name, wrong, knobs).startswith(f"config.{name}: got {shown}, expected ")


@pytest.mark.parametrize(
    ("name", "good", "bad", "expected"),
    [
        ("label_smoothing", (0, 0.999), (1.0, 1 - 1e-12), "a number in [0, 1)"),
        ("optimizer.momentum", (0.0, 0.99), (2.0, 1.0), "a number in [0, 1)"),
        ("data.min_crop_area", (1e-3, 1.0), (0.0, 1.1), "a number in (0, 1]"),
        ("optimizer.weight_decay", (0.0, 1e38), (-1.0,), "a finite number, 0 or more"),
        ("mesh.fsdp", (-1, 8), (0, -2), "-1, or a whole number, 1 to 2,147,483,647"),
        ("data.prefetch", (0, 1000), (-1, 10**9), "a whole number, 0 to 1,000"),
        ("seed", (0, 2**32 - 1), (2**32,), "a whole number, 0 to 4,294,967,295"),
        (
            "schedule.boundaries",
            ((), (1,), (3, 7)),
            ((7, 3), (3, 3), (0, 1)),
            "an increasing tuple, each element a whole number, 1 to 2,147,483,647",
        ),
        (
            "data.image_shape",
            ((8, 8, 1),),
            ((8, 8), (8, 8, 0)),
            "a tuple of 3, each element a whole number, 1 to 65,536",
        ),
    ],
)
def test_where_ranges_end(name, good, bad, expected):
    for value in good:
        assert RANGES[name].holds(value)
    for value in bad:
        assert not RANGES[name].holds(value)
        message = refusal(name, value, image_classification)
        assert message == f"config.{name}: got {value!r}, expected {expected}"
    assert not RANGES[name].holds(True)
    assert not RANGES[name].holds(None)


def test_settings_of_other_models_are_left_to_them():
    config = image_classification()
    config.model.temperature = math.nan
    check_ranges(config)


@pytest.mark.parametrize("value", [np.float32, np.zeros(2), pathlib.Path("x"), ({1, 2},)])
def test_config_json_can_hold_every_setting(value):
    config = image_classification()
    config.model.mine = config_dict.placeholder(object)
    config.model.mine = value
    with pytest.raises(ConfigError, match=r"^config.model.mine: got .* of type .*, expected Pyth"):
        check_ranges(config)
