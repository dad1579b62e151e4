"""Data sets and input pipelines: files in, numpy batches out.

    dataset = load_dataset("cifar10", dir="/data/cifar10")
    batches = train_batches(dataset, batch_size=100, seed=0, start_step=0, ...)

See `load_dataset` for the sources, `train_batches` and `eval_batches` for the pipelines.
"""

from revnet_jax.data.dataset import DataError, Dataset
from revnet_jax.data.load import DATASET_NAMES, load_dataset
from revnet_jax.data.pipeline import eval_batches, train_batches

__all__ = [
    "DATASET_NAMES",
    "DataError",
    "Dataset",
    "eval_batches",
    "load_dataset",
    "train_batches",
]
