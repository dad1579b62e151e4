import hashlib

import numpy as np

from revnet_jax.data import load_dataset
from revnet_jax.data.digits import load_digits


def test_shapes_and_types():
    digits = load_dataset("digits", image_size=8)
    assert digits.image_shape == (8, 8, 1)
    assert digits.num_classes == 10
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.train.labels.dtype == np.int32
    image_BHWC = digits.train.read(np.arange(5))
    assert image_BHWC.shape == (5, 8, 8, 1)
    assert image_BHWC.dtype == np.uint8


def test_split_is_stratified_and_complete():
    digits = load_digits()
    num_train = np.bincount(digits.train.labels)
    num_test = np.bincount(digits.test.labels)
    np.testing.assert_array_equal(
        num_train + num_test, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )
    assert np.abs(num_test - 0.2 * (num_train + num_test)).max() < 1


def test_split_is_disjoint():
    digits = load_digits()
    images = [split.read(np.arange(len(split))) for split in (digits.train, digits.test)]
    train, test = ({image.tobytes() for image in part} for part in images)
    assert len(train) + len(test) == 1797  # the data set has no two equal images
    assert not train & test


def test_split_is_frozen():
    """Accuracies on the test split compare between versions only while this hash stands."""
    test = load_digits().test
    content = test.read(np.arange(len(test))).tobytes() + test.labels.astype(np.uint8).tobytes()
    assert (
        hashlib.sha256(content).hexdigest()
        == "386d811a323f132ca4cb0d0e63bf974fda8a421ba5193cf4f8d527c44251de08"
    )


def test_normalisation_is_of_the_training_pixels():
    digits = load_digits()
    pixels_NHWC = digits.train.read(np.arange(len(digits.train))).astype(np.float64)
    np.testing.assert_allclose(digits.mean_HWC, pixels_NHWC.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(digits.scale, pixels_NHWC.std(), rtol=1e-6)
    image_NHWC = digits.normalise(pixels_NHWC[:7].astype(np.uint8))
    assert image_NHWC.dtype == np.float32
    np.testing.assert_allclose(
        image_NHWC, (pixels_NHWC[:7] - pixels_NHWC.mean(axis=0)) / pixels_NHWC.std(), atol=1e-5
    )
