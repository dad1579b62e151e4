"""From the settings of the data to batches."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, digits
from revnet_jax.data import DataError, load_dataset
from revnet_jax.training import inputs
from revnet_jax.training.inputs import build_data
from revnet_jax.training.sharding import make_mesh


def first_images(config):
    """The first images of training and of test, float32 [B, H, W, C]."""
    data = build_data(config, make_mesh(jax.devices()))
    with contextlib.closing(data.train(0)) as train, contextlib.closing(data.test()) as test:
        return next(train)["image"], next(test)["image"]


def test_images_are_normalised_as_the_config_says():
    config = digits()
    config.data.crop_padding = 0  # zeros after normalisation, so that they are no pixels
    config.data.mean, config.data.std = (0.0,), (1.0,)
    pixels = first_images(config)
    assert 0 <= min(map(np.min, pixels)) < max(map(np.max, pixels)) <= 1
    config.data.mean, config.data.std = (0.5,), (0.25,)
    for share_BHWC, image_BHWC in zip(pixels, first_images(config), strict=True):
        np.testing.assert_allclose(image_BHWC, (share_BHWC - 0.5) / 0.25, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), ()), ((), (0.5,)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
)
def test_a_normalisation_has_a_mean_and_a_deviation_per_channel(mean, std):
    config = digits()
    config.data.mean, config.data.std = mean, std
    with pytest.raises(ConfigError, match=r"^config.data: got mean=.* expected 1 numbers in each"):
        build_data(config, make_mesh(jax.devices()))


@pytest.mark.parametrize(("label", "split"), [(-1, "test"), (10, "train"), (10, "test")])
def test_labels_that_are_no_class(label, split, monkeypatch):
    dataset = load_dataset("digits")
    labels = getattr(dataset, split).labels.copy()
    labels[-1] = label
    wrong = dataclasses.replace(getattr(dataset, split), labels=labels)
    dataset = dataclasses.replace(dataset, **{split: wrong})
    monkeypatch.setattr(inputs, "load_data", lambda config: dataset)
    message = rf"digits: got label {label} in the {split} split, expected 0 to 9"
    with pytest.raises(DataError, match=message):
        build_data(digits(), make_mesh(jax.devices()))
