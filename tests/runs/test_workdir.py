"""The folder of a run: which config may go on there, and what its damaged files lead to."""

import contextlib
import copy
import json
import os
import shutil
import subprocess

import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.errors import UserError
from revnet_jax.runs import workdir as workdirs
from revnet_jax.runs.history import append_row, record_start
from revnet_jax.runs.provenance import commit_of
from revnet_jax.runs.resume import Change, changed_settings
from revnet_jax.runs.workdir import check_same, claim, finished_summary, known_stored_layers

MAY = {
    "log_every_steps": 7,
    "eval_every_steps": 7,
    "checkpoint_every_steps": 7,
    "eval_batch_size": 30,
    "memory_limit_gib": 3.0,
    "on_mismatch": "stop",
    "tracker": "wandb",
    "num_steps": 700,
    "mesh.fsdp": 2,
    "profile.start_step": 3,
    "profile.num_steps": 3,
    "schedule.decay_steps": 3,
    "data.dir": "elsewhere",
    "data.num_threads": 7,
    "data.prefetch": 7,
    "model.backprop": "store",
    "model.stored_layers": -1,
    "model.unroll": 2,
    "model.check_exactness": False,
    "model.attention": "chunked",
    "model.feed_forward_chunks": 2,
    "model.loss_chunk": 64,
}
MAY_NOT = {
    "seed": 1,
    "batch_size": 50,
    "microbatches": 2,
    "init_from": "elsewhere",
    "balance": 0.5,
    "ema_decay": 0.5,
    "data.name": "characters",
    "data.context": 64,
    "data.train_share": 0.5,
    "data.vocab_size": 255,
    "model.family": "vit",
    "model.layers": 5,
    "model.width": 64,
    "model.dropout": 0.5,
    "model.reversible": False,
    "model.compute_dtype": "bfloat16",
    "model.param_dtype": "bfloat16",
    "model.grid": False,
    "model.grid_bits": 10,
    "optimizer.name": "sgd",
    "optimizer.b1": 0.8,
    "optimizer.state_dtype": "bfloat16",
    "optimizer.lockstep": True,
    "schedule.name": "piecewise",
    "schedule.learning_rate": 0.5,
    "schedule.warmup_steps": 7,
    "schedule.boundaries": (1, 2),
}


def config_with(**settings):
    config = language_model()
    config.schedule.name = "constant"
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture
def trained(tmp_path):
    """A folder in which a run of `config_with()` made 40 steps."""
    claim(tmp_path, config_with(), {"sha256": "x"})
    rows = [{"step": step, "train_loss": 1.0} for step in (20, 40)]
    write_rows(tmp_path, rows)
    return tmp_path


def write_rows(workdir, rows):
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(lines)


def record_of(workdir):
    return json.loads((workdir / "config.json").read_text())


@pytest.mark.parametrize("key", MAY)
def test_what_does_not_define_a_run_may_change(key, trained):
    config = config_with(**{key: MAY[key]})
    was = config_with().to_json()
    assert config.to_json() != was
    (change,) = claim(trained, config, {"sha256": "x"}).items()
    assert change[0] == key
    assert change[1].now == MAY[key]
    assert check_same(trained, config_with(), {"sha256": "x"}) == {}  # nothing was written yet


@pytest.mark.parametrize("key", MAY_NOT)
def test_what_defines_a_run_may_not(key, trained):
    before = (trained / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"config\.{key}: got .*, expected .*\. Choose another"):
        claim(trained, config_with(**{key: MAY_NOT[key], "log_every_steps": 3}), {"sha256": "x"})
    assert (trained / "config.json").read_bytes() == before


def test_the_line_names_every_setting_that_may_not_change(trained):
    with pytest.raises(ConfigError) as caught:
        claim(trained, config_with(**MAY, **MAY_NOT), {"sha256": "x"})
    line = str(caught.value)
    assert "\n" not in line
    assert all(f"config.{key}: got " in line for key in MAY_NOT)
    assert not any(f"config.{key}: got " in line for key in MAY)
    assert "config.seed: got 1, expected 0. Choose" in line


