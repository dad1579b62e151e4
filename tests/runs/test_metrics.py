"""What a run tells: rows that survive a kill, metrics fetched late, a line of progress."""

import errno
import io
import json
import os
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.errors import StorageError
from revnet_jax.runs.metrics import DelayedFetch, MetricsWriter, Progress, peak_memory_bytes
from tests.small_run import file_limit


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def events(path) -> list[list[tuple[int, str, float]]]:
    """The scalars of every event file, file by file: records of length, crc, data, crc.

    Where a run starts, TensorBoard forgets that step and later ones: (step, "START", 0).
    """
    from tensorboardX.proto.event_pb2 import Event

    files = []
    for file in sorted((path / "tensorboard").iterdir()):  # as TensorBoard reads them
        data, found = file.read_bytes(), []
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, "START", 0)] if event.HasField("session_log") else []
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
        files.append(found)
    return files


def log_steps(path, first: int, last: int, resume_step: int | None, tensorboard=False) -> None:
    with MetricsWriter(path, resume_step=resume_step, tensorboard=tensorboard) as writer:
        for step in range(first, last + 1):
            loss = jnp.float32(1.0) / jnp.float32(step)
            timings = {"examples_per_second": 100.0 + step}
            writer.write(step, {"train_loss": loss, "mismatches": jnp.int32(0)}, timings=timings)
            if step % 2 == 0:
                writer.write(step, {"eval_accuracy": 1.0 / step})


def test_values_read_back_exactly_and_rows_are_valid_json(tmp_path):
    values = {
        "f32": np.float32(0.1),
        "f64": 0.1 + 0.2,
        "bf16": jnp.bfloat16(0.1),
        "count": jnp.int32(3),
        "nan": jnp.float32(jnp.nan),
        "inf": -np.inf,
    }
    with MetricsWriter(tmp_path, resume_step=None, tensorboard=False) as writer:
        writer.write(np.int64(4), values)
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert strict == {
        "step": 4,
        "f32": float(np.float32(0.1)),
        "f64": 0.1 + 0.2,
        "bf16": float(jnp.bfloat16(0.1)),
        "count": 3,
        "nan": "nan",
        "inf": "-inf",
    }
    assert np.isnan(float(strict["nan"]))
    assert isinstance(strict["count"], int)


@pytest.mark.parametrize(
    "torn",
    [
        b"",
        b'{"step": 3, "tr',
        b'{"step": 2',
        b'{"step": 4}',
        b"\0\0\0\n",
        b'{"step": Infinity}\n',
        b"[" * 200_000 + b"\n",
    ],
    ids=range(7),
)
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
    log_steps(tmp_path / "whole", 1, 9, None)
    log_steps(tmp_path / "killed", 1, 6, None)
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    log_steps(tmp_path / "killed", 5, 9, resume_step=4)  # the checkpoint was of step 4
    whole, killed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert [p.name for p in killed.parent.iterdir()] == ["metrics.jsonl"]


def test_an_evaluation_that_is_made_again_is_one_row(tmp_path):
    """Killed after the row was written, before the checkpoint had the scores."""
    log_steps(tmp_path, 1, 6, None)
    with MetricsWriter(tmp_path, resume_step=4, owed=True, tensorboard=False) as writer:
        assert [(row["step"], len(row)) for row in rows(tmp_path)][-3:] == [(2, 2), (3, 3), (4, 3)]
        writer.write(4, {"eval_accuracy": 1.0 / 4})
    log_steps(tmp_path / "whole", 1, 4, None)
    whole, again = (folder / "metrics.jsonl" for folder in (tmp_path / "whole", tmp_path))
    assert again.read_bytes() == whole.read_bytes()


def test_a_fresh_start_keeps_no_row_of_a_run_before(tmp_path):
    log_steps(tmp_path, 1, 3, None)
    log_steps(tmp_path, 1, 2, None)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 2]


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=None, tensorboard=False)
    writer.write(1, {"train_loss": 2.0})
    assert rows(tmp_path) == [{"step": 1, "train_loss": 2.0}]
    writer.close()


def test_timings_go_to_tensorboard_alone_one_event_file_a_start(tmp_path, monkeypatch):
    clock = iter(range(10**18, 10**18 + 100, 7))  # two starts within one second
    monkeypatch.setattr("time.time_ns", lambda: next(clock))
    log_steps(tmp_path, 1, 2, None, tensorboard=True)
    log_steps(tmp_path, 2, 2, resume_step=1, tensorboard=True)
    assert all("examples_per_second" not in row for row in rows(tmp_path))
    first, second = events(tmp_path)
    assert (1, "train_loss", 1.0) in first
    assert (2, "examples_per_second", 102.0) in first
    assert {step for step, _, _ in second} == {2}
    assert (2, "eval_accuracy", 0.5) in second


@pytest.mark.parametrize(("resume_step", "purged"), [(None, 1), (3, 4)])
def test_a_restart_hides_the_points_that_it_writes_again(tmp_path, resume_step, purged):
    log_steps(tmp_path, 1, 5, None, tensorboard=True)
    log_steps(tmp_path, purged, 5, resume_step, tensorboard=True)
    first, second = events(tmp_path)
    assert first[0] == (1, "START", 0)
    assert second[0] == (purged, "START", 0)


