"""Batches for training and evaluation, as numpy arrays.

Both pipelines are stateless: the batch of a step is a function of the seed and the step. Resuming
needs the step and nothing else, and the global batch is the same however many processes share it.
"""

import grain
import numpy as np

from revnet_jax.data.dataset import Dataset

Batch = dict[str, np.ndarray]


def train_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    crop_padding: int,
    flip: bool,
    min_crop_area: float,
    num_threads: int,
    prefetch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over shuffled, augmented batches of this process; `close()` it.

    Every epoch is a new permutation of the training split, and the next one follows without a
    gap, so a batch may hold the end of one and the start of another. Process p holds rows
    [p * b, (p + 1) * b) of each global batch, b = batch_size // process_count.

    Args:
      dataset: what to read.
      batch_size: images in a global batch.
      seed: of the shuffle and the augmentation, 0 to 2**32 - 1.
      start_step: the step of the first batch, counted in global batches from 0.
      crop_padding: pixels of zeros (the mean image) added on each side, to crop from; 0 for none.
      flip: mirror each image left to right with probability 1/2.
      min_crop_area: smallest share of the image in a random resized crop, in (0, 1]. For
        image_folder only; other data sets have images of one size and take 1.0.
      num_threads: threads that prepare batches; 0 prepares them in the caller's.
      prefetch: batches prepared ahead; 0 for none.
      process_index, process_count: which part of the global batch to produce.

    Yields:
      {"image": float32 [b, H, W, C], "label": int32 [b]}

    Raises:
      ValueError: an argument out of its range, or a batch size that the processes cannot share or
        the training split cannot fill.
      DataError: while iterating, an image that cannot be decoded.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    split = dataset.train
    if batch_size > len(split):
        raise ValueError(
            f"got batch_size={batch_size}, expected at most the {len(split)} training images of "
            f"{dataset.name}; choose a smaller batch"
        )
    _check_range("seed", seed, 0, 2**32 - 1)
    _check_range("start_step", start_step, 0)
    _check_range("crop_padding", crop_padding, 0)
    if not 0 < min_crop_area <= 1:
        raise ValueError(f"got min_crop_area={min_crop_area}, expected a share in (0, 1]")
    if min_crop_area != 1 and not split.num_crop_uniforms:
        raise ValueError(
            f"got min_crop_area={min_crop_area} for {dataset.name}, expected 1.0: its images have "
            "one size; use crop_padding"
        )
    rows = local_rows(batch_size, process_index, process_count)

    def make_batch(step: int, indices_B: np.ndarray) -> Batch:
        # Drawn for the whole global batch and then sliced: the processes need not talk.
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
        return {"image": image_BHWC, "label": split.labels[indices_B]}

    batches = (
        grain.MapDataset.range(len(split))
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(local_batch_size, drop_remainder=True, batch_fn=np.asarray)
        # Consecutive local batches are the consecutive parts of a global one.
        .slice(slice(process_index, None, process_count))
        .map_with_index(make_batch)
        .slice(slice(start_step, None))
    )
    return iterate(batches, num_threads, prefetch)


def eval_batches(
    dataset: Dataset,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator[Batch]:
    """One pass over the test split in order, without augmentation; `close()` the iterator.

    All batches are full: the last is padded with zero images of weight 0. Every process yields
    the same number of batches, ceil(N / batch_size), and every image has weight 1 in exactly one.

    Args:
      dataset: what to read.
      batch_size: images in a global batch, shared by the processes as in `train_batches`.
      process_index, process_count: which part of the global batch to produce.
      num_threads, prefetch: as in `train_batches`.

    Yields:
      {"image": float32 [b, H, W, C], "label": int32 [b], "weight": float32 [b]}

    Raises:
      ValueError: an argument out of its range.
      DataError: while iterating, an image that cannot be decoded.
    """
    local_batch_size = _local_batch_size(batch_size, process_index, process_count)
    split = dataset.test

    def make_batch(step: int) -> Batch:
        start = step * batch_size + process_index * local_batch_size
        indices_R = np.arange(start, min(start + local_batch_size, len(split)))  # the real ones
        num_real = len(indices_R)
        image_BHWC = np.zeros((local_batch_size, *dataset.image_shape), np.float32)
        label_B = np.zeros(local_batch_size, np.int32)
        if num_real:
            image_BHWC[:num_real] = dataset.normalise(split.read(indices_R))
            label_B[:num_real] = split.labels[indices_R]
        weight_B = (np.arange(local_batch_size) < num_real).astype(np.float32)
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
      flips_B: bool [B], which to mirror left to right (after the crop).
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
    # A slice an image: each copies whole rows, which is faster than one gather of every pixel.
    for row, ((top, left), mirrored) in enumerate(zip(offsets_B2.tolist(), flips_B, strict=True)):
        crop_HWC = padded_BHWC[row, top : top + height, left : left + width]
        if not mirrored:
            cropped_BHWC[row] = crop_HWC
            continue
        for channel in range(channels):  # three times as fast as reversing whole pixels
            cropped_BHWC[row, :, :, channel] = crop_HWC[:, ::-1, channel]
    return cropped_BHWC


def iterate(batches: grain.MapDataset, num_threads: int, prefetch: int) -> grain.DatasetIterator:
    """An iterator whose elements are prepared ahead, by threads of its own."""
    # Threads rather than worker processes: numpy and Pillow release the interpreter's lock for
    # most of the work, and processes would need parsed absl flags and a copy of the data.
    _check_range("num_threads", num_threads, 0)
    _check_range("prefetch", prefetch, 0)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(options))


def local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Which rows of a global batch are this process's; ValueError for what cannot be shared."""
    size = _local_batch_size(batch_size, process_index, process_count)
    return slice(process_index * size, (process_index + 1) * size)


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    _check_range("batch_size", batch_size, 1)
    _check_range("process_count", process_count, 1)
    _check_range("process_index", process_index, 0, process_count - 1)
    if batch_size % process_count:
        raise ValueError(
            f"got batch_size={batch_size} for {process_count} processes, expected a multiple of "
            f"{process_count}; round it"
        )
    return batch_size // process_count


def _check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"got {name}={value}, expected {expected}")
