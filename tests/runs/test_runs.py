"""Runs side by side, from folders written by hand."""

import json
import subprocess
import sys

import pytest

from revnet_jax.errors import UserError
from revnet_jax.figures import load_figure_class
from revnet_jax.runs.comparison import (
    chosen_metrics,
    compare_runs,
    draw_runs,
    find_runs,
    grouped,
    runs_table,
)
from tests.small_run import ROOT


@pytest.fixture
def write(tmp_path):
    """Writes a workdir: `write(name, rows, seed=0, lr=0.1, ...)`."""

    def make(name, rows, seed=0, lr=0.1, **others):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        config = {"seed": seed, "schedule": {"learning_rate": lr}, "units": [1, 2], **others}
        (workdir / "config.json").write_text(json.dumps({"config": config}))
        lines = [row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows]
        (workdir / "metrics.jsonl").write_text("".join(lines))
        return str(workdir)

    return make


@pytest.fixture
def sweep(write, tmp_path):
    rows = lambda loss: [
        {"step": 1, "train_loss": 9.0},
        {"step": 2, "train_loss": loss},
        {"step": 2, "eval_loss": 2 * loss},
    ]
    write("sweep/a0", rows(1.0), lr=0.2)
    write("sweep/a1", rows(3.0), lr=0.2, seed=1)
    write("sweep/b0", [*rows(5.0)[:1], '{"step": 2, "trai'], data={"dir": "elsewhere"})
    (tmp_path / "sweep" / "a0" / "summary.json").write_text(
        '{"num_params": 7, "devices": "1 x cpu"}'
    )
    return tmp_path / "sweep"


def silent(line):
    raise AssertionError(line)


def test_seeds_are_one_row_and_settings_that_differ_its_name(sweep):
    runs = find_runs([str(sweep), str(sweep / "a0")], silent)
    groups = grouped(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("learning_rate=0.1", 1),
        ("learning_rate=0.2", 2),
    ]
    metrics = chosen_metrics(runs, None)
    assert metrics == ["train_loss", "eval_loss"]
    cut, whole = compare_runs(groups, metrics)
    assert (cut["steps"], whole["steps"]) == ([1, 1], [2, 2])
    assert cut["train_loss"] == {"mean": 9.0, "spread": None}
    assert cut["eval_loss"]["mean"] is None
    assert whole["eval_loss"]["mean"] == 4.0
    assert whole["eval_loss"]["spread"] == pytest.approx(8**0.5)
    table = runs_table([cut, whole], metrics).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]] == [
        ["0.1", "1", "1", "9", "-"],
        ["0.2", "2", "2", "2 ± 1.4", "4 ± 2.8"],
    ]
    assert compare_runs(groups, ["num_params"])[1]["num_params"]["mean"] == 7


def test_settings_of_older_runs_are_those_of_today(write, tmp_path):
    """stored_layers was a string once."""
    rows = [{"step": 1, "train_loss": 1.0}]
    for name, stored in (("a", "0"), ("b", 0), ("c", "auto"), ("d", -1)):
        write(f"mixed/{name}", rows, model={"stored_layers": stored})
    groups = grouped(find_runs([str(tmp_path / "mixed")], silent))
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("stored_layers=-1", 2),
        ("stored_layers=0", 2),
    ]


def test_runs_without_a_setting_are_alike_only_those_with_its_default(write, tmp_path):
    """It is newer than they are; `own` is a user's, whose default nobody knows."""
    rows = [{"step": 1, "train_loss": 1.0}]
    write("default/a", rows)
    write("default/b", rows, seed=1, model={"dropout": 0.0}, tracker="wandb")
    write("other/a", rows)
    write("other/b", rows, model={"dropout": 0.5})
    write("own/a", rows)
    write("own/b", rows, model={"own": 1})
    groups = lambda name: [
        (group.label, len(group.runs))
        for group in grouped(find_runs([str(tmp_path / name)], silent))
    ]
    assert groups("default") == [("all", 2)]
    assert groups("other") == [("dropout=0.5", 1), ("dropout=None", 1)]
    assert groups("own") == [("own=1", 1), ("own=None", 1)]


def test_curves_are_drawn(sweep, tmp_path):
    groups = grouped(find_runs([str(sweep)], silent))
    figure = draw_runs(
        groups, ["train_loss", "eval_loss"], load_figure_class("out", f"{tmp_path}/c.png")
    )
    assert [len(axis.lines) for axis in figure.axes] == [3, 3]
    assert list(figure.axes[0].lines[1].get_ydata()) == [9.0, 1.0]
    with pytest.raises(UserError, match="got num_params to draw, expected a metric of"):
        draw_runs(groups, ["num_params"], load_figure_class("out", f"{tmp_path}/c.png"))


def test_what_is_no_run_is_one_line(sweep, write, tmp_path):
    lines = []
    empty, damaged = write("new/empty", []), write("new/damaged", ["no row\n", {"step": 2}])
    write("new/half", ['{"step": 1'])
    for paths, message in (
        (
            [str(tmp_path / "nowhere")],
            "got .*nowhere, expected the --workdir of a run, or a folder",
        ),
        ([empty], "empty: got no metrics, expected a run that has logged a step"),
        ([damaged], "metrics.jsonl, line 1: got 'no row', expected a row of metrics"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_runs(paths, silent)
        assert "\n" not in str(caught.value)
    metrics = tmp_path / "new" / "damaged" / "metrics.jsonl"
    for line in (b"\xff", b'{"step": Infinity}', b"[" * 200_000):
        metrics.write_bytes(line + b"\n")
        with pytest.raises(UserError, match=r"metrics.jsonl, line 1: got '.*', expected a row of"):
            find_runs([damaged], silent)
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*metrics.jsonl: .*; expected the metrics"):
        find_runs([damaged], silent)
    (tmp_path / "new" / "damaged" / "config.json").unlink()
    with pytest.raises(UserError, match=r"got no run with metrics in .*new"):
        find_runs([str(tmp_path / "new")], lines.append)
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == ["empty", "half"]
    for text in ("{", "[" * 200_000):
        (tmp_path / "new" / "empty" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"cannot read .*config.json"):
            find_runs([empty], silent)
    with pytest.raises(
        UserError, match="got metric 'loss', expected some of eval_loss, num_params"
    ):
        chosen_metrics(find_runs([str(sweep)], silent), ["loss"])
    (tmp_path / "sweep" / "a0" / "summary.json").write_text('{"steps": 2}')
    with pytest.raises(UserError, match="got metric 'steps', expected some of"):
        chosen_metrics(find_runs([str(sweep)], silent), ["steps"])


def test_the_program(sweep):
    run = lambda *arguments: subprocess.run(
        [sys.executable, "scripts/compare_runs.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (_, row) = json.loads(run(str(sweep), "--json", "--metrics=train_loss").stdout)
    assert row["train_loss"]["mean"] == 2.0
    assert run().stderr.startswith("error: got no run, expected workdirs")


def test_curves_that_cannot_be_written_are_one_line(sweep, tmp_path, run_program):
    pytest.importorskip("matplotlib.figure")
    picture = tmp_path / "curves.png"
    picture.symlink_to("/dev/full")
    status, stdout, stderr = run_program("compare_runs", str(sweep), f"--out={picture}")
    assert status == 1
    assert stdout  # the table is printed all the same
    assert stderr.startswith(f"error: cannot write {picture}: No space left on device")
