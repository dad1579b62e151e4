"""Trackers of experiments: what they get, and that none of them can stop a run."""

import json
import sys
import threading
import time
import types

import pytest

from revnet_jax.config import ConfigError, experiment, flatten, language_model
from revnet_jax.errors import UserError
from revnet_jax.runs.resume import changed_settings
from revnet_jax.runs.tracker import check_tracker, open_tracker
from revnet_jax.runs.workdir import check_same, claim, load_config
from revnet_jax.runs.writer import BackgroundWriter
from revnet_jax.training import loop
from revnet_jax.training.loop import train
from tests.small_run import ONE_STAGE


class Kept:
    """A writer that keeps its rows, or fails where it is told to."""

    def __init__(self, fails=""):
        self.rows, self.closed, self.fails = [], 0, fails
        if fails == "open":
            raise SystemExit("no\nnetwork")

    def write(self, step, values):
        if self.fails == "write" and step == 2:
            raise OSError("no\nnetwork")
        self.rows.append((step, values))

    def close(self):
        self.closed += 1
        if self.fails:
            raise OSError("no\nnetwork")


@pytest.fixture
def fake(monkeypatch):
    """`fake(name)` puts a package of that name in place, and returns the calls of its `init`."""

    def install(name):
        runs = []

        class Run:
            def __init__(self, **options):
                self.options, self.rows, self.finished = options, [], 0
                runs.append(self)

            def log(self, values, step):
                self.rows.append((step, values))

            def finish(self):
                self.finished += 1

        module = types.ModuleType(name)
        module.init = Run
        monkeypatch.setitem(sys.modules, name, module)
        return runs

    return install


def test_rows_come_in_order_and_the_writer_is_closed_once():
    kept, said = Kept(), []
    writer = BackgroundWriter("mine", lambda: kept, said.append)
    values = {"loss": 1.0}
    for step in range(100):
        writer.write(step, values)
    values["loss"] = 5.0  # the caller may use its dictionary again
    writer.close()
    assert kept.rows == [(step, {"loss": 1.0}) for step in range(100)]
    assert (kept.closed, said) == (1, [])


@pytest.mark.parametrize("fails", ["open", "write", "close"])
def test_an_error_is_one_line_and_no_row_follows(fails):
    said, threads, made = [], threading.active_count(), []

    def open_writer():
        made.append(Kept(fails))
        return made[-1]

    writer = BackgroundWriter("mine", open_writer, said.append)
    for step in range(4):
        writer.write(step, {})
    deadline = time.monotonic() + 60
    while fails != "close" and threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    for step in range(4, 8):
        writer.write(step, {})
    writer.close()
    assert threading.active_count() == threads
    (line,) = said
    error = "SystemExit" if fails == "open" else "OSError"
    assert line == (f"warning: mine gets no more metrics, and the run goes on: {error}: no network")
    assert [kept.closed for kept in made] == ([] if fails == "open" else [1])
    if fails == "write":
        assert made[0].rows == [(0, {}), (1, {})]


def test_a_writer_that_hangs_does_not_stop_the_run():
    go_on, said, kept = threading.Event(), [], Kept()

    def open_writer():
        go_on.wait()
        return kept

    options = {"most_waiting": 3, "patience_seconds": 0.05}
    behind = BackgroundWriter("mine", open_writer, said.append, **options)
    for step in range(9):
        behind.write(step, {})
    behind.close()
    slow = BackgroundWriter("mine", open_writer, said.append, **options)
    slow.write(0, {})
    slow.close()
    assert [line.partition("goes on: ")[2] for line in said] == [
        "it is 3 rows behind",
        "it has not ended within 0.05 seconds",
    ]
    go_on.set()


@pytest.mark.thorough
def test_a_run_is_tracked_and_resumed_under_one_id(tiny_config, tmp_path, fake):
    runs, workdir = fake("wandb"), tmp_path / "run"
    tiny_config.update_from_flattened_dict(ONE_STAGE)
    tiny_config.schedule.name = "constant"
    tiny_config.tracker = "wandb"
    tiny_config.num_steps = tiny_config.eval_every_steps = 2
    train(tiny_config, workdir)
    tiny_config.num_steps = 4
    train(tiny_config, workdir)
    assert [run.finished for run in runs] == [1, 1]
    first, second = (run.options for run in runs)
    assert (
        first["id"] == second["id"] == json.loads((workdir / "tracker.json").read_text())["run_id"]
    )
    assert (second["resume"], second["dir"], second["name"]) == ("allow", str(workdir), "run")
    assert first["project"] == "revnet_jax"
    assert second["config"]["num_steps"] == 4
    assert second["config"]["model.units"] == (2,)
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [{"step": step, **values} for run in runs for step, values in run.rows]
    timings = [row.pop("examples_per_second", None) for row in rows]
    assert rows == logged
    assert any(timings)


