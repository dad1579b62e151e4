"""An imported vision transformer is used like a run: evaluated, fine-tuned, exported."""

import json
import runpy

import numpy as np
import pytest
from PIL import Image

from revnet_jax.config import ConfigError
from revnet_jax.pretrained.exporting import export_weights
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.runs.workdir import load_config
from revnet_jax.training.loop import train
from revnet_jax.training.restore import evaluate_run, restore_run
from tests.pretrained import published_vit as published
from tests.small_run import ROOT

pytest.importorskip("safetensors", reason="needs the extra pretrained")
SIZE = 8
COLOURS = [(200, 30, 40), (20, 190, 60), (10, 60, 220), (240, 230, 10), (90, 90, 90)]


@pytest.fixture
def source(tmp_path):
    """A model of square images, as those of a folder are."""
    found = published.tensors()
    found["pos_embed"] = found["pos_embed"][:, : 1 + (SIZE // published.P) ** 2]
    published.write(tmp_path / "source", published.changed(img_size=SIZE), found)
    return tmp_path / "source"


@pytest.fixture
def images(tmp_path):
    """Images of one colour, by colour: so that every crop of them is the same image."""
    for split, count in (("train", 4), ("val", 1)):
        for label, colour in enumerate(COLOURS):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 12), colour).save(folder / f"{i}.png")
    return tmp_path / "images"


def tuned(imported, images, **model):
    """The settings of a short fine-tuning."""
    get_config = runpy.run_path(str(ROOT / "configs" / "vit_finetune.py"))["get_config"]
    config = get_config(str(imported))
    config.num_steps = config.eval_every_steps = config.checkpoint_every_steps = 20
    config.batch_size = config.eval_batch_size = 10
    config.data.update({"dir": str(images), "num_threads": 0})
    config.schedule.update({"warmup_steps": 5, "learning_rate": 0.01})
    config.model.update(model)
    return config


def naive_loss(found):
    """The loss of the test images, normalised as config.json says."""
    losses = []
    for label, colour in enumerate(COLOURS):
        mean, std = (np.asarray(published.PRETRAINED[name]) for name in ("mean", "std"))
        image_HWC = np.tile((np.asarray(colour) / 255 - mean) / std, (SIZE, SIZE, 1))
        logits_V = published.logits(published.MODEL, found, image_HWC)
        losses.append(np.log(np.sum(np.exp(logits_V))) - logits_V[label])
    return np.mean(losses)


@pytest.mark.thorough
def test_from_published_weights_to_fine_tuned_ones(source, images, tmp_path, run_program):
    from safetensors.numpy import load_file

    imported, workdir = tmp_path / "imported", tmp_path / "tuned"
    status, printed, said = run_program(
        "import_weights", f"--source={source}", f"--workdir={imported}"
    )
    assert (status, said) == (0, "")
    assert json.loads(printed)["model_type"] == "vit"
    before = evaluate_run(imported, data_dir=str(images))["eval_loss"]
    assert before == pytest.approx(naive_loss(load_file(source / "model.safetensors")), abs=1e-5)

    config = tuned(imported, images)
    assert config.model == load_config(imported).model
    assert train(config, workdir)["eval_loss"] < before - 1
    status, _, said = run_program(
        "export_weights", f"--workdir={workdir}", f"--target={tmp_path / 'out'}"
    )
    assert status == 0, said
    import_weights(tmp_path / "out", tmp_path / "again")
    expected, got = (restore_run(folder).variables for folder in (workdir, tmp_path / "again"))
    np.testing.assert_array_equal(
        got.params["layers"][0]["qkv"]["kernel"], expected.params["layers"][0]["qkv"]["kernel"]
    )


@pytest.mark.thorough
def test_fine_tuning_reversibly(source, images, tmp_path):
    """BDIA starts as the imported network, and is exported as the published family."""
    imported = tmp_path / "imported"
    import_weights(source, imported)
    before = evaluate_run(imported, data_dir=str(images))["eval_loss"]
    config = tuned(imported, images, reversible=True, integrator="bdia", backprop="reverse")
    last = train(config, tmp_path / "tuned")
    assert last["eval_loss"] < before - 1
    assert last["exact_mismatches"] == 0
    export_weights(tmp_path / "tuned", tmp_path / "out")
    import_weights(tmp_path / "out", tmp_path / "again")
    again = evaluate_run(tmp_path / "again", data_dir=str(images))["eval_loss"]
    assert again == pytest.approx(last["eval_loss"], abs=1e-5)


def test_what_the_arm_of_fine_tuning_must_be(tmp_path):
    with pytest.raises(ConfigError, match="expected one of laptop, or the folder of a run of vit"):
        tuned(tmp_path / "nothing", tmp_path)
