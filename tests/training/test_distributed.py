"""Processes on one machine, as if each were a host: they train, stop and fail together.

That no two of them read the same example is in tests/data/test_data_pipeline.py, and in the losses.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from revnet_jax.errors import PREEMPTED_STATUS
from revnet_jax.training.distributed import LaunchError, Stop
from revnet_jax.training.distributed import start as join
from tests.small_run import ROOT, TINY

FLAGS = {
    **TINY,
    "num_steps": 120,
    "eval_every_steps": 1000,  # at the end
    "checkpoint_every_steps": 119,  # and at the end; others were saved because of a signal
    "model.units": (2,),
    "model.channels": (8, 8),
    "schedule.name": "constant",
    "schedule.learning_rate": 1e-3,  # so small that different roundings stay different roundings
}
# Sums over devices differ in the last bit, 1e-7; a hundred steps make 3e-5 of it. A batch more or
# less, or a part of it seen twice, is a difference of percents at the next step.
TOLERANCE = 1e-3
PATIENCE_SECONDS = 240
# Compile quickly rather than well: every second process does it anew.
QUICKLY = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count"


def start(workdir, *flags, devices, **settings):
    """Starts `scripts/train.py` on so many simulated devices."""
    text = lambda value: "".join(f"{x}," for x in value) if isinstance(value, tuple) else value
    config = [f"--config.{key}={text(value)}" for key, value in {**FLAGS, **settings}.items()]
    program = ["scripts/train.py", "--config=configs/digits.py", f"--workdir={workdir}"]
    return start_python(workdir.parent, *program, *config, *flags, devices=devices)


def start_python(folder, *args, devices):
    """Its output goes to files in the folder."""
    log = folder / f"{time.monotonic_ns()}"
    with open(f"{log}.out", "w") as stdout, open(f"{log}.err", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *args],
            cwd=ROOT,
            # A device may block several threads in collectives: let there be enough of them.
            env={**os.environ, "XLA_FLAGS": f"{QUICKLY}={devices}", "PJRT_NPROC": "16"},
            stdout=stdout,
            stderr=stderr,
        )
    process.log = log
    return process


def start_two(workdir, *, of_second=None, **settings):
    """Two processes of four devices each. of_second: settings of its own."""
    first, second = flags_of_two()
    of_second = {**settings, **(of_second or {})}
    return [
        start(workdir, *first, devices=4, **settings),
        start(workdir, *second, devices=4, **of_second),
    ]


def flags_of_two():
    both = [f"--coordinator_address={free_address()}", "--num_processes=2"]
    both += ["--heartbeat_timeout_seconds=10"]
    return [*both, "--process_id=0"], [*both, "--process_id=1"]


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def ended(process, seconds=PATIENCE_SECONDS):
    """Waits for the end of a process: its status, stdout and stderr."""
    try:
        process.wait(seconds)
    finally:
        process.kill()
    stdout, stderr = (Path(f"{process.log}.{name}").read_text() for name in ("out", "err"))
    return SimpleNamespace(status=process.returncode, stdout=stdout, stderr=stderr)


def rows(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def column(name, rows):
    """The steps of the rows that have a metric, and its values."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def events(workdir):
    return len(list((workdir / "tensorboard").glob("events*")))


