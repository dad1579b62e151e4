"""Single image files: checks that they are complete, chooses crops, reads pixels."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import Image

from revnet_jax.data import jpeg
from revnet_jax.data.dataset import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# left, top, right, bottom, in pixels of the stored image; fractions are allowed
Box = tuple[float, float, float, float]

# A random crop tries ten boxes of two random numbers each (area, aspect ratio), and uses two more
# numbers for the position.
_CROP_ATTEMPTS = 10
NUM_CROP_UNIFORMS = 2 * _CROP_ATTEMPTS + 2
_MIN_ASPECT, _MAX_ASPECT = 3 / 4, 4 / 3

_CHECK_THREADS = 8  # more would not help: opening an image holds the global interpreter lock


def random_crop_box(width: int, height: int, uniforms_U: np.ndarray, min_crop_area: float) -> Box:
    """The crop of Inception (Szegedy et al., 2014, section 6), from 22 uniform numbers.

    The area is uniform in [min_crop_area, 1] of the image's, and the logarithm of the aspect ratio
    is uniform between log(3/4) and log(4/3). The first of ten such boxes that fits is taken. If
    none fits, it is the largest centred box with an allowed aspect ratio.
    """
    *shapes, u_left, u_top = uniforms_U.tolist()
    for u_area, u_aspect in zip(shapes[::2], shapes[1::2], strict=True):
        area = width * height * (min_crop_area + (1 - min_crop_area) * u_area)
        aspect = math.exp(math.log(_MIN_ASPECT) + u_aspect * math.log(_MAX_ASPECT / _MIN_ASPECT))
        # width * height = area and width / height = aspect.
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        # A side of a tiny image may be rounded to 0.
        if 0 < box_width <= width and 0 < box_height <= height:
            # u < 1, so the corner is at one of width - box_width + 1 places, each as likely.
            left = math.floor(u_left * (width - box_width + 1))
            top = math.floor(u_top * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    # All of the shorter side, and as much of the longer one as the aspect ratio allows.
    box_width = min(width, max(1, round(height * _MAX_ASPECT)))
    box_height = min(height, max(1, round(width / _MIN_ASPECT)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def centre_crop_box(width: int, height: int, image_size: int) -> Box:
    """The box of a centre crop, in pixels of the stored image.

    It corresponds to resizing the shorter side to round(image_size * 256 / 224) and keeping the
    central image_size x image_size pixels.
    """
    # 256 / 224 are the sizes of resizing and cropping that are usual on ImageNet.
    side = min(width, height) * image_size / round(image_size * 256 / 224)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def read_image(path: str, choose_box: Callable[[int, int], Box], image_size: int) -> np.ndarray:
    """Reads a box of the image, resized (bilinear, antialiased) to uint8 [S, S, 3].

    Args:
      path: of the image.
      choose_box: a function from the width and height of the stored image to the box to keep.
      image_size: S, in pixels.

    Raises:
      DataError: the file cannot be decoded, ends early, or has more than 8 bits a channel.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = image.size
            left, top, right, bottom = choose_box(width, height)
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size at a fraction of the cost: ask
            # for the smallest size at which the box still has image_size pixels.
            shrink = max(1, min(right - left, bottom - top) / image_size)
            scale = _load(file, image, (math.ceil(width / shrink), math.ceil(height / shrink)))
            # Grey, palette and CMYK images become RGB too; an alpha channel is dropped.
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            resized = rgb.resize(
                (image_size, image_size),
                Image.Resampling.BILINEAR,
                box=(left * scale, top * scale, right * scale, bottom * scale),
            )
            return np.asarray(resized)
    except Exception as error:  # Pillow's decoders raise many types
        raise _unreadable(path, error) from error


def check_image_files(paths: Iterable[str]) -> None:
    """Decodes each file, to check that it is a complete image.

    A JPEG is decoded at 1/8 of its size. `jpeg.check_complete` lists the damage that is not
    detected; in formats without checksums (BMP, PPM, TIFF and WebP), zeros in place of pixels are
    not detected either.

    Cost: 1 to 2 ms of one core for a JPEG of 500x375 pixels, 5 ms for a progressive one.

    Raises:
      DataError: names the first file (in the order given) that cannot be used.
    """
    with ThreadPoolExecutor(_CHECK_THREADS) as executor:
        # One task per chunk of files: a future per file of ImageNet would cost more than the check.
        paths = list(paths)
        chunks = [paths[start : start + 256] for start in range(0, len(paths), 256)]
        # After the first error `map` cancels the tasks that have not begun.
        for _ in executor.map(_check_chunk, chunks):
            pass


def _check_chunk(paths: list[str]) -> None:
    for path in paths:
        _check_image_file(path)


def _check_image_file(path: str) -> None:
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            _load(file, image, (1, 1))
    except Exception as error:
        raise _unreadable(path, error) from error


def _load(file: BinaryIO, image: Image.Image, min_size: tuple[int, int]) -> float:
    """Decodes the image just opened and checks it; returns the scale at which it was decoded.

    min_size: a JPEG is decoded at the smallest scale that gives this width and height.
    """
    _check_depth(image)
    width = image.width
    # Before `load`, which decodes the image: afterwards `draft` does nothing.
    drafted = image.draft("RGB", min_size)
    image.load()
    if image.format in jpeg.FORMATS:
        jpeg.check_complete(file, image, min_size)
    # The box that `draft` returns is the whole image in decoded pixels, not rounded as its size is.
    # So the scale is exactly 1, 1/2, 1/4 or 1/8.
    return drafted[1][2] / width if drafted else 1


def _check_depth(image: Image.Image) -> None:
    # Pillow clips pixels of more than 8 bits to 255 when it converts them: images become white.
    if image.mode.startswith(("I", "F")):  # also I;16, 16-bit integers
        raise ValueError(f"more than 8 bits a channel (Pillow mode {image.mode})")


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path}: got a file of {os.path.getsize(path) if os.path.exists(path) else 0} bytes that "
        f"cannot be read as an image ({type(error).__name__}: {error}); expected a complete 8-bit "
        "image; replace or remove it"
    )
