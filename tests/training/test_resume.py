"""A run that goes on in another way than it began, and one that begins with another's weights."""

import json
import shutil

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.training.initial import load_weights
from revnet_jax.training.loop import train
from revnet_jax.training.program import step_program
from tests.runs.test_checkpoint import assert_same_bits
from tests.training.test_loop import rows

HALF, WHOLE = 3, 6


def short(config, num_steps):
    """Settings of a run whose schedule does not depend on its length."""
    config.schedule.name = "constant"
    config.num_steps = num_steps
    config.eval_every_steps = WHOLE
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of HALF the steps; copy it."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def half(finished, tiny_config, tmp_path):
    if not finished.exists():
        train(short(tiny_config.copy_and_resolve_references(), HALF), finished)
    return shutil.copytree(finished, tmp_path / "half")


def state_of(workdir, config):
    """What the newest checkpoint holds: (step, state)."""
    program = step_program(config, jax.devices())
    with Checkpoints(
        workdir / "checkpoints", best_metric=None, best_mode="max", read_only=True
    ) as checkpoints:
        return checkpoints.restore(program.state)


@pytest.mark.thorough
def test_a_finished_run_goes_on_in_another_way_to_the_same_bits(half, tiny_config, tmp_path):
    train(short(tiny_config, WHOLE), tmp_path / "whole")
    expected = state_of(tmp_path / "whole", tiny_config)
    summary = json.loads((half / "summary.json").read_text())
    assert summary["steps"] == HALF
    changes = {
        "model.backprop": "remat",
        "model.stored_layers": 1,
        "eval_batch_size": 90,
        "eval_every_steps": 2,
        "log_every_steps": 2,
        "checkpoint_every_steps": 3,
    }
    tiny_config.update_from_flattened_dict(changes)
    summary = train(tiny_config, half)
    assert summary["steps"] == WHOLE
    assert summary == json.loads((half / "summary.json").read_text())
    assert_same_bits(state_of(half, tiny_config)[1], expected[1])
    steps = lambda name: [row["step"] for row in rows(half) if name in row]
    assert steps("train_loss") == [1, 2, 3, 4, 6]
    assert steps("eval_loss") == [3, 4, 6]
    losses = {row["step"]: row["train_loss"] for row in rows(tmp_path / "whole")[:WHOLE]}
    assert all(r["train_loss"] == losses[r["step"]] for r in rows(half) if "train_loss" in r)
    record = json.loads((half / "config.json").read_text())
    (change,) = record["changes"]
    assert change["step"] == HALF
    assert set(change["settings"]) == {*changes, "num_steps"}
    starts = (half / "starts.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in starts] == [0, HALF]


@pytest.mark.thorough
def test_a_wsd_run_is_made_longer_before_its_decay(tiny_config, tmp_path):
    """From the checkpoint of step 4, when the decay of the shorter run began, to the same bits."""
    tiny_config.schedule.update({"name": "wsd", "decay_steps": 2})
    tiny_config.update({"num_steps": 6, "eval_every_steps": 8})
    train(tiny_config, tmp_path / "longer")
    tiny_config.num_steps = 8
    with pytest.raises(ConfigError, match=r"got 8 with schedule\.decay_steps=2, expected 6 w"):
        train(tiny_config, tmp_path / "longer")
    shutil.rmtree(tmp_path / "longer" / "checkpoints" / "6")
    train(tiny_config, tmp_path / "longer")
    train(tiny_config, tmp_path / "whole")
    states = [state_of(tmp_path / name, tiny_config) for name in ("longer", "whole")]
    assert states[0][0] == states[1][0] == 8
    assert_same_bits(*(state for _, state in states))


@pytest.mark.thorough
def test_a_run_cannot_be_shorter_than_it_is(half, tiny_config):
    with pytest.raises(ConfigError, match=r"config\.num_steps: got 2, expected 3 or more"):
        train(short(tiny_config, 2), half)


@pytest.mark.thorough
def test_another_runs_weights(half, tiny_config, tmp_path):
    """They are the new run's step 0, and its own from then on."""
    source, new = half, tmp_path / "new"
    weights = state_of(source, short(tiny_config, HALF))[1].variables
    tiny_config.init_from = str(source)
    train(short(tiny_config, 1), new)
    kept = sorted(int(path.name) for path in (new / "checkpoints").glob("*"))
    assert kept == [0, 1]
    record = json.loads((new / "config.json").read_text())
    assert record["init_from"] == {"workdir": str(source.resolve()), "step": HALF}
    assert record["config"]["init_from"] == str(source)
    # From its own step 0, whatever became of the other run.
    shutil.rmtree(source)
    shutil.rmtree(new / "checkpoints" / "1")
    step, state = state_of(new, tiny_config)
    assert step == int(state.step) == 0
    assert_same_bits(state.variables, weights)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    expected = rows(new)
    train(tiny_config, new)
    assert rows(new) == expected
    # Another source is another run.
    tiny_config.init_from = ""
    with pytest.raises(ConfigError, match=r"config\.init_from: got '', expected '.*half'"):
        train(tiny_config, new)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model.channels": (8, 8, 32)},
            r"^config.init_from: .* [1-9]\d* arrays differ, such as params/.*expected ",
        ),
        ({"model.units": (1, 3)}, r"^config.init_from: .* arrays differ, such as params/"),
        (
            {"model.param_dtype": "bfloat16"},
            r"^config.model.param_dtype: got bfloat16, expected float32, the dtype of the weights",
        ),
    ],
)
def test_weights_of_another_model_are_one_line(settings, message, half, tiny_config):
    tiny_config.update_from_flattened_dict(settings)
    program = step_program(tiny_config, jax.devices())
    with pytest.raises(ConfigError, match=message) as caught:
        load_weights(half, program.state.variables, {})
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_weights_that_the_new_model_lacks_are_not_dropped(half, tiny_config):
    program = step_program(tiny_config, jax.devices())
    name = next(iter(program.state.variables.params))
    fewer = {k: v for k, v in program.state.variables.params.items() if k != name}
    with pytest.raises(ConfigError, match=rf"params/{name}.*: got .*, expected nothing"):
        load_weights(half, program.state.variables._replace(params=fewer), {})


def test_a_source_without_weights(tiny_config, tmp_path):
    tiny_config.init_from = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"init_from: got .*none, which holds no checkpoints"):
        train(tiny_config, tmp_path / "new")
    # That was no run yet: the mistake can be mended.
    tiny_config.init_from = str(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"which holds no checkpoint, expected the --workdir"):
        train(tiny_config, tmp_path / "new")


@pytest.mark.thorough
def test_lost_metrics_are_told_and_recorded(half, tiny_config, capfd):
    (half / "metrics.jsonl").write_text("")
    summary = train(short(tiny_config, WHOLE), half)
    assert "3 rows of steps 1 to 3 are missing" in capfd.readouterr().err
    assert summary["steps"] == WHOLE
    (entry,) = json.loads((half / "config.json").read_text())["lost_rows"]
    assert entry == {"found_at_step": 3, "rows": 3, "first_step": 1, "last_step": 3}
