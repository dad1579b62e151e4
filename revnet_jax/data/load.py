"""Loads data sets by name."""

import os

from revnet_jax.data.cifar import load_cifar
from revnet_jax.data.dataset import Dataset, file_errors
from revnet_jax.data.digits import load_digits
from revnet_jax.data.image_folder import load_image_folder

DATASET_NAMES = ("digits", "cifar10", "cifar100", "image_folder")


@file_errors("a data set that can be read")
def load_dataset(
    name: str,
    *,
    dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    verify_images: bool = True,
) -> Dataset:
    """Loads a data set, and checks everything that can be checked before training starts.

    Args:
      name: one of `DATASET_NAMES`.
      dir: the folder with the files; None for digits, which come with the package.
      image_size: height and width in pixels. Required for image_folder. The others have a fixed
        size (digits 8, CIFAR 32): pass that or None.
      verify_images: image_folder only: decode every image now rather than when it is first used.

    Raises:
      DataError: files are missing, damaged or inconsistent.
      ValueError: an unknown name, or an argument that does not fit this data set.
    """
    if name not in DATASET_NAMES:
        raise ValueError(f"got data set {name!r}, expected one of {', '.join(DATASET_NAMES)}")
    if name == "digits":
        if dir:
            raise ValueError(
                f"got dir={os.fspath(dir)!r} for digits, expected None: they come with the package"
            )
        dataset = load_digits()
    elif not dir:
        raise ValueError(f"got no dir for {name}, expected the folder that holds its files")
    elif name == "image_folder":
        if image_size is None:
            raise ValueError("got no image_size for image_folder, expected a size such as 224")
        return load_image_folder(dir, image_size=image_size, verify_images=verify_images)
    else:
        dataset = load_cifar(name, dir)
    if image_size not in (None, dataset.image_shape[0]):
        raise ValueError(
            f"got image_size={image_size} for {name}, expected {dataset.image_shape[0]} or None: "
            "its images have one size"
        )
    return dataset
