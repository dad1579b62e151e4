"""Configs that start from the folder of another run, from files written by hand."""

import json
import runpy

import pytest

from revnet_jax.config import language_model
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
