"""Custom data sets of any kind, given as batches that are functions of the step."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from revnet_jax.data.dataset import DataError
from revnet_jax.data.pipeline import LAST_STEP, NumpyBatch, iterate, shuffled


class Source(Protocol):
    """The protocol of a custom data set, for data that are neither images with labels nor text.

    A batch is a function of seed and step, so that a resumed run continues with the same batches.
    The arrays of a batch have its examples along their first axis.

    rows: which rows of the global batch to return; each process asks for its own.

    The returned functions are called from several threads.

    A source may have an attribute `sha256`, a text that stands for its data. A run on other data is
    then refused when it is resumed.
    """

    def train(self, *, batch_size: int, seed: int, rows: np.ndarray) -> Callable[[int], NumpyBatch]:
        """Returns `step -> batch`, for all steps from 0."""
        ...

    def test(self, *, batch_size: int, rows: np.ndarray) -> tuple[int, Callable[[int], NumpyBatch]]:
        """Returns (the number of batches, `index -> batch`).

        Batches have an array "weight", which is 0 for the padding of the last batch.
        """
        ...


@dataclass(frozen=True)
class Arrays:
    """A source in memory, shuffled anew in every epoch.

    Attributes:
      train_arrays: arrays by name, with the examples along their first axis.
      test_arrays: likewise.

    Raises DataError for empty splits, arrays of unequal length, or splits whose arrays differ in
    name, dtype or shape.
    """

    train_arrays: Mapping[str, np.ndarray]
    test_arrays: Mapping[str, np.ndarray]

    def __post_init__(self):
        for split in (self.train_arrays, self.test_arrays):
            sizes = {name: len(array) for name, array in split.items()}
            # Test batches use the name "weight" for what tells padding from examples.
            if len(set(sizes.values())) != 1 or not min(sizes.values()) or "weight" in sizes:
                raise DataError(
                    f"got arrays of {sizes} examples, expected the same number of each, at least "
                    "one, and no array named weight"
                )
        kinds = [
            {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in split.items()}
            for split in (self.train_arrays, self.test_arrays)
        ]
        if kinds[0] != kinds[1]:
            raise DataError(f"got {kinds[0]} to train and {kinds[1]} to test, expected the same")

    @functools.cached_property
    def sha256(self) -> str:
        """Identifies the data: the hash of the names, dtypes, shapes and elements of all arrays.

        Cost: reads every array once, at the start of a run.
        """
        found = hashlib.sha256()
        for split in (self.train_arrays, self.test_arrays):
            for name, array in sorted(split.items()):
                found.update(f"{name} {array.dtype} {array.shape} ".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def train(self, *, batch_size: int, seed: int, rows: np.ndarray) -> Callable[[int], NumpyBatch]:
        """See `Source`."""
        size = len(next(iter(self.train_arrays.values())))
        # `shuffled` keeps the permutations of two epochs, so a batch must not span three.
        if batch_size > size:
            raise ValueError(f"got batch_size={batch_size}, expected at most the {size} examples")
        order = shuffled(size, seed)

        def batch(step: int) -> NumpyBatch:
            indices = order(step * batch_size + rows)
            return {name: array[indices] for name, array in self.train_arrays.items()}

        return batch

    def test(self, *, batch_size: int, rows: np.ndarray) -> tuple[int, Callable[[int], NumpyBatch]]:
        """See `Source`. The last batch is padded with copies of the last example."""
        size = len(next(iter(self.test_arrays.values())))

        def batch(index: int) -> NumpyBatch:
            places = index * batch_size + rows
            found = {n: x[np.minimum(places, size - 1)] for n, x in self.test_arrays.items()}
            return {**found, "weight": (places < size).astype(np.float32)}

        return -(-size // batch_size), batch


def iterate_train(
    source: Source,
    *,
    seed: int,
    start_step: int,
    batch_size: int,
    rows: np.ndarray,
    num_threads: int,
    prefetch: int,
) -> grain.DatasetIterator[NumpyBatch]:
    """Iterates over training batches from `start_step`, prepared ahead; `close()` it after use."""
    make_batch = source.train(batch_size=batch_size, seed=seed, rows=rows)
    batches = grain.MapDataset.range(start_step, LAST_STEP).map(make_batch)
    return iterate(batches, num_threads, prefetch)


def iterate_test(
    source: Source, *, batch_size: int, rows: np.ndarray, num_threads: int, prefetch: int
) -> grain.DatasetIterator[NumpyBatch]:
    """Iterates over the test split once, with batches prepared ahead; `close()` it after use.

    Raises ValueError if there are none.
    """
    num_batches, make_batch = source.test(batch_size=batch_size, rows=rows)
    if num_batches < 1:
        raise ValueError(f"got a source of {num_batches} test batches, expected one at least")
    return iterate(grain.MapDataset.range(num_batches).map(make_batch), num_threads, prefetch)
