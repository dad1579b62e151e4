"""The UCI optical digits: 1,797 images of 8x8 pixels, shipped with the package.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licensed CC BY 4.0 (see
digits_attribution.txt). They need no download, and a network learns them in seconds on a laptop.
"""

from pathlib import Path

import numpy as np

from revnet_jax.data.dataset import Dataset, in_memory_dataset

_FILE = Path(__file__).with_name("digits.npz")


def load_digits() -> Dataset:
    """Returns the digits: uint8 images [N, 8, 8, 1] with values 0 to 16, and 10 classes.

    The split is stratified and stored in the file: 1,438 training images, 359 (20 %) test images.
    """
    with np.load(_FILE, allow_pickle=False) as arrays:
        images_NHWC, labels = arrays["images"], arrays["labels"]
        test_indices = arrays["test_indices"]
    is_test = np.zeros(len(labels), bool)
    is_test[test_indices] = True
    return in_memory_dataset(
        "digits",
        train_images_NHWC=images_NHWC[~is_test],
        train_labels=labels[~is_test],
        test_images_NHWC=images_NHWC[is_test],
        test_labels=labels[is_test],
        class_names=[str(digit) for digit in range(10)],
    )
