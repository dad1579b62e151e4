"""A run from config to summary: what it leaves behind, and that it can be interrupted."""

import itertools
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.errors import Preempted, UserError
from revnet_jax.runs.workdir import read_json, write_json
from revnet_jax.training.loop import NonFiniteError, resolve_auto, train
from revnet_jax.training.restore import evaluate_run
from revnet_jax.training.sharding import put_batch
from tests import thorough
from tests.small_run import ONE_STAGE


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_a_run_leaves_behind(tiny_config, tmp_path):
    tiny_config.update_from_flattened_dict({**ONE_STAGE, "checkpoint_every_steps": 4})
    summary = train(tiny_config, tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["exact_mismatches"] == 0
    assert summary["peak_memory_bytes"] is None
    assert 0 < summary["eval_accuracy"] <= 1
    assert summary["examples_per_second"] > 0
    assert summary["devices"] == "2 x cpu"
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["model"]["units"] == [2]
    assert record["versions"]["jax"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    written = rows(tmp_path)
    assert [row["step"] for row in written if "train_loss" in row] == list(range(1, 13))
    assert [row["step"] for row in written if "eval_accuracy" in row] == [6, 12]
    assert all(0 < row["grid_range_used"] < 0.1 for row in written if "train_loss" in row)
    # Evaluating the run again gives the same figures, and changes nothing in its folder.
    before = snapshot(tmp_path)
    again = evaluate_run(tmp_path)
    assert again["step"] == 12
    assert again["eval_loss"] == summary["eval_loss"]
    assert again["eval_accuracy"] == summary["eval_accuracy"]
    assert snapshot(tmp_path) == before
    # Another config may not touch the folder; the same one finds it finished.
    tiny_config.schedule.learning_rate = 0.01
    with pytest.raises(
        ConfigError, match=r"another config: config.schedule.learning_rate: got 0.01, expected 0.05"
    ):
        train(tiny_config, tmp_path)
    assert snapshot(tmp_path) == before
    tiny_config.schedule.learning_rate = 0.05
    assert train(tiny_config, tmp_path) == summary
    # Metrics whose checkpoints are gone are not replaced by those of a new start.
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="goes to step 12, but there is no checkpoint"):
        train(tiny_config, tmp_path)
    assert rows(tmp_path) == written


@pytest.mark.thorough
def test_the_strategies_train_alike(tiny_config, tmp_path):
    """The first 50 losses agree to 1e-4."""
    tiny_config.num_steps = 50
    tiny_config.eval_every_steps = tiny_config.checkpoint_every_steps = 50
    losses = {}
    for backprop in ("store", "remat", "reverse"):
        tiny_config.model.backprop = backprop
        summary = train(tiny_config, tmp_path / backprop)
        assert summary["exact_mismatches"] == (0 if backprop == "reverse" else None)
        losses[backprop] = [r["train_loss"] for r in rows(tmp_path / backprop) if "train_loss" in r]
    assert np.mean(losses["store"][-10:]) < 0.95 * losses["store"][0]  # it does train
    np.testing.assert_allclose(losses["remat"], losses["store"], rtol=1e-4)
    np.testing.assert_allclose(losses["reverse"], losses["store"], rtol=1e-4)


@pytest.mark.thorough
def test_killed_at_any_moment_it_ends_the_same(start_program, run_program, tiny_flags, tmp_path):
    """SIGKILL after 1, 4 and 9 rows: the metrics are bit for bit those of a run left alone."""
    status, _, stderr = run_program("train", *tiny_flags, f"--workdir={tmp_path / 'alone'}")
    assert status == 0, stderr
    workdir = tmp_path / "killed"
    metrics = workdir / "metrics.jsonl"
    for num_rows in (1, 4, 9):
        process = start_program("train", *tiny_flags, f"--workdir={workdir}")
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < num_rows:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (workdir / "summary.json").exists()
    status, stdout, stderr = run_program("train", *tiny_flags, f"--workdir={workdir}")
    assert status == 0, stderr
    assert metrics.read_bytes() == (tmp_path / "alone" / "metrics.jsonl").read_bytes()
    assert json.loads(stdout)["steps"] == 12


@pytest.mark.thorough
def test_stopped_in_an_evaluation_it_makes_it_when_it_goes_on(tiny_config, tmp_path, monkeypatch):
    """In the middle of the run and at its end."""
    tiny_config.update({"num_steps": 4, "eval_every_steps": 2, "eval_batch_size": 300})
    tiny_config.model.update({"units": (1,), "channels": (8, 8)})
    expected = train(tiny_config, tmp_path / "alone")
    stopped = tmp_path / "stopped"
    # An evaluation has two batches: the third of the second start is of step 4.
    for signalled, step in ((1, 2), (3, 4)):
        count = itertools.count(1)

        def put_and_signal(batch, mesh, count=count, signalled=signalled):
            if next(count) == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            return put_batch(batch, mesh)

        with monkeypatch.context() as patched:
            patched.setattr("revnet_jax.training.evaluation.put_batch", put_and_signal)
            with pytest.raises(Preempted, match=f"saved step {step}"):
                train(tiny_config, stopped)
        assert [row["step"] for row in rows(stopped)] == [1, 2, 2, 3, 4][: step + step // 4]
        assert not (stopped / "summary.json").exists()
        with open(stopped / "metrics.jsonl", "a") as file:
            # As if killed in a start between, before the scores were in the checkpoint.
            file.write(json.dumps({"step": step, "eval_loss": 1.0}) + "\n")
    summary = train(tiny_config, stopped)
    assert summary["eval_loss"] == expected["eval_loss"]
    assert rows(stopped) == rows(tmp_path / "alone")
    # Checkpoints have their scores as if they had been saved with them.
    for step in (2, 4):
        saved, undisturbed = (
            json.loads((run / f"checkpoints/{step}/manifest/metadata").read_text())["metrics"]
            for run in (stopped, tmp_path / "alone")
        )
        assert saved == undisturbed
        assert saved["eval_loss"]


@pytest.mark.thorough
def test_narrow_moments_and_parameters_are_resumed_bit_for_bit(tiny_config, tmp_path):
    """From an earlier checkpoint than the last; moments in float8, kernels in bfloat16."""
    tiny_config.model.update({"channels": (16, 16, 32), "param_dtype": "bfloat16"})
    tiny_config.optimizer.update({"name": "adamw", "state_dtype": "float8"})
    tiny_config.schedule.update({"name": "constant", "learning_rate": 1e-3})
    train(tiny_config, tmp_path / "alone")
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "alone", stopped)
    (stopped / "summary.json").unlink()
    kept = sorted(int(path.name) for path in (stopped / "checkpoints").glob("*"))
    for step in kept[1:]:
        shutil.rmtree(stopped / "checkpoints" / str(step))
    assert kept[0] < 12
    train(tiny_config, stopped)
    assert rows(stopped) == rows(tmp_path / "alone")


@pytest.mark.thorough
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tiny_config, tmp_path, caplog
):
    train(tiny_config, tmp_path)
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    newest = max((tmp_path / "checkpoints").glob("*"), key=lambda path: int(path.name))
    assert newest.name == "12"
    for path in (newest / "state").rglob("*"):  # some of the files hold what others hold too
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(tiny_config, tmp_path)
    assert "checkpoint 12 is damaged" in caplog.text
    assert (tmp_path / "damaged_checkpoints" / "12").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == expected