@pytest.mark.parametrize("num_steps", [300, 900])
@pytest.mark.parametrize("schedule", ["constant", "piecewise", "cosine"])
def test_a_run_gets_longer_or_shorter_where_the_schedule_allows(schedule, num_steps, tmp_path):
    before = config_with(**{"schedule.name": schedule})
    after = config_with(**{"schedule.name": schedule, "num_steps": num_steps})
    if schedule != "cosine":
        changes = changed_settings(after, before, tmp_path)
        assert changes == {"num_steps": Change(600, num_steps)}
        return
    with pytest.raises(ConfigError) as caught:
        changed_settings(after, before, tmp_path)
    assert f"config.num_steps: got {num_steps}, expected 600: under the schedule cosine" in str(
        caught.value
    )
    assert f"--config.init_from={tmp_path}" in str(caught.value)


def test_wsd_may_change_its_decay_before_it_begins(tmp_path):
    wsd = lambda num_steps, decay: config_with(
        **{"schedule.name": "wsd", "num_steps": num_steps, "schedule.decay_steps": decay}
    )
    claim(tmp_path, wsd(600, 100), {})
    write_rows(tmp_path, [{"step": step} for step in (400, 500)])
    for num_steps, decay in ((900, 100), (900, 10), (550, 50), (600, 100)):
        assert "num_steps" in claim(tmp_path, wsd(num_steps, decay), {}) or num_steps == 600
        workdirs.check_can_go_on(tmp_path, wsd(num_steps, decay), 500)
    workdirs.check_can_go_on(tmp_path, wsd(600, 100), 550)
    for num_steps, decay, step in ((900, 100, 501), (550, 51, 500), (550, 50, 501)):
        with pytest.raises(ConfigError, match="before it begins, at step 500 as it was") as caught:
            workdirs.check_can_go_on(tmp_path, wsd(num_steps, decay), step)
        line = str(caught.value)
        assert "\n" not in line
        assert f"got {num_steps} with schedule.decay_steps={decay}, expected 600 with 100" in line
    # Other schedules have no decay steps.
    workdirs.check_can_go_on(tmp_path, config_with(num_steps=900), 550)


def test_a_run_is_scored_on_the_same_sequences(tmp_path):
    before = config_with(**{"data.eval_batches": 3, "eval_batch_size": 100})
    halved = config_with(**{"data.eval_batches": 3, "eval_batch_size": 50})
    with pytest.raises(ConfigError, match="got 3 of 50 sequences, expected 3 of 100"):
        changed_settings(halved, before, tmp_path)
    halved.data.eval_batches = 6
    assert set(changed_settings(halved, before, tmp_path)) == {
        "data.eval_batches",
        "eval_batch_size",
    }


def test_a_run_shorter_than_its_checkpoint(trained):
    workdirs.check_can_go_on(trained, config_with(num_steps=40), 40)
    with pytest.raises(ConfigError, match=r"config\.num_steps: got 39, expected 40 or more"):
        workdirs.check_can_go_on(trained, config_with(num_steps=39), 40)


def test_metrics_without_a_checkpoint(trained):
    """40 steps are too many for intervals of 10 steps, were they so all along."""
    now = config_with(checkpoint_every_steps=10)
    workdirs.check_can_go_on(trained, now, 0)  # they were 200
    record_start(trained, now, 0, {}, print)
    with pytest.raises(ConfigError, match="goes to step 40, but there is no checkpoint"):
        workdirs.check_can_go_on(trained, now, 0)


def test_a_run_that_never_began_may_be_mended(tmp_path):
    claim(tmp_path, config_with(batch_size=1000), {})
    assert claim(tmp_path, config_with(batch_size=10), {}) == {}
    assert record_of(tmp_path)["config"]["batch_size"] == 10


def test_changes_are_recorded_with_their_step(trained):
    lines = []

    def resume(step, **settings):
        config = config_with(**settings)
        record_start(trained, config, step, claim(trained, config, {"sha256": "x"}), lines.append)

    resume(20, **{"model.backprop": "store"})
    resume(40, **{"model.backprop": "remat", "eval_every_steps": 100})
    assert record_of(trained)["changes"] == [
        {"step": 20, "settings": {"model.backprop": {"was": "reverse", "now": "store"}}},
        {
            "step": 40,
            "settings": {
                "eval_every_steps": {"was": 200, "now": 100},
                "model.backprop": {"was": "store", "now": "remat"},
            },
        },
    ]
    assert record_of(trained)["config"]["model"]["backprop"] == "remat"
    assert record_of(trained)["data"] == {"sha256": "x"}
    assert lines[0] == "resumed at step 20 with model.backprop=store (was reverse)"
    # From an older checkpoint: what came after is made again, with the settings of now.
    resume(30, **{"model.backprop": "remat", "eval_every_steps": 100})
    assert [change["step"] for change in record_of(trained)["changes"]] == [20, 30]
    assert len(lines) == 2


