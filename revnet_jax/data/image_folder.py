"""Images in one folder a class: `train/<class>/*.jpg` beside `test/<class>/` or `val/<class>/`."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from revnet_jax.data.dataset import DataError, Dataset
from revnet_jax.data.image_file import (
    NUM_CROP_UNIFORMS,
    SUFFIXES,
    centre_crop_box,
    check_image_files,
    random_crop_box,
    read_image,
)

# Means and standard deviations of the ImageNet training pixels, scaled to [0, 1] (the values in
# common use since 2015, so that results compare).
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FolderSplit:
    """A split whose images are decoded from files when they are read.

    `read` gives uint8 [B, S, S, 3], S the image size: by default the centre crop of an
    evaluation, with `crop_uniforms_BU` [B, 22] the random resized crops of training. A file that
    cannot be decoded raises a DataError that names it.
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
    depth; hidden files and those without an image suffix are skipped. Images are RGB (others are
    converted) and are read as stored: an EXIF orientation is not applied, as usual for ImageNet.

    Args:
      dir: the root of the tree.
      image_size: height and width of the images to produce, in pixels.
      verify_images: open every file now, and decode those that look incomplete.

    Raises:
      DataError: a folder is missing or empty, `test` has a class that `train` lacks, both `test`
        and `val` exist, or a file is not a readable image.
      ValueError: `image_size` is not positive.
    """
    if image_size < 1:
        raise ValueError(f"got image_size={image_size}, expected a positive number of pixels")
    train_dir, test_dir = _split_dirs(Path(dir))
    class_names = _class_folders(train_dir)
    unknown = sorted(set(_class_folders(test_dir)) - set(class_names))
    if unknown:
        raise DataError(
            f"{test_dir / unknown[0]} is a class without training images: expected the folders of "
            f"{train_dir} ({_shorten(class_names)}); rename it or add training images"
        )
    train = _folder_split(train_dir, class_names, image_size)
    test = _folder_split(test_dir, class_names, image_size)
    if verify_images:
        check_image_files(train.paths + test.paths)
    image_shape = (image_size, image_size, 3)
    return Dataset(
        name="image_folder",
        train=train,
        test=test,
        class_names=class_names,
        image_shape=image_shape,
        mean_HWC=_fill(_IMAGENET_MEAN, image_shape),
        scale=_fill(_IMAGENET_STD, image_shape),
    )


def _fill(share_C: tuple[float, ...], image_shape: tuple[int, int, int]) -> np.ndarray:
    """float32 [H, W, C] in pixel values. Written out: numpy broadcasts three numbers slowly."""
    return np.full(image_shape, np.asarray(share_C, np.float32) * np.float32(255))


def _split_dirs(dir: Path) -> tuple[Path, Path]:
    if not dir.is_dir():
        raise DataError(
            f"image_folder: got no folder {dir}; expected one with train/<class>/ and "
            "test/<class>/ or val/<class>/; check dir"
        )
    test_dirs = [dir / name for name in ("test", "val") if (dir / name).is_dir()]
    if not (dir / "train").is_dir() or not test_dirs:
        found = _shorten(sorted(path.name for path in dir.iterdir())) or "nothing"
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


def _class_folders(split_dir: Path) -> tuple[str, ...]:
    folders = sorted(
        entry.name
        for entry in os.scandir(split_dir)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise DataError(
            f"{split_dir}: got no class folders, expected one folder of images a class; check dir"
        )
    return tuple(folders)


def _folder_split(split_dir: Path, class_names: tuple[str, ...], image_size: int) -> FolderSplit:
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        class_dir = split_dir / class_name
        if not class_dir.is_dir():
            continue  # a test split may lack a class; _class_folders vouches for training
        class_paths = _image_paths(class_dir)
        if not class_paths:
            raise DataError(
                f"{class_dir}: got no images, expected files ending in {', '.join(SUFFIXES)}; "
                "add images or remove the folder"
            )
        paths += class_paths
        labels += [label] * len(class_paths)
    return FolderSplit(tuple(paths), np.asarray(labels, np.int32), image_size)


def _image_paths(class_dir: Path) -> list[str]:
    return sorted(
        os.path.join(folder, file)
        for folder, _, files in os.walk(class_dir, followlinks=True)
        for file in files
        if not file.startswith(".") and file.lower().endswith(SUFFIXES)
    )


def _shorten(names, limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
