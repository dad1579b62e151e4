"""A trace of some steps, and the names that operations carry in it."""

import re

import jax
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.errors import StorageError
from revnet_jax.training.loop import train
from revnet_jax.training.program import step_program
from revnet_jax.training.trace import Trace


@pytest.mark.thorough
def test_a_run_leaves_a_trace_of_the_steps_asked_for(tiny_config, tmp_path):
    tiny_config.update_from_flattened_dict(
        {"num_steps": 4, "eval_every_steps": 4, "profile.start_step": 2, "profile.num_steps": 2}
    )
    train(tiny_config, tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert any("train_step" in name for name in names)
    tiny_config.profile.start_step = 0
    with pytest.raises(ConfigError, match=r"config.profile.start_step: got 0, expected"):
        train(tiny_config, tmp_path / "other")


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    # Not the profiler itself, which would keep a trace that failed for the next one.
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x.pb; No space left\nmore")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with Trace(tmp_path, start_step=1, num_steps=1, last_step=1) as trace:
        trace.before(1)
        with pytest.raises(StorageError, match=r"cannot write .*: RESOURCE_EXHAUSTED: x.pb; No sp"):
            trace.after(1, jax.numpy.ones(1))


@pytest.mark.thorough
@pytest.mark.parametrize("lockstep", [False, True])
def test_operations_say_what_they_belong_to(tiny_config, lockstep):
    tiny_config.optimizer.lockstep = lockstep
    program = step_program(tiny_config, jax.devices()[:1])
    text = program.step.lower(program.state, program.batch).compile().as_text()
    for name in ("forward", "rewind", "update", "stem", "head"):
        assert re.search(rf"[/(]{name}[/)]", text), name


def test_a_trace_of_steps_that_are_past_is_said(tmp_path, capsys):
    trace = Trace(tmp_path, start_step=10, num_steps=3, last_step=20)
    trace.from_step(9)
    assert not capsys.readouterr().err
    trace.from_step(10)
    assert "got 10, expected more than 10, the step that" in capsys.readouterr().err
