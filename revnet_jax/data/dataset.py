"""What a data set is to the rest of the package: two splits, class names and a normalisation."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from revnet_jax.errors import UserError


class DataError(UserError, ValueError):
    """Data on disk that cannot be used. The message is one line that names the folder or file."""

    def __init__(self, message: str):
        super().__init__("\\n".join(message.splitlines()))  # names of files may hold line breaks


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """The first of them, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@contextlib.contextmanager
def file_errors(expected: str) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file and what was expected of it."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        raise DataError(f"{where}{error.strerror or error}; expected {expected}") from error


def read_file(path: Path, expected: str) -> bytes:
    """What a file holds. DataError for what cannot be read, and for a pipe, which might not end."""
    with file_errors(expected):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path}: got a pipe, socket or device; expected {expected}")
        return path.read_bytes()


class Split(Protocol):
    """The images and labels of one split, read by index.

    Attributes:
      labels: int32 [N].
      num_crop_uniforms: how many uniform numbers one random crop consumes; 0 when the images all
        have their final size and `read` has no crop to choose.
    """

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def num_crop_uniforms(self) -> int: ...

    def __len__(self) -> int: ...

    def read(
        self,
        indices_B: np.ndarray,
        crop_uniforms_BU: np.ndarray | None = None,
        min_crop_area: float = 1.0,
    ) -> np.ndarray:
        """Returns uint8 [B, H, W, C].

        Without `crop_uniforms_BU` (floats in [0, 1), one row an image) the images are those of an
        evaluation; with them, the crops they choose, of at least `min_crop_area` of the image.
        """
        ...


@dataclass(frozen=True)
class ArraySplit:
    """A split held in memory: uint8 images [N, H, W, C] and int32 labels [N]. No random crops."""

    images_NHWC: np.ndarray
    labels: np.ndarray
    num_crop_uniforms: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self,
        indices_B: np.ndarray,
        crop_uniforms_BU: np.ndarray | None = None,
        min_crop_area: float = 1.0,
    ) -> np.ndarray:
        """Returns uint8 [B, H, W, C]; there is nothing to crop, so only the indices matter."""
        return self.images_NHWC[indices_B]


@dataclass(frozen=True)
class Dataset:
    """A data set for image classification.

    Attributes:
      name: as given to `load_dataset`.
      train, test: the splits.
      class_names: one a class; the label is the position.
      image_shape: (H, W, C).
      mean_HWC: float32 [H, W, C], in pixel values.
      scale: float32, a scalar or [H, W, C], in pixel values.
      sha256: of what is to be the same when a run goes on: images and labels where they are in
        memory, the names of the files otherwise. "" is not compared.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean_HWC: np.ndarray
    scale: np.ndarray
    sha256: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def normalise(self, pixels_BHWC: np.ndarray) -> np.ndarray:
        """`(pixels - mean) / scale`: uint8 [B, H, W, C] to float32 of the same shape."""
        image_BHWC = np.subtract(pixels_BHWC, self.mean_HWC, dtype=np.float32)
        return np.divide(image_BHWC, self.scale, out=image_BHWC)


def in_memory_dataset(
    name: str,
    *,
    train_images_NHWC: np.ndarray,
    train_labels: np.ndarray,
    test_images_NHWC: np.ndarray,
    test_labels: np.ndarray,
    class_names: Sequence[str],
) -> Dataset:
    """A `Dataset` of uint8 images [N, H, W, C], normalised by statistics of the training images.

    The mean is per pixel, [H, W, C]; the scale is one number, the standard deviation of all
    training pixels, so that every network sees inputs of about unit size.
    """
    # Both statistics come from exact integer sums: no float copy of the images, and no dependence
    # on the order of summation.
    mean_HWC = train_images_NHWC.sum(axis=0, dtype=np.int64) / len(train_images_NHWC)
    scale = _standard_deviation(train_images_NHWC)
    if scale == 0:
        raise DataError(
            f"{name}: got training images whose pixels are all equal; expected images that differ; "
            "check the files"
        )
    train = ArraySplit(train_images_NHWC, train_labels.astype(np.int32))
    test = ArraySplit(test_images_NHWC, test_labels.astype(np.int32))
    return Dataset(
        name=name,
        train=train,
        test=test,
        class_names=tuple(class_names),
        image_shape=tuple(train_images_NHWC.shape[1:]),
        mean_HWC=mean_HWC.astype(np.float32),
        scale=np.asarray(scale, np.float32),
        sha256=_sha256(train.images_NHWC, train.labels, test.images_NHWC, test.labels),
    )


def _sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _standard_deviation(images_NHWC: np.ndarray) -> float:
    """Of all pixels of a uint8 array, from its histogram."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(images_NHWC), 1000):  # bincount copies its input to int64
        counts += np.bincount(images_NHWC[start : start + 1000].reshape(-1), minlength=256)
    values = np.arange(256)
    mean = (counts @ values) / counts.sum()
    return float(np.sqrt((counts @ (values - mean) ** 2) / counts.sum()))
