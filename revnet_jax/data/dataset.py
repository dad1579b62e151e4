"""The data set for image classification: two splits, class names and a normalisation."""

import contextlib
import hashlib
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from revnet_jax.errors import UserError


class DataError(UserError, ValueError):
    """Data on disk that cannot be used. The message is one line that names the folder or file."""

    def __init__(self, message: str):
        # File names may contain line breaks: escape them, so that the message stays one line.
        super().__init__("\\n".join(message.splitlines()))


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Joins the first `limit` names for an error message, with "..." if there are more."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@contextlib.contextmanager
def file_errors(expected: str) -> Generator[None]:
    """A context that turns an OSError into a DataError naming the file and what was expected."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{os.fspath(error.filename)}: "
        raise DataError(f"{where}{error.strerror or error}; expected {expected}") from error


def read_file(path: Path, expected: str) -> bytes:
    """Reads a file. Raises DataError if it cannot be read, or is a pipe, which might never end."""
    with file_errors(expected):
        # A folder is left to `read_bytes`, whose error says that it is one.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path}: got a pipe, socket or device; expected {expected}")
        return path.read_bytes()


class Split(Protocol):
    """The images and labels of one split, read by index.

    Attributes:
      labels: int32 [N].
      num_crop_uniforms: how many uniform random numbers one random crop needs; 0 if all images
        have their final size, so that `read` does not crop.
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

        Without `crop_uniforms_BU`, returns the images as for evaluation. With it (floats in [0, 1),
        one row per image), returns random crops determined by these numbers, each of at least the
        share `min_crop_area` of the image.
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
        """Returns uint8 [B, H, W, C]. Nothing is cropped; the other arguments are ignored."""
        return self.images_NHWC[indices_B]


@dataclass(frozen=True)
class Dataset:
    """A data set for image classification.

    Attributes:
      name: as given to `load_dataset`.
      train, test: the splits.
      class_names: one per class, indexed by label.
      image_shape: (H, W, C).
      mean_HWC: float32 [H, W, C], in pixel values.
      scale: float32, a scalar or [H, W, C], in pixel values.
      sha256: identifies the data, so that a resumed run can check that it is the same. It is over
        images and labels if they are in memory, otherwise over file names. "" is not compared.
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
        # From uint8 to float32 at once, then in place: one new array, and none in float64.
        image_BHWC = np.subtract(pixels_BHWC, self.mean_HWC, dtype=np.float32)
        return np.divide(image_BHWC, self.scale, out=image_BHWC)

    def normalised_by(self, mean_C: Sequence[float], std_C: Sequence[float]) -> "Dataset":
        """This data set with another normalisation: means and deviations of pixels from 0 to 1.

        Raises ValueError unless both have a number per channel.
        """
        channels = self.image_shape[2]
        if not len(mean_C) == len(std_C) == channels:
            raise ValueError(
                f"got mean={tuple(mean_C)} and std={tuple(std_C)}, expected {channels} numbers in "
                "each, one per channel, or none in both"
            )
        mean_HWC, scale = (of_channels(x, self.image_shape) for x in (mean_C, std_C))
        return replace(self, mean_HWC=mean_HWC, scale=scale)


def of_channels(share_C: Sequence[float], image_shape: tuple[int, int, int]) -> np.ndarray:
    """float32 [H, W, C], in pixel values, of one number per channel.

    The full array is stored because numpy broadcasts an array of three numbers slowly.
    """
    return np.full(image_shape, np.asarray(share_C, np.float32) * np.float32(255))


def in_memory_dataset(
    name: str,
    *,
    train_images_NHWC: np.ndarray,
    train_labels: np.ndarray,
    test_images_NHWC: np.ndarray,
    test_labels: np.ndarray,
    class_names: Sequence[str],
) -> Dataset:
    """Builds a `Dataset` of uint8 images [N, H, W, C], normalised by the training statistics.

    The mean is per pixel, [H, W, C]; the scale is one number, the standard deviation of all
    training pixels, so that network inputs are of about unit size.
    """
    # Exact integer sums need no float copy of the images, and do not depend on the order.
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
        # Also the shape: the same bytes may be other images.
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)  # hashlib reads contiguous memory only
    return digest.hexdigest()


def _standard_deviation(images_NHWC: np.ndarray) -> float:
    """The standard deviation of all pixels of a uint8 array, computed from its histogram."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(images_NHWC), 1000):  # bincount copies its input to int64
        counts += np.bincount(images_NHWC[start : start + 1000].reshape(-1), minlength=256)
    values = np.arange(256)
    # The mean is subtracted before squaring: mean(x^2) - mean(x)^2 would lose digits.
    mean = (counts @ values) / counts.sum()
    return float(np.sqrt((counts @ (values - mean) ** 2) / counts.sum()))
