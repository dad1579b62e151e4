"""A run goes on with the data it was started with, and no others."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from revnet_jax.config import ConfigError
from revnet_jax.data.source import Arrays
from revnet_jax.runs import data_record
from revnet_jax.runs import workdir as workdirs
from revnet_jax.training.inputs import build_data
from revnet_jax.training.restore import all_fsdp


@pytest.fixture
def claim(tiny_config, tmp_path):
    """Builds a config's data and claims the folder of a run with them, as training does."""
    tiny_config.update_from_flattened_dict(
        {"data.name": "image_folder", "data.image_shape": (8, 8, 3), "data.num_classes": 2}
    )

    def claim(dir):
        tiny_config.data.dir = str(dir)
        data = build_data(tiny_config, all_fsdp())
        (tmp_path / "run").mkdir(exist_ok=True)
        workdirs.claim(tmp_path / "run", tiny_config, data.record)
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')  # a step was made

    return claim


@pytest.fixture
def images(tmp_path):
    for split, count in (("train", 8), ("test", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_run_on_image_files_goes_on_with_the_same_files(claim, images, tmp_path):
    claim(images)
    claim(shutil.copytree(images, tmp_path / "elsewhere"))
    new, old = images / "train/cat/new.png", images / "train/cat/0.png"
    shutil.copy(old, new)
    expected = "got 17 training and 4 test images of sha256 .*, expected 16 training and 4 test"
    with pytest.raises(ConfigError, match=expected):
        claim(images)
    old.unlink()
    with pytest.raises(ConfigError, match="files were added, removed, renamed"):
        claim(images)
    new.rename(old)
    claim(images)
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": {}}))
    shutil.copy(old, new)
    claim(images)  # an older version recorded nothing to compare with


def test_images_in_memory_are_told_apart_by_what_they_hold(tiny_config, tmp_path, monkeypatch):
    record = build_data(tiny_config, all_fsdp()).record
    assert (record["train_images"], record["test_images"]) == (1438, 359)
    workdirs.claim(tmp_path, tiny_config, record)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a step was made
    load = np.load

    def changed(*args, **kwargs):
        with load(*args, **kwargs) as arrays:
            arrays = dict(arrays)
        arrays["images"][5, 4, 4, 0] ^= 1
        return _Arrays(arrays)

    monkeypatch.setattr(np, "load", changed)
    with pytest.raises(ConfigError, match="holds a run on other data: got 1,438 training"):
        workdirs.claim(tmp_path, tiny_config, build_data(tiny_config, all_fsdp()).record)


class _Arrays(dict):
    """As np.load returns them."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass


def test_arrays_of_ones_own_are_told_apart_by_what_they_hold(tmp_path, tiny_config):
    def record(examples, **changes):
        arrays = {"x": np.arange(2.0 * examples).reshape(examples, 2), "y": np.arange(examples)}
        return data_record.of_source(Arrays(arrays | changes, arrays))

    workdirs.claim(tmp_path, tiny_config, record(5))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a step was made
    workdirs.claim(tmp_path, tiny_config, record(5))
    for other in (record(6), record(5, y=np.arange(5)[::-1])):
        with pytest.raises(
            ConfigError, match=r"on other data: got data of sha256 .*, expected data"
        ):
            workdirs.claim(tmp_path, tiny_config, other)
    assert data_record.of_source(object()) == {}
