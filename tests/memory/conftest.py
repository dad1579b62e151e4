"""A config small enough to compile in a test."""

import pytest

from revnet_jax.config import image_classification

TINY = {
    "batch_size": 16,
    "model.units": (1, 3),
    "model.channels": (8, 8, 16),
}


@pytest.fixture
def tiny_config():
    config = image_classification()
    config.update_from_flattened_dict(TINY)
    return config