@pytest.mark.parametrize(
    ("harmless_steps", "last_good"), [(4, 4), thorough(5, 4), thorough(11, 10)]
)
def test_a_step_that_is_not_finite_stops_the_run(harmless_steps, last_good, tiny_config, tmp_path):
    """Between checkpoints, at one, and at the end of the run."""
    # A few harmless steps, then one with a rate that nothing survives.
    tiny_config.update_from_flattened_dict(ONE_STAGE)
    tiny_config.schedule.update({"name": "piecewise", "learning_rate": 1e-3, "factor": 1e38})
    tiny_config.schedule.boundaries = (harmless_steps,)
    with pytest.raises(
        NonFiniteError, match=rf"is (nan|inf) at step {harmless_steps + 1}, .*last good checkpoint"
    ):
        train(tiny_config, tmp_path)
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("*")]
    assert max(steps) == last_good
    assert not (tmp_path / "summary.json").exists()
    assert all(math.isfinite(row["train_loss"]) for row in rows(tmp_path) if "train_loss" in row)


@pytest.mark.thorough
def test_a_checkpoint_of_another_architecture(tiny_config, tmp_path):
    from revnet_jax.runs.checkpoint import CheckpointError

    train(tiny_config, tmp_path / "a")
    tiny_config.model.channels = (8, 8, 32)
    tiny_config.num_steps = 2
    train(tiny_config, tmp_path / "b")
    (tmp_path / "a" / "config.json").write_bytes((tmp_path / "b" / "config.json").read_bytes())
    before = snapshot(tmp_path / "a")
    with pytest.raises(CheckpointError, match="expected"):
        train(tiny_config, tmp_path / "a")
    assert snapshot(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 15, "config.batch_size: got 15, expected a multiple of 2"),
        ("batch_size", 2000, "config.data: got batch_size=2000"),
        ("num_steps", 0, "config.num_steps: got 0, expected a whole number, 1 to"),
        ("data.name", "mnist", "config.data: got data set 'mnist'"),
        ("data.name", "cifar10", "config.data: got no dir for cifar10"),
        ("data.num_classes", 7, "config.data.num_classes: got 7, expected 10"),
        ("data.min_crop_area", 0.5, "config.data: got min_crop_area=0.5 for digits"),
        ("model.backprop", "reverse_all", "config.model: got backprop='reverse_all'"),
        ("model.family", "densenet", "config.model.family: got 'densenet'"),
        ("model.channels", (8, 7, 16), "config.model: got channels="),
        ("model.compute_dtype", "float16", "config.model: got compute_dtype='float16'"),
        ("data.image_shape", (8, 8), "config.data.image_shape: got (8, 8), expected a tuple of 3"),
        ("data.crop_padding", 8, "config.data: got crop_padding=8, expected 0 to 7"),
        ("data.num_threads", 9, "config.data: got num_threads=9 and prefetch=4, expected prefetch"),
        ("model.channels", (8, 8), "config.model: got units="),
        ("model.grid_bits", 40, "config.model.grid_bits: got 40, expected a whole number"),
        ("schedule.name", "step", "config.schedule: got name='step'"),
        ("optimizer.name", "lamb", "config.optimizer: got name='lamb'"),
    ],
)
def test_bad_settings_are_found_before_anything_is_written(
    key, value, message, tiny_config, tmp_path
):
    tiny_config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError) as caught:
        train(tiny_config, tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_of_unknown_config(tiny_config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"holds a run but no config.json"):
        train(tiny_config, tmp_path)


@pytest.mark.parametrize("content", ["", '{"steps": 1', "[]", "null"])
def test_a_summary_that_was_cut_is_named(content, tmp_path):
    write_json(tmp_path / "summary.json", {"steps": 12})
    assert read_json(tmp_path / "summary.json", "steps") == {"steps": 12}
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*summary.json \(.*\): expected.*delete it"):
        read_json(tmp_path / "summary.json")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"stored_layers": "3"}', '{"stored_layers": 3000000000}']
)
def test_stored_layers_that_were_cut_are_named(content, tiny_config, tmp_path):
    (tmp_path / "auto.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*auto.json \(.*\): expected"):
        resolve_auto(tiny_config, tmp_path)
