"""Checkpoints: what is restored is what was saved, and damage of any kind is noticed."""

import errno
import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from revnet_jax.runs.checkpoint import CheckpointError, Checkpoints, Conversion
from revnet_jax.runs.manager import Manager
from revnet_jax.runs.manifest import as_abstract
from tests.small_run import file_limit

OPTIONS = {"best_metric": "accuracy", "best_mode": "max"}


@pytest.fixture(autouse=True)
def nothing_is_told_of_what_was_abandoned(caplog):
    """Where several arrays fail, orbax raises one error; nothing is printed of the others."""
    yield
    gc.collect()
    told = caplog.get_records("call") + caplog.records
    assert not [record for record in told if record.name == "asyncio"]


def small_state(seed: int = 0) -> dict[str, jax.Array]:
    # w is too large, and too random, for the database to keep it in a node that has a checksum
    return {
        "w": jax.random.normal(jax.random.key(seed), (64, 48)),
        "b": jnp.full(6, seed, jnp.bfloat16),
        "key": jax.random.key(seed),
    }


def as_bytes(leaf) -> tuple:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), as_bytes(jax.random.key_data(leaf))
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same_bits(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert as_bytes(x) == as_bytes(y)


def test_donating_the_state_after_save_does_not_change_what_is_saved(tmp_path):
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * -2.0 + 1.0, s), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000))}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = update(state)
        jax.block_until_ready(state)
        assert_same_bits(checkpoints.restore(state)[1], expected)


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_the_newest_and_the_best_are_kept_also_across_restarts(tmp_path, mode, best):
    options = OPTIONS | {"best_mode": mode, "keep_newest": 2}
    nan = float("nan")
    saves = [None, {"accuracy": 0.9}, {"accuracy": 0.1}, None, {"accuracy": nan}, {"loss": 1.0}]
    for step, metrics in enumerate(saves, start=1):
        with Checkpoints(tmp_path / "checkpoints", **options) as checkpoints:
            assert checkpoints.save(step, small_state(step), metrics)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [str(best), "5", "6"]
    with Checkpoints(tmp_path / "checkpoints", **options) as checkpoints:
        step, state = checkpoints.restore(small_state(), which="best")
        assert step == best
        assert_same_bits(state, small_state(best))
        assert checkpoints.restore(small_state())[0] == 6


def test_best_without_any_score_is_the_newest_and_says_so(tmp_path):
    reports = []
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS, report=reports.append) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.save(2, small_state(2))
        assert checkpoints.restore(small_state(), which="best")[0] == 2
    assert "accuracy" in reports[0]


def test_metrics_that_come_later_count(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1))
        assert not checkpoints.save(1, small_state(1), {"accuracy": 0.9})
        assert checkpoints.evaluated(1)
        assert not checkpoints.save(1, small_state(1), {"accuracy": 0.1})  # they do not change
        for step in (2, 3, 4):
            checkpoints.save(step, small_state(step), {"accuracy": 0.5} if step < 4 else {})
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        step, state = checkpoints.restore(small_state(), which="best")
        assert step == 1
        assert_same_bits(state, small_state(1))
        assert not checkpoints.evaluated(4)


def test_a_part_of_what_was_saved(tmp_path):
    wanted = {"w": jax.ShapeDtypeStruct((64, 48), jnp.float32)}
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1))
        step, state = checkpoints.restore(wanted, partial=True)
        assert step == 1
        assert_same_bits(state, {"w": small_state(1)["w"]})
        with pytest.raises(CheckpointError, match=r"leaves that differ: 2, such as .*b"):
            checkpoints.restore(wanted)
        with pytest.raises(CheckpointError, match=r"such as v: got nothing, expected float32"):
            checkpoints.restore({"v": wanted["w"]}, partial=True)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two_saved")
    with Checkpoints(root / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1), {"accuracy": 0.5})
        checkpoints.save(2, small_state(2), {"accuracy": 0.7})
    return root


