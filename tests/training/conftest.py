"""Runs of a network small enough to train in a test."""

import contextlib
import pathlib
import resource
import subprocess
import sys

import pytest

from revnet_jax.config import image_classification

ROOT = pathlib.Path(__file__).parents[2]
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


@contextlib.contextmanager
def file_limit(size: int):
    """As if the disk were full for files beyond this size, which take what there is room for."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def tiny_config():
    config = image_classification()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture
def start_program():
    """Starts `python scripts/NAME.py FLAGS...` from the root of the repository."""

    def start(name, *flags):
        return subprocess.Popen(
            [sys.executable, f"scripts/{name}.py", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_program(start_program):
    """Runs a program to its end: (status, stdout, stderr)."""

    def run(name, *flags):
        process = start_program(name, *flags)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    return run


@pytest.fixture
def tiny_flags():
    """TINY on the command line."""
    as_text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return ["--config=configs/digits.py"] + [
        f"--config.{key}={as_text(value)}" for key, value in TINY.items()
    ]
