"""Input pipelines: batches of images for training and evaluation, as numpy arrays.

Both pipelines are stateless: a batch is a function of the seed and the step, so resuming needs only
the step. Each process asks for its rows of the global batch, which does not depend on the number
of processes.
"""

import functools
from collections.abc import Callable

import grain
import numpy as np

from revnet_jax.data.affine import random_affine
from revnet_jax.data.dataset import Dataset

NumpyBatch = dict[str, np.ndarray]

LAST_STEP = 2**48  # stands for infinity, because grain's ranges must be finite


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    crop_padding: int,
    flip: bool,
    affine: float,
    min_crop_area: float,
    num_threads: int,
    prefetch: int,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[NumpyBatch]:
    """Returns an endless iterator over shuffled, augmented batches; `close()` it after use.

    Every epoch is a new permutation of the training split. Epochs follow without a gap, so a batch
    may hold the end of one epoch and the start of the next.

    Args:
      dataset: what to read.
      batch_size: images in a global batch.
      seed: of the shuffle and the augmentation, 0 to 2**32 - 1.
      start_step: the step of the first batch, counted in global batches from 0.
      crop_padding: pixels of zeros (the mean image) added on each side before a random crop; 0 for
        no crop. Must be less than height and width, so that every crop has some of the image.
      flip: mirror each image left to right with probability 1/2.
      affine: strength of a random affine map of each image (see `random_affine`), made last, in
        [0, 1); 0 for none.
      min_crop_area: smallest share of the image in a random resized crop, in (0, 1]. For
        image_folder only; other data sets have images of one size and need 1.0.
      num_threads: threads that prepare batches; 0 to prepare them in the caller's thread.
      prefetch: batches prepared ahead, at least `num_threads`; 0 for none.
      rows: which rows of each global batch to produce; all by default.

    Yields:
      {"image": float32 [b, H, W, C], "label": int32 [b]}, b the number of rows

    Raises:
      ValueError: an argument out of its range, or a batch size that the training split cannot fill.
      DataError: while iterating, an image that cannot be decoded.
    """
    rows = rows_of(batch_size, rows)
    split = dataset.train
    if batch_size > len(split):
        raise ValueError(
            f"got batch_size={batch_size}, expected at most the {len(split)} training images of "
            f"{dataset.name}; choose a smaller batch"
        )
    check_threads(num_threads, prefetch)
    _check_range("seed", seed, 0, 2**32 - 1)
    _check_range("start_step", start_step, 0)
    _check_range("crop_padding", crop_padding, 0, min(dataset.image_shape[:2]) - 1)
    if not 0 <= affine < 1:
        raise ValueError(f"got affine={affine}, expected a strength in [0, 1)")
    if not 0 < min_crop_area <= 1:
        raise ValueError(f"got min_crop_area={min_crop_area}, expected a share in (0, 1]")
    if min_crop_area != 1 and not split.num_crop_uniforms:
        raise ValueError(
            f"got min_crop_area={min_crop_area} for {dataset.name}, expected 1.0: its images have "
            "one size; use crop_padding"
        )
    order = shuffled(len(split), seed)

    def make_batch(step: int) -> NumpyBatch:
        indices_B = order(step * batch_size + rows)
        # Every process draws the random numbers of the whole global batch and uses those of its
        # rows, so that no communication is needed.
        rng = np.random.default_rng([seed, step])
        crop_uniforms_BU = rng.random((batch_size, split.num_crop_uniforms), np.float32)
        offsets_B2 = rng.integers(2 * crop_padding + 1, size=(batch_size, 2))
        flips_B = rng.random(batch_size, np.float32) < 0.5
        pixels_BHWC = split.read(indices_B, crop_uniforms_BU[rows], min_crop_area)
        image_BHWC = pad_crop_flip(
            dataset.normalise(pixels_BHWC),
            offsets_B2[rows],
            flips_B[rows] & flip,
            crop_padding=crop_padding,
        )
        if affine:
            # Drawn last, so that the other random numbers are the same without affine maps.
            uniforms_B6 = rng.random((batch_size, 6), np.float32)[rows]
            image_BHWC = random_affine(image_BHWC, uniforms_B6, strength=affine)
        return {"image": image_BHWC, "label": split.labels[indices_B]}

    batches = grain.MapDataset.range(start_step, LAST_STEP).map(make_batch)
    return iterate(batches, num_threads, prefetch)


