"""RevNet-38 on CIFAR-10, as published; needs the data and several minutes.

REVNET_JAX_CIFAR10_DIR=DIR .venv/bin/python -m pytest -m slow tests/training/test_cifar10.py
"""

import json
import os

import numpy as np
import pytest

from revnet_jax.core import STRATEGIES

DATA_DIR = os.environ.get("REVNET_JAX_CIFAR10_DIR")


@pytest.mark.slow
@pytest.mark.skipif(not DATA_DIR, reason="REVNET_JAX_CIFAR10_DIR names no folder with CIFAR-10")
def test_the_first_50_steps_are_the_same_under_all_strategies(run_program, tmp_path):
    losses = {}
    for backprop in STRATEGIES:
        workdir = tmp_path / backprop
        settings = {"num_steps": 50, "log_every_steps": 1, "eval_every_steps": 50}
        settings |= {"model.backprop": backprop, "data.dir": DATA_DIR}
        status, _, stderr = run_program(
            "train",
            "--config=configs/cifar10_revnet38.py",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        )
        assert status == 0, stderr
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses[backprop] = [row["train_loss"] for row in rows if "train_loss" in row]
        mismatches = [row.get("exact_mismatches") for row in rows if "train_loss" in row]
        assert mismatches == [0 if backprop == "reverse" else None] * 50
    np.testing.assert_allclose(losses["remat"], losses["store"], rtol=1e-4)
    np.testing.assert_allclose(losses["reverse"], losses["store"], rtol=1e-4)