def wait_until(condition, process):
    """While the process is going on."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, ended(process).stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that nothing happens to: one process, eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    found = ended(start(workdir, devices=8))
    assert found.status == 0, found.stderr
    return workdir


@pytest.mark.thorough
def test_two_processes_are_stopped_and_one_goes_on(alone, tmp_path):
    """One trouble after the other, and one mesh: weights split over all, over four, not at all."""
    workdir = tmp_path / "run"
    both = start_two(workdir, **{"mesh.data": 1, "mesh.fsdp": 8})
    wait_until(lambda: len(rows(workdir)) >= 2, both[0])
    for process in both:
        process.send_signal(signal.SIGTERM)
    step = check_both_saved(both, workdir, alone)

    both = start_two(workdir, **{"mesh.data": 2, "mesh.fsdp": 4})
    wait_until(lambda: events(workdir) == 2, both[0])  # before the first step, which is compiled
    both[1].send_signal(signal.SIGTERM)  # to one alone
    assert check_both_saved(both, workdir, alone) > step

    rest = ended(start(workdir, devices=4))
    assert rest.status == 0, rest.stderr
    for name in ("train_loss", "eval_loss"):
        told, values = column(name, rows(workdir))
        expected_told, expected = column(name, rows(alone))
        assert told == expected_told
        np.testing.assert_allclose(values, expected, rtol=TOLERANCE)
    assert set(column("exact_mismatches", rows(workdir))[1]) == {0}
    assert events(workdir) == 3  # one for each start


def check_both_saved(both, workdir, alone):
    """That they stopped at the same step, which is returned, and told so far what one tells."""
    first, second = map(ended, both)
    step = saved(workdir)[-1]
    for found in (first, second):
        assert found.status == PREEMPTED_STATUS, found.stderr
        line = f"preempted: saved step {step}; the same command goes on from there"
        assert found.stderr.splitlines()[-1] == line
    # What they tell is told once, by the first.
    assert f"step {step}/120" in first.stderr
    assert "/120" not in second.stderr
    told, losses = column("train_loss", rows(workdir))
    assert told == list(range(1, step + 1))
    np.testing.assert_allclose(losses, column("train_loss", rows(alone))[1][:step], rtol=1e-5)
    return step


@pytest.mark.thorough
def test_two_processes_compute_the_same_when_started_again(tmp_path):
    """What they would find in the cache of compiled programs, XLA reads back wrongly."""
    settings = {"mesh.fsdp": 8, "num_steps": 1, "checkpoint_every_steps": 1}
    settings |= {"model.units": (1, 2), "model.channels": (8, 8, 16)}
    for name in ("first", "again"):
        for process in map(ended, start_two(tmp_path / name, **settings)):
            assert process.status == 0, process.stderr
    first, again = (rows(tmp_path / name) for name in ("first", "again"))
    assert again[0] == first[0]
    assert first[0]["exact_mismatches"] == 0


@pytest.mark.thorough
def test_two_processes_finish_a_run(alone, tmp_path):
    """Its last step and evaluation are missing; when they are not, none has anything to do."""
    workdir = tmp_path / "run"
    shutil.copytree(alone, workdir)
    shutil.rmtree(workdir / "checkpoints" / "120")
    (workdir / "summary.json").unlink()
    for _ in range(2):
        first, second = [ended(process) for process in start_two(workdir)]
        assert first.status == second.status == 0, first.stderr + second.stderr
        summary = json.loads(first.stdout[first.stdout.index("{") :])
        assert summary == json.loads((workdir / "summary.json").read_text())
        assert summary["steps"] == 120
        assert summary["devices"] == "8 x cpu"
        assert "{" not in second.stdout
        assert not second.stderr
        assert summary["eval_loss"] == pytest.approx(rows(alone)[-1]["eval_loss"], rel=1e-5)
        assert [row["step"] for row in rows(workdir)] == [row["step"] for row in rows(alone)]
        assert events(workdir) == 2


ROWS = """
import sys
import jax
import numpy as np
from revnet_jax.training import distributed, sharding

distributed.start(sys.argv[2], 2, int(sys.argv[1]), heartbeat_timeout_seconds=10)
near = [jax.devices()[i] for i in (0, 4, 1, 5, 7, 2, 3, 6)]  # not by process, as on a torus
for sizes in ((8, 1, 1, 1), (2, 4, 1, 1), (4, 1, 1, 2), (1, 1, 8, 1)):
    mesh = jax.sharding.Mesh(np.reshape(near, sizes), sharding.AXES)
    batch = {"x": np.arange(48).reshape(24, 2)}
    rows = sharding.local_rows(mesh, 24)
    whole = sharding.put_batch({name: array[rows] for name, array in batch.items()}, mesh)
    for shard in whole["x"].addressable_shards:
        assert (np.asarray(shard.data) == batch["x"][shard.index]).all(), (sizes, shard)
    print(len(rows), whole["x"].shape)
"""


@pytest.mark.thorough
def test_two_processes_evaluate_a_run(alone):
    program = ["scripts/evaluate.py", f"--workdir={alone}"]
    both = [start_python(alone.parent, *program, *flags, devices=4) for flags in flags_of_two()]
    first, second = map(ended, both)
    assert first.status == second.status == 0, first.stderr + second.stderr
    expected = rows(alone)[-1]["eval_loss"]
    report = json.loads(first.stdout[first.stdout.index("{") :])
    assert report["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert "{" not in second.stdout


def test_processes_put_batches_together_wherever_their_devices_are_in_the_mesh(tmp_path):
    address = free_address()
    both = [start_python(tmp_path, "-c", ROWS, str(i), address, devices=4) for i in range(2)]
    for found in map(ended, both):
        assert found.status == 0, found.stderr
        assert found.stdout.split("\n") == [
            "12 (24, 2)",
            "12 (24, 2)",
            "24 (24, 2)",
            "24 (24, 2)",
            "",
        ]


@pytest.mark.thorough
def test_an_error_in_one_ends_both_with_its_line(alone):
    """The second would wait in another program, for another mesh."""
    both = start_two(alone, of_second={"mesh.fsdp": 2, "seed": 1})
    first, second = [ended(process) for process in both]
    line = "got mesh.fsdp=2 (the first: 1), seed=1 (the first: 0), expected the same flags"
    assert first.status == second.status == 1
    assert first.stderr.startswith(f"error: process 1: {line}")
    assert second.stderr.startswith(f"error: {line}")
    assert first.stderr.count("\n") == second.stderr.count("\n") == 1


STUCK = """
import sys, time
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from revnet_jax import errors
from revnet_jax.config import cli
from revnet_jax.training import distributed

