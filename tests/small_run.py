"""The settings of a run small enough for a test, and a disk that is full."""

import contextlib
import pathlib
import resource

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "num_steps": 12,
    "schedule.warmup_steps": 0,
    "batch_size": 16,
    "eval_batch_size": 120,
    "log_every_steps": 1,
    "eval_every_steps": 6,
    "checkpoint_every_steps": 2,
    "data.crop_padding": 1,
    "model.units": (1, 2),
    "model.channels": (8, 8, 16),
    "schedule.learning_rate": 0.05,
}
# One stage instead of two: it compiles in half the time, for tests of what is around the network.
ONE_STAGE = {"model.units": (2,), "model.channels": (8, 8)}


@contextlib.contextmanager
def file_limit(size: int):
    """As if the disk were full for files beyond this size, which take what there is room for."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