def shuffled(size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from positions to elements of an endless shuffled sequence.

    The sequence is one random permutation of range(size) per epoch, one after another.

    Memory: 16 bytes per element, for two epochs; a batch spans at most two.
    """

    # Threads may be ahead by more; what was dropped is computed again, and is the same.
    @functools.lru_cache(2)
    def permutation(epoch: int) -> np.ndarray:
        # The 1 makes it differ from the augmentation's seed [seed, step].
        return np.random.default_rng([seed, epoch, 1]).permutation(size)

    def order(positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, size)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = permutation(epoch)[places[epochs == epoch]]
        return indices

    return order


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    num_threads: int = 2,
    prefetch: int = 4,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[NumpyBatch]:
    """Returns an iterator over the test split, in order and not augmented; `close()` it after use.
    All ceil(N / batch_size) batches are full: the last is padded with zero images of weight 0.

    Args:
      dataset: what to read.
      batch_size: images in a global batch.
      num_threads: as in `train_batches`.
      prefetch: as in `train_batches`.
      rows: as in `train_batches`.

    Yields:
      {"image": float32 [b, H, W, C], "label": int32 [b], "weight": float32 [b]}

    Raises:
      ValueError: an argument out of its range.
      DataError: while iterating, an image that cannot be decoded.
    """
    rows = rows_of(batch_size, rows)
    split = dataset.test
    if not len(split):
        raise ValueError("got a data set of 0 test images, expected one at least")

    def make_batch(step: int) -> NumpyBatch:
        indices_B = step * batch_size + rows
        indices_R = indices_B[indices_B < len(split)]  # without the padding
        num_real = len(indices_R)
        image_BHWC = np.zeros((len(rows), *dataset.image_shape), np.float32)
        label_B = np.zeros(len(rows), np.int32)
        # The rows ascend, so the padding comes last.
        if num_real:
            image_BHWC[:num_real] = dataset.normalise(split.read(indices_R))
            label_B[:num_real] = split.labels[indices_R]
        weight_B = (indices_B < len(split)).astype(np.float32)
        return {"image": image_BHWC, "label": label_B, "weight": weight_B}

    num_batches = -(-len(split) // batch_size)
    return iterate(grain.MapDataset.range(num_batches).map(make_batch), num_threads, prefetch)


def pad_crop_flip(
    image_BHWC: np.ndarray, offsets_B2: np.ndarray, flips_B: np.ndarray, *, crop_padding: int
) -> np.ndarray:
    """Pads each image with zeros on all sides, crops it back to its size, and mirrors it.

    Args:
      image_BHWC: float32 [B, H, W, C].
      offsets_B2: top and left corner of each crop in the padded image, 0 to 2 * crop_padding.
      flips_B: bool [B], which images to mirror left to right (after the crop).
      crop_padding: pixels.

    Returns:
      float32 [B, H, W, C], contiguous.
    """
    height, width, channels = image_BHWC.shape[1:]
    if crop_padding == 0 and not flips_B.any():
        return image_BHWC
    padding = ((0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0))
    padded_BHWC = np.pad(image_BHWC, padding) if crop_padding else image_BHWC
    cropped_BHWC = np.empty_like(image_BHWC)
    # One slice per image copies whole rows, which is faster than a gather of single pixels.
    for row, ((top, left), mirrored) in enumerate(zip(offsets_B2.tolist(), flips_B, strict=True)):
        crop_HWC = padded_BHWC[row, top : top + height, left : left + width]
        if not mirrored:
            cropped_BHWC[row] = crop_HWC
            continue
        for channel in range(channels):  # three times as fast as reversing whole pixels
            cropped_BHWC[row, :, :, channel] = crop_HWC[:, ::-1, channel]
    return cropped_BHWC


def iterate(batches: grain.MapDataset, num_threads: int, prefetch: int) -> grain.DatasetIterator:
    """Returns an iterator that prepares its elements ahead, in its own threads."""
    # Threads rather than worker processes: numpy and Pillow release the global interpreter lock
    # for most of the work, and processes would need parsed absl flags and a copy of the data.
    _check_range("num_threads", num_threads, 0)
    _check_range("prefetch", prefetch, 0)
    # More threads than prefetched batches would be idle, and grain would warn.
    used = min(num_threads, prefetch) if prefetch else num_threads
    options = grain.ReadOptions(num_threads=used, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def check_threads(num_threads: int, prefetch: int) -> None:
    """Raises ValueError if some threads would never have a batch to prepare."""
    if 0 < prefetch < num_threads:
        raise ValueError(
            f"got num_threads={num_threads} and prefetch={prefetch}, expected prefetch of "
            f"{num_threads} at least: it limits how many batches are prepared at a time"
        )


def rows_of(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Returns the rows as an array, all rows of the batch by default.

    Raises ValueError unless they are ascending indices into the batch.
    """
    _check_range("batch_size", batch_size, 1)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any():
        raise ValueError(
            f"got rows={rows.tolist()}, expected ascending ones of the {batch_size} of a batch"
        )
    return rows


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"got {name}={value}, expected {expected}")
