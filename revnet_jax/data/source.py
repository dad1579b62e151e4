"""Data of any kind: batches as functions of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from revnet_jax.data.dataset import DataError
from revnet_jax.data.pipeline import LAST_STEP, Batch, iterate, shuffled


class Source(Protocol):
    """What a data set is where it is neither images and labels nor a text.

    The batch of a step is a function of seed and step, so that a run resumes where it was. rows:
    which rows of the global batch to return; each process asks for its own. Arrays of a batch have
    its examples along their first axis. Functions are called from several threads.
    """

    def train(self, *, batch_size: int, seed: int, rows: np.ndarray) -> Callable[[int], Batch]:
        """`step -> batch`, for steps from 0 without an end."""
        ...

    def test(self, *, batch_size: int, rows: np.ndarray) -> tuple[int, Callable[[int], Batch]]:
        """(the number of batches, `index -> batch`); with "weight", 0 where the last is filled."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A source in memory: shuffled anew in every epoch.

    train, test: arrays by name, with the examples along their first axis.

    Raises DataError for splits that are empty or do not fit one another.
    """

    train_arrays: Mapping[str, np.ndarray]
    test_arrays: Mapping[str, np.ndarray]

    def __post_init__(self):
        for split in (self.train_arrays, self.test_arrays):
            sizes = {name: len(array) for name, array in split.items()}
            if len(set(sizes.values())) != 1 or not min(sizes.values()) or "weight" in sizes:
                raise DataError(
                    f"got arrays of {sizes} examples, expected as many, at least one, of each, and "
                    "no weight"
                )
        kinds = [
            {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in split.items()}
            for split in (self.train_arrays, self.test_arrays)
        ]
        if kinds[0] != kinds[1]:
            raise DataError(f"got {kinds[0]} to train and {kinds[1]} to test, expected the same")

    def train(self, *, batch_size: int, seed: int, rows: np.ndarray) -> Callable[[int], Batch]:
        """See `Source`."""
        size = len(next(iter(self.train_arrays.values())))
        if batch_size > size:
            raise ValueError(f"got batch_size={batch_size}, expected at most the {size} examples")
        order = shuffled(size, seed)

        def batch(step: int) -> Batch:
            indices = order(step * batch_size + rows)
            return {name: array[indices] for name, array in self.train_arrays.items()}

        return batch

    def test(self, *, batch_size: int, rows: np.ndarray) -> tuple[int, Callable[[int], Batch]]:
        """See `Source`. The last batch is filled up with copies of the last example."""
        size = len(next(iter(self.test_arrays.values())))

        def batch(index: int) -> Batch:
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
) -> grain.DatasetIterator[Batch]:
    """The training batches from a step on, prepared ahead; `close()` the iterator."""
    make_batch = source.train(batch_size=batch_size, seed=seed, rows=rows)
    batches = grain.MapDataset.range(start_step, LAST_STEP).map(make_batch)
    return iterate(batches, num_threads, prefetch)


def iterate_test(
    source: Source, *, batch_size: int, rows: np.ndarray, num_threads: int, prefetch: int
) -> grain.DatasetIterator[Batch]:
    """The test split once, prepared ahead; `close()` the iterator."""
    num_batches, make_batch = source.test(batch_size=batch_size, rows=rows)
    return iterate(grain.MapDataset.range(num_batches).map(make_batch), num_threads, prefetch)