def test_every_start_is_recorded(trained, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scripts/train.py", "--config=configs/lm_bytes.py"])
    (trained / "summary.json").write_text("{}")
    for step in (20, 40):
        record_start(trained, config_with(), step, {}, print)
    first, second = map(json.loads, (trained / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (20, 40)
    assert first["command"] == ["scripts/train.py", "--config=configs/lm_bytes.py"]
    assert first["devices"] == {"count": 2, "kind": "cpu", "processes": 1}
    assert first["versions"]["jax"]
    assert first["versions"].keys() >= {"revnet_jax", "jaxlib", "numpy"}
    assert first["host"]
    assert first["date"].startswith("20")
    assert not (trained / "summary.json").exists()  # it goes on


@pytest.mark.parametrize("before", [b"", b'{"step": 1}\n', b'{"step": 1, "da'])
def test_a_line_that_a_full_disk_has_cut_is_ended(before, tmp_path):
    path = tmp_path / "starts.jsonl"
    path.write_bytes(before)
    append_row(path, {"step": 2})
    append_row(path, {"step": 3})
    lines = path.read_bytes().splitlines()
    assert lines == [*before.splitlines(), b'{"step": 2}', b'{"step": 3}']


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize("installed", [False, True])
def test_the_commit_is_that_of_the_repository_that_tracks_the_package(installed, tmp_path):
    """Not that of a project in whose folder the package is installed."""
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    git = lambda *args: subprocess.run(
        ["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    git("init")
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "module.py"
    if not installed:
        file.touch()
    (tmp_path / "other.py").touch()
    git("add", ".")
    git("commit", "-m", "a")
    file.touch()
    assert commit_of(file) == (None if installed else git("rev-parse", "HEAD"))


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        ([20, 40, 60, 80, "50e"], None),
        ([], (5, 20, 80)),
        ([60, 80, "50e"], (2, 20, 40)),
        ([20, 40], (3, 50, 80)),
        ([20, 40, 80, "50e"], (1, 60, 60)),
        ([20, 40, 60, 80], (1, 50, 50)),
    ],
)
def test_rows_that_are_missing_are_told_once(kept, lost, trained):
    config = config_with(eval_every_steps=50)
    (trained / "metrics.jsonl").unlink()
    record = record_of(trained) | {"config": config.to_dict()}
    (trained / "config.json").write_text(json.dumps(record))
    row = lambda step: (
        {"step": 50, "eval_loss": 1.0} if step == "50e" else {"step": step, "train_loss": 1.0}
    )
    if kept:
        write_rows(trained, map(row, kept))
    lines = []
    record_start(trained, config, 80, {}, lines.append)
    if lost is None:
        assert not lines
        assert not record_of(trained).get("lost_rows")
        return
    rows, first, last = lost
    (line,) = lines
    assert f"{rows} rows of steps {first} to {last} are missing" in line
    entry = {"found_at_step": 80, "rows": rows, "first_step": first, "last_step": last}
    assert record_of(trained)["lost_rows"] == [entry]
    record_start(trained, config, 80, {}, lines.append)
    assert len(lines) == 1


def test_an_evaluation_that_was_not_made_is_not_lost(trained):
    lines, config = [], config_with(eval_every_steps=40)
    record_start(trained, config, 40, {}, lines.append)
    for evaluated in (False, True):
        record_start(trained, config, 40, {}, lines.append, evaluated=evaluated)
        assert len(lines) == evaluated


def test_rows_are_due_by_the_intervals_of_their_time(trained):
    write_rows(trained, [{"step": step, "train_loss": 1.0} for step in (20, 40, 45, 50, 55, 60)])
    config, lines = config_with(log_every_steps=5), []
    record_start(trained, config, 40, {"log_every_steps": Change(20, 5)}, lines.append)
    record_start(trained, config, 60, {}, lines.append)
    assert lines == ["resumed at step 40 with log_every_steps=5 (was 20)"]
    record_start(trained, config, 65, {}, lines.append)
    assert "1 rows of steps 65 to 65 are missing" in lines[1]


def nodes(tree, path=()):
    yield path
    if isinstance(tree, dict):
        for key in tree:
            yield from nodes(tree[key], (*path, key))


def test_whatever_config_json_holds_is_a_line(trained):
    """Replaces every value in it by others. Some of these are changes that are allowed."""
    record_start(trained, config_with(), 20, {"log_every_steps": Change(20, 20)}, print)
    record, expected = record_of(trained), config_with()
    lines = []
    kinds = (None, 5, "x", [], [[1]], {"a": 1})
    for number, path in enumerate(nodes(record)):
        # Of a single setting, one beside null.
        for bad in kinds if len(path) < 2 else (None, kinds[number % 5 + 1]):
            damaged = copy.deepcopy(record)
            if path:
                parent = damaged
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = bad
            (trained / "config.json").write_text(json.dumps(damaged if path else bad))
            try:
                changes = claim(trained, expected, {"sha256": "x"})
                record_start(trained, expected, 20, changes, lambda line: None)
            except ConfigError as error:
                lines.append(str(error))
    assert len(lines) > 150
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("text", ["", "null", "5", '{"config": {"se', "[" * 200_000, "\0", "[]"])
def test_files_that_are_cut_or_something_else(text, trained):
    for name in ("config.json", "summary.json", "auto.json", "starts.jsonl"):
        (trained / name).write_text(text)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json .*: expected the") as caught:
        claim(trained, config_with(), {})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"cannot read .*summary\.json .*; delete it"):
        finished_summary(trained, 40)
    with pytest.raises(UserError, match=r"cannot read .*auto\.json .*; delete it"):
        known_stored_layers(trained / "auto.json", {})


@pytest.mark.parametrize("line", ["", "null", "5", '{"step": "x"}', '{"st', "[" * 200_000, "\0"])
def test_a_damaged_line_among_the_metrics(line, trained):
    write_rows(trained, [{"step": 20, "train_loss": 3.0, "a": 1.0}])
    with open(trained / "metrics.jsonl", "a") as file:
        file.write(f'{line}\n{{"step": 40, "train_loss": 2.0}}\n{{"step": 60')
    assert workdirs.values_at(trained, 40) == {"step": 40, "train_loss": 2.0}
    assert workdirs.values_at(trained, 60) == {}


def test_the_choice_of_auto_holds_for_the_settings_it_was_made_for(tmp_path):
    path = tmp_path / "auto.json"
    workdirs.write_json(path, {"stored_layers": 3, "found_for": {"memory_limit_gib": 1.0}})
    assert known_stored_layers(path, {"memory_limit_gib": 1.0}) == 3
    assert known_stored_layers(path, {"memory_limit_gib": 0.5}) == -1
    assert known_stored_layers(tmp_path / "none.json", {}) == -1
    workdirs.write_json(path, {"stored_layers": 3})  # by an older version: it may not fit
    assert known_stored_layers(path, {"memory_limit_gib": 1.0}) == -1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"file/run cannot be made"),
        workdirs.workdir_lock(tmp_path / "file" / "run"),
    ):
        pass
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*lock"), workdirs.workdir_lock(tmp_path):
        pass
    (tmp_path / f"config.json.{os.getpid()}.tmp").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*config\.json"):
        claim(tmp_path, config_with(), {})


