"""Configs that start from the folder of another run, from files written by hand."""

import json
import runpy

import pytest

from revnet_jax.config import ConfigError, language_model, vision_transformer
from tests.small_run import ROOT


def arm(path, settings, *absent):
    """Writes the folder of a run whose data section lacks some settings."""
    settings = json.loads(json.dumps(settings.to_dict()))
    for name in absent:
        del settings["data"][name]
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"config": settings}))
    return str(path)


def config_of(name, arm):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arm)


@pytest.mark.parametrize(("was", "now"), [("8", 8), ("auto", -1)])
def test_a_run_from_when_stored_layers_was_a_string(was, now, tmp_path):
    run = language_model()
    run.data.update({"context": 7, "vocab_size": 300, "end_token": 3})
    with run.ignore_type():
        run.model.stored_layers = was
    run.model.rotary_scaling = (8, 1, 4, 8192)
    config = config_of("lm_finetune", arm(tmp_path / "run", run))
    assert config.model.stored_layers == now
    assert config.model.rotary_scaling == (8, 1, 4, 8192)
    assert (config.data.context, config.data.vocab_size, config.data.end_token) == (7, 300, 3)
    assert config.init_from == str(tmp_path / "run")


@pytest.mark.parametrize("older", [False, True])
def test_the_config_of_fine_tuning_a_vision_transformer(older, tmp_path):
    run = vision_transformer("Ti")
    run.model.patch = 4
    run.data.update({"image_shape": (32, 32, 3), "num_classes": 7, "dir": "elsewhere"})
    run.data.update({"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.125)})
    folder = arm(tmp_path / "run", run, *(("mean", "std") if older else ()))
    config = config_of("vit_finetune", folder)
    assert config.model == run.model
    assert (config.data.image_shape, config.data.num_classes) == ((32, 32, 3), 7)
    assert config.data.mean == (() if older else (0.5, 0.4, 0.3))
    assert config.data.std == (() if older else (0.5, 0.25, 0.125))
    assert (config.data.name, config.data.dir) == ("image_folder", "")
    assert config.init_from == folder


def test_the_run_of_another_family_is_no_arm(tmp_path):
    folder = arm(tmp_path / "run", language_model())
    with pytest.raises(
        ConfigError, match=r"expected one of laptop, or the folder of a run of vit .*of deco"
    ):
        config_of("vit_finetune", folder)


def test_a_config_that_cannot_be_read_is_no_arm(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"expected one of laptop, or the folder of a run of dec"):
        config_of("lm_finetune", str(tmp_path))