def restore_and_save_again(root: Path) -> tuple[int, list[str]]:
    """Restores the newest, checks it bit for bit, and saves step 2 again if it was lost."""
    reports: list[str] = []
    with Checkpoints(root / "checkpoints", **OPTIONS, report=reports.append) as checkpoints:
        step, state = checkpoints.restore(small_state())
        assert_same_bits(state, small_state(step))
        assert checkpoints.save(2, small_state(2)) == (step == 1)
        assert checkpoints.restore(small_state())[0] == 2
    return step, reports


def flip_bit(path: Path, position: float, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= bit
    path.write_bytes(content)


DAMAGE = [
    lambda path: flip_bit(path, 0.5, 0x10),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: flip_bit(path, 0.3, 0x80),
    Path.unlink,
]


def test_damage_to_any_file_is_reported_or_harmless(two_saved, tmp_path):
    newest = two_saved / "checkpoints" / "2"
    files = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())
    noticed = set()
    for i, file in enumerate(files):
        for damage in DAMAGE[i % 2 :: 2]:  # two kinds for each file, the other two for the next
            root = tmp_path / "copy"
            shutil.copytree(two_saved, root)
            damage(root / "checkpoints" / "2" / file)
            step, reports = restore_and_save_again(root)
            assert len(reports) == (step == 1), (file, reports)
            if reports:
                noticed.add(str(file.parent))
                assert "checkpoint 2 is damaged" in reports[0]
                assert "step 1 used instead" in reports[0]
                assert (root / "damaged_checkpoints" / "2").is_dir()
            shutil.rmtree(root)
    # Files that hold the arrays, their tree and the manifest are among those noticed.
    assert {"manifest", "state", "state/d", "state/ocdbt.process_0/d"} <= noticed