def test_files_of_killed_writers_are_removed(tmp_path):
    (tmp_path / "metrics.jsonl.123.tmp").write_text("half")
    (tmp_path / "metrics.jsonl").write_text("whole")
    (tmp_path / "draft.tmp").write_text("mine")
    with workdirs.workdir_lock(tmp_path):
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {"lock", "metrics.jsonl", "draft.tmp"}


def test_the_config_of_something_else_is_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"cannot read .*config.json .*expected the --workdir of"):
        claim(tmp_path, config_with(), {})
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'


def test_another_config_before_the_first_step_forgets_what_was_found(tmp_path):
    claim(tmp_path, config_with(), {})
    (tmp_path / "auto.json").write_text("{}")
    claim(tmp_path, config_with(), {})
    assert (tmp_path / "auto.json").exists()
    claim(tmp_path, config_with(**{"batch_size": 7}), {})
    assert not (tmp_path / "auto.json").exists()


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [("units=[2,2]", True), ("a\\b", True), ("[", False), ("[]", False), ("a]b[ *?", False)],
)
def test_folders_in_which_orbax_would_lose_its_files(name, is_refused, tmp_path):
    expects = pytest.raises(ConfigError, match="in the folder's path, expected a path without br")
    with (
        expects if is_refused else contextlib.nullcontext(),
        workdirs.workdir_lock(tmp_path / name),
    ):
        assert (tmp_path / name).is_dir()
    assert (tmp_path / name).exists() != is_refused
