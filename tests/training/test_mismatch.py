"""A branch that is made to disagree: the run warns once, or ends, as `config.on_mismatch` says."""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.models.convolutional.residual import ResidualBranch
from revnet_jax.runs.metrics import Progress
from revnet_jax.training.loop import train
from revnet_jax.training.mismatch import MismatchAlarm, MismatchError
from tests.small_run import ONE_STAGE

# Streams reach 4, the end of this grid, in the first step.
BEYOND = {**ONE_STAGE, "model.grid_bits": 22}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def warnings(text):
    return [line for line in text.splitlines() if "WARNING" in line]


def test_the_first_mismatch_is_one_loud_line(tiny_config, tmp_path, capsys):
    steps = {"num_steps": 4, "eval_every_steps": 4, "checkpoint_every_steps": 4}
    tiny_config.update_from_flattened_dict({**BEYOND, **steps})
    summary = train(tiny_config, tmp_path)
    assert summary["steps"] == 4
    assert summary["exact_mismatches"] > 0
    (line,) = warnings(capsys.readouterr().err)
    first = next(row for row in rows(tmp_path) if row.get("exact_mismatches"))
    assert f"step {first['step']}: {first['exact_mismatches']:,.0f} values of the backward" in line
    assert f"by at most {first['exact_max_difference']:.3g}," in line
    assert "times the range of the grid: try fewer --config.model.grid_bits" in line
    assert "--config.model.backprop=store" in line
    assert "--config.on_mismatch=stop" in line


@pytest.mark.thorough
def test_a_branch_that_counts_its_calls(tiny_config, tmp_path, capsys, monkeypatch):
    calls, original = itertools.count(), ResidualBranch.__call__

    def counting(self, x_BHWC, *, train):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        count = jax.pure_callback(lambda: np.float32(next(calls) % 7), shape)
        return original(self, x_BHWC, train=train) + jax.lax.stop_gradient(count)

    monkeypatch.setattr(ResidualBranch, "__call__", counting)
    tiny_config.update_from_flattened_dict({"num_steps": 2, "eval_every_steps": 2})
    train(tiny_config, tmp_path)
    (line,) = warnings(capsys.readouterr().err)
    assert line.startswith("WARNING: step 1: ")
    assert "or a branch is no pure function: try --config.model.backprop=store" in line


@pytest.mark.thorough
def test_stop_keeps_rows_and_checkpoints(tiny_config, tmp_path):
    """A harmless beginning; then steps whose size takes streams out of the grid's range."""
    settings = {
        "schedule.name": "piecewise",
        "schedule.learning_rate": 1e-3,
        "schedule.factor": 1e4,
        "schedule.boundaries": (5,),
        "model.grid_bits": 19,
        "optimizer.momentum": 0.0,
    }
    tiny_config.update_from_flattened_dict(settings)
    tiny_config.on_mismatch = "stop"
    with pytest.raises(MismatchError, match=r"step 8: .*differed") as caught:
        train(tiny_config, tmp_path)
    assert "\n" not in str(caught.value)
    written = rows(tmp_path)
    assert [row["step"] for row in written if "train_loss" in row] == list(range(1, 9))
    assert [row["exact_mismatches"] > 0 for row in written if "train_loss" in row][6:] == [0, 1]
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("*"))
    assert steps == [4, 6]
    assert not (tmp_path / "summary.json").exists()
    # The same again ends the same; a warning lets it go on, from the checkpoint.
    with pytest.raises(MismatchError, match="step 8: "):
        train(tiny_config, tmp_path)
    assert rows(tmp_path) == written
    tiny_config.on_mismatch = "warn"
    assert train(tiny_config, tmp_path)["steps"] == 12
    assert rows(tmp_path)[: len(written)] == written


@pytest.mark.thorough
def test_stop_is_one_line_and_status_1(tiny_flags, run_program, tmp_path):
    flags = [*tiny_flags, "--config.model.grid_bits=22", "--config.on_mismatch=stop"]
    status, stdout, stderr = run_program("train", *flags, f"--workdir={tmp_path}")
    assert status == 1
    assert stdout == ""
    (line,) = (line for line in stderr.splitlines() if not line.startswith("step "))
    assert line.startswith("error: step ")
    assert "values of the backward pass differed from the forward pass's" in line
    assert len(rows(tmp_path)) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_mismatch": "raise"}, "config.on_mismatch: got 'raise', expected one of warn, stop"),
        (
            {"on_mismatch": "stop", "model.check_exactness": False},
            "config.on_mismatch: got 'stop' and model.check_exactness=False, expected True",
        ),
    ],
)
def test_settings_that_cannot_be_used(settings, message, tiny_config, tmp_path):
    tiny_config.update_from_flattened_dict(settings)
    with pytest.raises(ConfigError) as caught:
        train(tiny_config, tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_what_was_reported_before_a_restart_is_not_reported_again():
    said = []
    alarm = MismatchAlarm("warn", 100.0, said.append)
    checked = {"exact_mismatches": 100.0, "exact_max_difference": 0.0, "grid_range_used": 0.1}
    alarm.check(5, {})  # nothing is checked under `store`
    alarm.check(6, checked)
    assert said == []
    alarm.check(7, checked | {"exact_mismatches": 103.0})
    alarm.check(8, checked | {"exact_mismatches": 999.0})
    (line,) = said
    assert line.startswith("WARNING: step 7: 3 values of the backward pass differed")
    assert "by at most" not in line  # only intermediates did


def test_advice_without_a_grid():
    with pytest.raises(MismatchError, match=r"without a grid: try --config\.model\.grid=True"):
        MismatchAlarm("stop").check(1, {"exact_mismatches": 2.0, "exact_max_difference": 0.5})


def test_a_line_stays_above_the_progress_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(9, examples_per_step=1, stream=stream, every_seconds=0.0)
    progress.update(1, loss=1.0, learning_rate=0.1)
    progress.say("WARNING: look")
    progress.update(2, loss=0.5, learning_rate=0.1)
    progress.close()
    shown = [line.rsplit("\r", 1)[-1] for line in stream.getvalue().split("\n")]
    assert shown[0] == "WARNING: look"
    assert shown[1].startswith("step 2/9")