address, process_id, raises = sys.argv.pop(), sys.argv.pop(), sys.argv.pop()

def main(argv):
    distributed.start(address, 2, int(process_id), heartbeat_timeout_seconds=10)
    with distributed.shared_fate():
        mesh = Mesh(jax.devices(), "d")
        ones = jax.numpy.ones(8, device=NamedSharding(mesh, PartitionSpec("d")))
        total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        print(total(ones), flush=True)
        if process_id == "1":
            time.sleep(1000)
        never = total(ones)
        if raises == "yes":
            raise errors.UserError("got no second process, expected one")
        never.block_until_ready()

cli.run(main, required=())
"""


def start_stuck(folder, raises):
    """Two processes, one of which begins a computation that the other takes no part in."""
    address = free_address()
    return [start_python(folder, "-c", STUCK, raises, str(i), address, devices=4) for i in range(2)]


def test_an_error_is_not_held_up_by_a_computation(tmp_path):
    first, second = [ended(process, 120) for process in start_stuck(tmp_path, "yes")]
    assert first.status == second.status == 1, first.stderr + second.stderr
    assert first.stderr == "error: got no second process, expected one\n"
    assert second.stderr == "error: process 0: got no second process, expected one\n"


@pytest.mark.thorough
def test_the_death_of_one_ends_the_other(tmp_path):
    """After the timeout: 10 s here, of 60 by default."""
    first, second = start_stuck(tmp_path, "no")
    wait_until(lambda: "8.0" in Path(f"{second.log}.out").read_text(), second)
    second.kill()
    second.wait()
    survivor = ended(first, 60)
    assert survivor.status not in (0, PREEMPTED_STATUS)
    assert "heartbeat" in survivor.stderr


@pytest.mark.thorough
def test_a_signal_stops_a_single_process(alone, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, devices=8)
    wait_until(lambda: len(rows(workdir)) >= 5, process)
    process.send_signal(signal.SIGTERM)
    found = ended(process)
    (step,) = saved(workdir)
    assert found.status == PREEMPTED_STATUS, found.stderr
    assert f"preempted: saved step {step};" in found.stderr
    assert column("train_loss", rows(workdir))[0] == list(range(1, step + 1))
    found = ended(start(workdir, devices=8))
    assert found.status == 0, found.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()


def test_the_handler_is_ours_while_a_run_goes_on():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        with Stop() as another:
            assert not another.requested()
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():
        with Stop() as stop:
            found.extend([stop.requested(), signal.getsignal(signal.SIGTERM)])

    found = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [False, before]


def test_several_processes_stop_at_the_same_question(monkeypatch):
    """Questions are counted, whatever they are asked after; JAX says yes at one of them, once."""
    asked = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda step: asked.append(step) or step == 2,
    )
    with Stop() as stop:
        assert [stop.requested() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [0, 1, 2, 3, 4]


def test_incomplete_flags(run_program, tiny_flags, tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", "--num_processes=2", "--process_id=0"]
    status, stdout, stderr = run_program("train", *tiny_flags, *flags)
    assert (status, stdout) == (1, "")
    assert stderr == (
        "error: got --num_processes=2 and --process_id=0 without --coordinator_address, expected "
        "all three, or none where JAX finds the cluster by itself\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "got --coordinator_address=host:1 without --num_processes"),
        ((None, 3, None), "got --num_processes=3 without"),
        (("host:1", 2, 2), "got --process_id=2 of --num_processes=2, expected"),
        (("host:1", 2, -1), "got --process_id=-1 of"),
        (("host:1", 0, 0), "got --num_processes=0, expected at least 1"),
        (("host", 2, 0), "got --coordinator_address=host, expected host:port"),
        (("host:65536", 2, 0), "got --coordinator_address=host:65536, expected host:port"),
        ((None, None, None, 2**31), "got --heartbeat_timeout_seconds=2147483648, expected at"),
        ((None, None, None, 0), "got --heartbeat_timeout_seconds=0, expected at least 1"),
    ],
)
def test_flags_out_of_range(arguments, message):
    with pytest.raises(LaunchError) as caught:
        join(*arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