def test_trackio_resumes_a_run_by_its_name(tmp_path, fake, monkeypatch):
    runs, workdir = fake("trackio"), tmp_path / "run"
    workdir.mkdir()
    monkeypatch.setenv("TRACKIO_PROJECT", "ours")
    for step in (0, 4):
        writer = open_tracker("trackio", workdir, {"seed": 0}, step, pytest.fail)
        writer.write(step + 1, {"loss": 1.0})
        writer.close()
    first, second = (run.options for run in runs)
    assert first == second
    assert first["name"].startswith("run-")
    assert (first["project"], first["resume"], first["config"]) == ("ours", "allow", {"seed": 0})
    assert [run.rows for run in runs] == [[(1, {"loss": 1.0})], [(5, {"loss": 1.0})]]
    assert [run.finished for run in runs] == [1, 1]


def test_a_tracker_of_ones_own(tmp_path, module):
    module(
        """
        made = []

        class Mine:
            def __init__(self, **options): self.options, self.rows = options, []
            def write(self, step, values): self.rows.append(step)
            def close(self): self.rows.append("closed")

        def track(workdir, settings, run_id, step):
            made.append(Mine(workdir=workdir, settings=settings, run_id=run_id, step=step))
            return made[-1]

        def none(run_id): ...
        def other(run_id, colour): ...
        def fails(): raise ValueError("no disk")
        """
    )
    said = []
    check_tracker("mine:track")
    writer = open_tracker("mine:track", tmp_path, {"seed": 3}, 4, said.append)
    writer.write(5, {})
    writer.close()
    (mine,) = sys.modules["mine"].made
    run_id = json.loads((tmp_path / "tracker.json").read_text())["run_id"]
    assert mine.options == {
        "workdir": tmp_path,
        "settings": {"seed": 3},
        "run_id": run_id,
        "step": 4,
    }
    assert (mine.rows, said) == ([5, "closed"], [])

    for name in ("none", "fails"):
        check_tracker(f"mine:{name}")
        open_tracker(f"mine:{name}", tmp_path, {}, 0, said.append).close()
    assert "got a NoneType without write, close from mine:none, expected a Writer" in said[0]
    assert "mine:fails: no disk (mine.py:" in said[1]
    with pytest.raises(ConfigError, match=r"got mine:other with a parameter colour, expected some"):
        check_tracker("mine:other")
    with pytest.raises(ConfigError, match=r"config.tracker: got 'mine:no' and no 'no' in"):
        check_tracker("mine:no")


def test_a_missing_package_is_one_line_before_anything_is_compiled(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    tiny_config.tracker = "wandb"
    with pytest.raises(
        ConfigError, match=r"config.tracker: got 'wandb', which .*: pip install wan"
    ):
        train(tiny_config, tmp_path / "run")
    tiny_config.tracker = "wand"
    with pytest.raises(ConfigError, match=r"got 'wand', expected nothing, wandb, trackio, or MODU"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_tracks(tiny_config, tmp_path, fake, monkeypatch):
    runs = fake("wandb")
    tiny_config.tracker = "wandb"
    task = types.SimpleNamespace(unit="examples", units=lambda size: size)
    for is_first in (False, True):
        monkeypatch.setattr(loop, "is_first", lambda is_first=is_first: is_first)
        with loop.Recorder(tmp_path / str(is_first), tiny_config, task, 0):
            pass
    assert [run.options["name"] for run in runs] == ["True"]
    assert not (tmp_path / "False").exists()


def test_an_id_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tracker.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"tracker.json: got no run_id, expected what the run wrote"
    ):
        open_tracker("wandb", tmp_path, {}, 0, pytest.fail)


@pytest.mark.parametrize("make", [language_model, experiment])
def test_a_run_that_is_older_than_the_setting_is_resumed(tmp_path, make):
    config = make()
    if make is experiment:
        config.model.family, config.model.mine = "mine:build", (1, 2)
    claim(tmp_path, config, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["tracker"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert check_same(tmp_path, config, {}) == {}
    assert flatten(load_config(tmp_path)) == flatten(config)
    config.tracker = "wandb"
    assert changed_settings(config, load_config(tmp_path), tmp_path).keys() == {"tracker"}
