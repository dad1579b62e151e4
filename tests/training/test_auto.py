"""stored_layers=-1 fills the memory there is, and stays what it was."""

import functools
import json

import jax
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.training import auto, loop
from revnet_jax.training.auto import found_for, largest_stored_layers, needed_bytes
from revnet_jax.training.loop import resolve_auto


@pytest.mark.thorough
def test_the_largest_that_fits_and_the_next_does_not(tiny_config, tmp_path, monkeypatch):
    tiny_config.model.update({"units": (8, 2), "stored_layers": -1})
    devices = jax.devices()[:1]
    compiled = functools.cache(lambda m: needed_bytes(tiny_config, devices, m))
    monkeypatch.setattr(auto, "needed_bytes", lambda config, devices, m: compiled(m))
    need = {m: compiled(m) for m in (0, 3, 4)}
    assert need[0] < need[3] < need[4]
    tiny_config.memory_limit_gib = (need[3] + need[4]) / 2 / 2**30
    lines = []
    assert largest_stored_layers(tiny_config, devices, lines.append) == 3
    assert any(line.startswith("stored_layers=3 needs") for line in lines)
    assert any(line.startswith("stored_layers=4 needs") for line in lines)

    tiny_config.memory_limit_gib = need[0] / 2 / 2**30
    with pytest.raises(ConfigError, match=r"got -1, but a step does not fit .* smaller batch"):
        largest_stored_layers(tiny_config, devices, lines.append)

    conditions = found_for(tiny_config, jax.devices())
    (tmp_path / "auto.json").write_text(json.dumps({"stored_layers": 1, "found_for": conditions}))
    assert resolve_auto(tiny_config, tmp_path) == 1  # whatever the memory is now


def test_it_is_found_again_on_other_devices(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "largest_stored_layers", lambda config, devices, say: len(devices))
    two = jax.devices()
    assert len(two) == 2
    assert resolve_auto(tiny_config, tmp_path) == 2
    monkeypatch.setattr(jax, "devices", lambda: two[:1])
    assert resolve_auto(tiny_config, tmp_path) == 1
    monkeypatch.setattr(loop, "largest_stored_layers", None)
    assert resolve_auto(tiny_config, tmp_path) == 1
