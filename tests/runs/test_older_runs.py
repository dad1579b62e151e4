"""Runs of earlier versions: config.json lacks settings that are newer, or has them otherwise."""

import json

import pytest

from revnet_jax.config import ConfigError, digits, experiment, language_model
from revnet_jax.runs.workdir import claim, load_config
from tests.runs.test_workdir import record_of, write_rows


def strip_settings(workdir, *keys):
    """Removes settings from config.json, as a version that had none of them wrote it."""
    record = record_of(workdir)
    for key in keys:
        *sections, name = key.split(".")
        section = record["config"]
        for part in sections:
            section = section[part]
        del section[name]
    (workdir / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("key", ["schedule.decay_steps", "ema_decay", "data.affine"])
def test_a_run_older_than_a_setting_goes_on_with_its_default(key, own, tmp_path):
    config = digits()
    config.optimizer.name = "optax:adan" if own else "sgd"
    claim(tmp_path, config, {})
    write_rows(tmp_path, [{"step": 20}])
    strip_settings(tmp_path, key)
    assert claim(tmp_path, config, {}) == {}
    assert load_config(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("knobs", [digits, language_model])
def test_a_model_of_ones_own_on_older_data_of_the_package(knobs, tmp_path):
    config = experiment()
    config.model.family, config.optimizer.name = "mine:build", "optax:adan"
    config.data = knobs().data
    claim(tmp_path, config, {})
    write_rows(tmp_path, [{"step": 20}])
    newer = ("mean", "std", "affine", "dir") if knobs is digits else ("end_token", "dir")
    strip_settings(tmp_path, *(f"data.{name}" for name in newer))
    assert claim(tmp_path, config, {}) == {}
    assert load_config(tmp_path).to_dict() == config.to_dict()


def test_data_of_ones_own_get_no_setting_of_the_package(tmp_path):
    config = experiment()
    config.model.family, config.data.name = "mine:build", "mine:load"
    config.data.update({"image_shape": (2, 2, 1), "context": 8})
    claim(tmp_path, config, {})
    assert load_config(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("was", "now"), [("0", 0), ("8", 8), ("auto", -1)])
def test_a_run_from_when_stored_layers_was_a_string_goes_on(was, now, own, tmp_path):
    config = digits()
    config.optimizer.name = "optax:adan" if own else "sgd"
    config.model.stored_layers = now
    claim(tmp_path, config, {})
    write_rows(tmp_path, [{"step": 20}])
    record = record_of(tmp_path)
    record["config"]["model"]["stored_layers"] = was
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert claim(tmp_path, config, {}) == {}
    assert load_config(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("damaged", ["all", "", "-2", "9" * 5000, 1.5, None])
def test_what_stored_layers_never_was(damaged, tmp_path):
    claim(tmp_path, digits(), {})
    record = record_of(tmp_path)
    record["config"]["model"]["stored_layers"] = damaged
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="is damaged"):
        load_config(tmp_path)


def test_a_config_of_ones_own_may_lack_a_setting(tmp_path):
    config = digits()
    config.optimizer.name = "optax:adan"
    del config.data["flip"]
    claim(tmp_path, config, {})
    write_rows(tmp_path, [{"step": 20}])
    assert claim(tmp_path, config, {}) == {}
