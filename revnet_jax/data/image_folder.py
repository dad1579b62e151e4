"""Data sets with one folder per class: `train/<class>/*.jpg`, and `test/` or `val/` like it."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from revnet_jax.data.class_folders import find_images
from revnet_jax.data.dataset import DataError, Dataset, of_channels, shorten
from revnet_jax.data.image_file import (
    NUM_CROP_UNIFORMS,
    centre_crop_box,
    check_image_files,
    random_crop_box,
    read_image,
)

# Means and standard deviations of the ImageNet training pixels, scaled to [0, 1]. These values
# have been in common use since 2015, so results are comparable.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FolderSplit:
    """A split whose images are decoded from files when they are read.

    `read` returns uint8 [B, S, S, 3], S the image size: the centre crop for evaluation by default,
    or with `crop_uniforms_BU` [B, 22] the random resized crops for training. It raises a DataError
    that names the file if one cannot be decoded.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    image_size: int
    num_crop_uniforms: int = NUM_CROP_UNIFORMS

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self,
        indices_B: np.ndarray,
        crop_uniforms_BU: np.ndarray | None = None,
        min_crop_area: float = 1.0,
    ) -> np.ndarray:
        size = self.image_size
        pixels_BHWC = np.empty((len(indices_B), size, size, 3), np.uint8)
        for row, index in enumerate(indices_B):
            if crop_uniforms_BU is None:
                choose_box = partial(centre_crop_box, image_size=size)
            else:
                choose_box = partial(
                    random_crop_box, uniforms_U=crop_uniforms_BU[row], min_crop_area=min_crop_area
                )
            pixels_BHWC[row] = read_image(self.paths[index], choose_box, size)
        return pixels_BHWC


def load_image_folder(
    dir: str | os.PathLike[str], *, image_size: int, verify_images: bool
) -> Dataset:
    """Loads a tree `dir/train/<class>/` and `dir/test/<class>/` (or `dir/val/<class>/`).

    The classes are the sorted folders of `train`. Files inside a class folder are found at any
    depth; files and folders whose names start with "." and files without an image suffix are
    skipped. See `find_images` for symbolic links. Images are converted to RGB, and read as they
    are stored: the EXIF orientation is not applied, as is usual for ImageNet.

    Args:
      dir: the root of the tree.
      image_size: height and width of the images to produce, in pixels.
      verify_images: decode every file now, to find files that are damaged or truncated (see
        `check_image_files` for what is detected, and the cost). Otherwise such a file raises an
        error when it is read; incomplete images are never trained on.

    Raises:
      DataError: a folder is missing, empty or cannot be read, `test` has a class that `train`
        lacks, both `test` and `val` exist, a link leads outside its class, or a file is not a
        readable image.
      ValueError: `image_size` is not positive.
    """
    if image_size < 1:
        raise ValueError(f"got image_size={image_size}, expected a positive number of pixels")
    split_dirs = _split_dirs(Path(dir))
    train_paths, test_paths = find_images(split_dirs)
    class_names = tuple(train_paths)
    train = _folder_split(train_paths, class_names, image_size)
    test = _folder_split(test_paths, class_names, image_size)
    if verify_images:
        check_image_files(train.paths + test.paths)
    image_shape = (image_size, image_size, 3)
    return Dataset(
        name="image_folder",
        train=train,
        test=test,
        class_names=class_names,
        image_shape=image_shape,
        mean_HWC=of_channels(IMAGENET_MEAN, image_shape),
        scale=of_channels(IMAGENET_STD, image_shape),
        sha256=_sha256_of_names(split_dirs, (train, test)),
    )


def _split_dirs(dir: Path) -> tuple[Path, Path]:
    if not dir.is_dir():
        raise DataError(
            f"image_folder: got no folder {dir}; expected one with train/<class>/ and "
            "test/<class>/ or val/<class>/; check dir"
        )
    test_dirs = [dir / name for name in ("test", "val") if (dir / name).is_dir()]
    if not (dir / "train").is_dir() or not test_dirs:
        found = shorten(sorted(path.name for path in dir.iterdir())) or "nothing"
        raise DataError(
            f"image_folder: expected {dir / 'train'} and {dir / 'test'} or {dir / 'val'}, each "
            f"with one folder a class; got {found}; check dir"
        )
    if len(test_dirs) > 1:
        raise DataError(
            f"image_folder: got both {test_dirs[0]} and {test_dirs[1]}, expected one of them; "
            "move the one that evaluation should not use"
        )
    return dir / "train", test_dirs[0]


def _folder_split(
    paths: dict[str, list[str]], class_names: Sequence[str], image_size: int
) -> FolderSplit:
    """Builds a split; paths: by class name; a test split may lack classes."""
    counts = [len(paths.get(name, ())) for name in class_names]
    # By class and then by path: the labels below follow this order.
    in_order = tuple(path for name in class_names for path in paths.get(name, ()))
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    return FolderSplit(in_order, labels, image_size)


def _sha256_of_names(split_dirs: Sequence[Path], splits: Sequence[FolderSplit]) -> str:
    """Hashes all paths relative to their split's folder, so that the tree can be moved."""
    digest = hashlib.sha256()
    for split_dir, split in zip(split_dirs, splits, strict=True):
        start = len(os.path.join(split_dir, ""))
        for path in split.paths:
            # File names need not be valid text. A zero byte, which no name holds, ends each, and a
            # second one ends the split: so other lists of names cannot have the same bytes.
            digest.update(os.fsencode(path[start:]) + b"\0")
        digest.update(b"\0")
    return digest.hexdigest()