def largest_file(root: Path) -> Path:
    """That of the array w, in the checkpoint of step 2."""
    files = (root / "checkpoints" / "2" / "state").rglob("*")
    return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_flipped_bit_that_orbax_loads_silently_is_found_by_the_checksum(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    flip_bit(largest_file(tmp_path), 0.5, 1)
    step, reports = restore_and_save_again(tmp_path)
    assert step == 1
    assert "array w has another checksum" in reports[0]


@jax.jit
def slowly(x):
    """x, after enough steps that the call returns long before."""
    steps = jax.lax.fori_loop(0, 20_000_000, lambda _, y: jnp.sin(y), jnp.float32(1))
    return jnp.where(steps < 2, x, 0)


def test_leaves_are_converted_one_by_one(two_saved, tmp_path, monkeypatch):
    """Each is checked before, so that of a damaged checkpoint nothing is taken."""
    reads, results, read = [], [], Checkpoints._read_arrays

    def reading(self, step, specs, *rest):
        assert all(leaf.is_ready() for leaf in jax.tree.leaves(results))
        reads.append(set(specs))
        return read(self, step, specs, *rest)

    def convert(leaf):
        made = {"half": leaf.astype(jnp.float16), "row": slowly(leaf)[0]}
        results.append(() if isinstance(leaf, jax.core.Tracer) else made)
        return made

    monkeypatch.setattr(Checkpoints, "_read_arrays", reading)
    first = small_state()
    conversions = {
        "w": Conversion(as_abstract(first["w"]), convert),
        "b": Conversion(as_abstract(first["b"]), lambda leaf: {"wide": leaf.astype(jnp.float32)}),
    }

    def of(state):
        converted = {"half": state["w"].astype(jnp.float16), "row": state["w"][0]}
        return converted | {"wide": state["b"].astype(jnp.float32), "key": state["key"]}

    def restored(step):
        with Checkpoints(tmp_path / "checkpoints", **OPTIONS, report=lambda _: None) as checkpoints:
            found, state = checkpoints.restore(of(first), converted=conversions)
        assert found == step
        assert_same_bits(state, of(small_state(step)))

    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    restored(2)
    assert reads == [{"key"}, {"w"}, {"b"}]
    flip_bit(largest_file(tmp_path), 0.5, 1)
    restored(1)


def test_a_changed_digit_in_the_manifest_is_damage_and_no_other_architecture(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "checkpoints" / "2" / "manifest" / "metadata"
    text = manifest.read_text()
    manifest.write_text(text.replace("[64, 48]", "[64, 40]"))
    assert manifest.read_text() != text
    assert restore_and_save_again(tmp_path)[0] == 1


def test_lost_directories_fall_back_and_never_overwrite_what_was_set_aside(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for i, lost in enumerate(["state", "manifest", "."]):
        shutil.rmtree(tmp_path / "checkpoints" / "2" / lost)
        (tmp_path / "checkpoints" / "2").mkdir(exist_ok=True)
        step, reports = restore_and_save_again(tmp_path)
        assert step == 1
        assert len(reports) == 1
        assert len(list((tmp_path / "damaged_checkpoints").iterdir())) == i + 1


def test_if_all_are_damaged_it_says_so_and_moves_nothing(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "manifest" / "metadata").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):  # The second attempt must not find an empty directory.
        checkpoints = Checkpoints(tmp_path / "checkpoints", **OPTIONS)
        with checkpoints, pytest.raises(CheckpointError, match=r"all checkpoints .* are damaged"):
            checkpoints.restore(small_state())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_best_is_reported_and_the_next_best_used(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").write_text("{")
    reports = []
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS, report=reports.append) as checkpoints:
        assert checkpoints.restore(small_state(), which="best")[0] == 1
    assert "step 1 used instead" in reports[0]


def test_read_only_changes_nothing(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # a live run's save
    (tmp_path / "checkpoints" / "2" / "manifest" / "metadata").write_text("{")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    reports = []
    options = OPTIONS | {"read_only": True, "report": reports.append}
    with Checkpoints(tmp_path / "checkpoints", **options) as checkpoints:
        step, state = checkpoints.restore(small_state())
        assert step == 1
        assert_same_bits(state, small_state(1))
        with pytest.raises(CheckpointError, match="read-only"):
            checkpoints.save(3, small_state())
    assert "left in place" in reports[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with Checkpoints(tmp_path / "nowhere", **options) as checkpoints:
        assert checkpoints.restore(small_state()) is None
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "_METADATA"),
        ValueError(
            "RESOURCE_EXHAUSTED: Error opening \"zarr\" driver [os_error_code='24'] [source "
            "locations='tensorstore/internal/os/file_util_posix.cc:336']"
        ),
        ValueError("PERMISSION_DENIED: Error opening [os_error_code='13']: Too many open files"),
        MemoryError("Too many open files"),
    ],
    ids=["python", "tensorstore", "permission", "memory"],
)
def test_what_a_machine_cannot_read_is_not_taken_for_damaged(
    error, two_saved, tmp_path, monkeypatch
):
    """Otherwise the newest would be put aside, and the run go on from an older one."""
    gathered = []
    gather = multihost_utils.process_allgather
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda x: gathered.append(x) or gather(x)
    )

    def fail(*args, **kwargs):
        raise error

    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
            message = r"checkpoints/2 failed: .*(Too many open files|denied).* Nothing was moved"
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(small_state())
        # Other processes learn of it, and end too.
        np.testing.assert_array_equal(gathered[-1], [True, True])
        step, state = checkpoints.restore(small_state())
    assert step == 2
    assert_same_bits(state, small_state(2))


@pytest.mark.parametrize("read_only", [False, True])
def test_a_folder_that_cannot_be_opened(read_only, tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.__init__", denied)
    advice = "Make it readable" if read_only else "Make room, or make it writable"
    message = rf"^opening {tmp_path} failed: .*Permission denied .*\. {advice}: the same command"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, **OPTIONS, read_only=read_only)


def test_orbax_does_not_count_steps_for_preemption(tmp_path, monkeypatch):
    """JAX remembers the last number only, and `Stop` asks it with numbers of its own."""
    asked = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append
    )
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        assert checkpoints.save(7, small_state())
        checkpoints.wait()
    assert asked == []