@pytest.mark.parametrize(("tensorboard", "file"), [(True, "events.out"), (False, "metrics.jsonl")])
def test_a_full_disk_is_one_error_and_loses_no_row_before(tmp_path, tensorboard, file):
    whole, full = tmp_path / "whole", tmp_path / "full"
    log_steps(whole, 1, 100, None)
    threads = threading.active_count()
    with file_limit(3000), pytest.raises(StorageError) as caught:
        log_steps(full, 1, 100, None, tensorboard=tensorboard)
    assert threading.active_count() == threads
    assert "\n" not in str(caught.value)
    assert f"{file}" in str(caught.value)
    assert "File too large (file system /" in str(caught.value)
    assert "MiB free" in str(caught.value)
    lines = (full / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    assert len(kept) > 10
    assert b"".join(kept) == (whole / "metrics.jsonl").read_bytes()[: len(b"".join(kept))]
    log_steps(full, 6, 100, resume_step=5, tensorboard=tensorboard)  # there is room again
    assert (full / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("blocked", ["metrics.jsonl", "tensorboard", "."])
@pytest.mark.parametrize("resume_step", [None, 3])
def test_what_is_in_the_way_of_a_file_is_named(tmp_path, blocked, resume_step):
    path = tmp_path / "run" / blocked
    if blocked == "metrics.jsonl":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(StorageError, match=r"cannot write .*run.*(Is a|Not a|File exists)"):
        log_steps(tmp_path / "run", 1, 3, resume_step, tensorboard=True)


def test_metrics_are_handed_out_after_the_next_step_was_dispatched():
    fetch, log = DelayedFetch(), []
    for step in range(1, 6):
        metrics = {"loss": jnp.float32(step)} if step % 2 else None
        log.append((step, fetch.exchange(step, metrics)))
    assert log == [(1, []), (2, [(1, {"loss": 1.0})]), (3, []), (4, [(3, {"loss": 3.0})]), (5, [])]
    assert fetch.flush() == [(5, {"loss": 5.0})]
    assert fetch.flush() == []


def test_held_metrics_survive_donation_of_the_state():
    step_fn = jax.jit(lambda s: (s + 1.0, {"loss": s * 2.0}), donate_argnums=0)
    state, fetch, seen = jnp.float32(0.0), DelayedFetch(), []
    for step in range(4):
        state, metrics = step_fn(state)
        seen += fetch.exchange(step, metrics)
    seen += fetch.flush()
    assert [(step, values["loss"]) for step, values in seen] == [(i, 2.0 * i) for i in range(4)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_progress(stream, seconds_per_step: float) -> list[float | None]:
    now = [0.0]
    progress = Progress(20, examples_per_step=64, stream=stream, clock=lambda: now[0])
    rates = []
    for step in range(1, 13):
        now[0] += seconds_per_step
        rates.append(progress.update(step, loss=1.0 / step, learning_rate=1e-3))
    progress.close()
    progress.close()
    return rates


def test_progress_off_a_terminal_is_plain_lines_few_and_the_last():
    stream = io.StringIO()
    rates = run_progress(stream, seconds_per_step=1.0)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line.split()[1] for line in lines] == ["1/20", "6/20", "11/20", "12/20"]
    assert rates == [None] + [64.0] * 11
    assert "loss 0.0833  lr 0.001  64 examples/s  0:08 left" in lines[-1]
    assert "GiB" in lines[-1]


def test_progress_on_a_terminal_rewrites_one_line():
    stream = Terminal()
    run_progress(stream, seconds_per_step=1.0)
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\rstep ") == 12


@pytest.mark.parametrize("columns", [20, 45, 80, 200])
def test_progress_fits_the_terminal_and_names_what_it_waits_for(monkeypatch, columns):
    stream = Terminal()
    stream.fileno = lambda: 2
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
    progress = Progress(123456, examples_per_step=64, stream=stream, clock=iter(range(99)).__next__)
    progress.doing(1000, "evaluating, batch 1")  # what a resumed run begins with
    for step in (1001, 1002):
        progress.update(step, loss=2.0, learning_rate=1e-3)
    progress.doing(1002, "evaluating, batch 7")
    progress.doing(1002, "saving")
    progress.close()
    lines = stream.getvalue().removesuffix("\n").split("\r")[1:]
    assert max(map(len, lines)) < columns
    shown = [line.rstrip() for line in lines]
    assert all(line.startswith("step 100") for line in shown)
    if columns >= 45:
        assert shown[0] == "step 1000/123456  evaluating, batch 1"
        assert shown[3].startswith("step 1002/123456  evaluating, batch 7")
        assert shown[4].startswith("step 1002/123456  saving  loss 2.0000")
    assert shown[-1] == shown[2]
    assert ("GiB" in shown[2]) == (columns == 200)


def test_progress_off_a_terminal_names_what_takes_long():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(20, examples_per_step=64, stream=stream, clock=lambda: now[0])
    progress.update(1, loss=2.0, learning_rate=1e-3)
    for batch in range(1, 10):
        now[0] += 1
        progress.doing(1, f"evaluating, batch {batch}")
    progress.close()
    shown = [line.split("  ")[1] for line in stream.getvalue().splitlines()]
    assert shown == ["loss 2.0000", "evaluating, batch 5", "loss 2.0000"]


def test_a_log_that_cannot_be_written_stops_no_run():
    class Closed(Terminal):
        def write(self, text):
            raise OSError(errno.EIO, "of a terminal that is gone")

    assert run_progress(Closed(), seconds_per_step=1.0)[-1] == 64.0


def test_peak_memory_is_none_where_the_backend_cannot_tell():
    assert jax.default_backend() != "cpu" or peak_memory_bytes() is None