def test_close_frees_the_threads_after_a_failed_save(tmp_path, monkeypatch):
    closed = []
    close = Manager.close
    monkeypatch.setattr(Manager, "close", lambda manager: (close(manager), closed.append(manager)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", **OPTIONS)
    with file_limit(5000):
        checkpoints.save(2, small_state(2))
        with pytest.raises(CheckpointError, match="File too large"):
            checkpoints.close()
    assert len(closed) == 1


def test_a_failed_asynchronous_save_is_one_error_and_leaves_the_last_good_step(tmp_path, capfd):
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        with file_limit(5000):
            checkpoints.save(2, small_state(2))
            with pytest.raises(CheckpointError, match=r"File too large .*Make room"):
                checkpoints.wait()
    assert capfd.readouterr().err == ""
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        assert checkpoints.restore(small_state())[0] == 1
        assert checkpoints.save(2, small_state(2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_process_whose_save_failed_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """They would wait with it for orbax's timeout, 20 minutes."""
    waited = []
    barrier = lambda *, key, timeout_ms: waited.append(threading.current_thread().name)
    monkeypatch.setattr("orbax.checkpoint.multihost.get_barrier_sync_fn", lambda: barrier)
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1))
        checkpoints.wait()
        assert "save_finalize" in waited  # where a good save waits
        waited.clear()
        with file_limit(5000):
            checkpoints.save(2, small_state(2))
            with pytest.raises(CheckpointError, match=r"File too large .*Make room"):
                checkpoints.wait()
    assert set(waited) == {"MainThread"}  # at the beginning


def test_what_asyncio_tells_of_others_is_told(tmp_path, caplog):
    logger = logging.getLogger("asyncio")
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS):
        logger.error("Task exception was never retrieved\nfuture: <Task of /x/orbax/y.py:1>")
        logger.error("Future exception was never retrieved\nfuture: <in OCDBT database at /x>")
        assert not caplog.records
        logger.error("Task exception was never retrieved\nfuture: <Task of /x/mine.py:1>")
    assert "mine" in caplog.text
    caplog.clear()


KILLED = """
import sys, jax, jax.numpy as jnp
from revnet_jax.runs.checkpoint import Checkpoints
state = {"w": jax.random.normal(jax.random.key(0), (2000, 4000))}
with Checkpoints(sys.argv[1], best_metric=None, best_mode="max") as checkpoints:
    for step in range(1, 1000):
        checkpoints.save(step, {"w": state["w"] * step})
"""


def test_sigkill_during_a_save_leaves_the_one_before(tmp_path):
    directory = tmp_path / "checkpoints"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(directory)], env={**os.environ})
    deadline = time.monotonic() + 60
    while True:  # Stop it first: to kill it in the middle of a save, not just after one.
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        if (directory / "1").exists() and list(directory.glob("*.orbax-checkpoint-tmp/state*/*")):
            break
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = max(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    assert list(directory.glob("*.orbax-checkpoint-tmp"))  # killed in the middle of a save
    reports = []
    with Checkpoints(directory, **OPTIONS, report=reports.append) as checkpoints:
        step, state = checkpoints.restore({"w": jax.ShapeDtypeStruct((2000, 4000), jnp.float32)})
        assert step == newest
        expected = jax.random.normal(jax.random.key(0), (2000, 4000)) * float(step)
        assert_same_bits(state, {"w": expected})
        assert checkpoints.save(step + 2, state)  # not the step whose save was killed
    assert reports == []
    assert not list(directory.glob("*.orbax-checkpoint-tmp"))
