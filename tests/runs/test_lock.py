"""Two runs in one folder: the second is refused, unless the first is gone."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from revnet_jax.config import ConfigError
from revnet_jax.runs.lock import file_lock

HOST = socket.gethostname()
HOLDER = """
import sys, time
from pathlib import Path
from revnet_jax.runs.lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def without_flock(monkeypatch):
    """As on NFS without its lock daemon."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def lines_of_taking(path):
    lines = []
    with file_lock(path, lines.append):
        assert json.loads(path.read_text())["process_id"] == os.getpid()
    assert path.read_text() == ""
    return lines


def test_a_second_run_is_refused_until_the_first_is_killed(path, holder):
    with pytest.raises(ConfigError) as caught, file_lock(path):
        pass
    line = str(caught.value)
    assert f"{path.parent} is in use by process {holder.pid} on host {HOST}" in line
    assert "\n" not in line
    assert json.loads(path.read_text())["process_id"] == holder.pid
    holder.send_signal(signal.SIGSTOP)  # paused is not gone
    with pytest.raises(ConfigError, match=f"process {holder.pid}"), file_lock(path):
        pass
    holder.kill()
    holder.wait()
    assert lines_of_taking(path) == []
    assert lines_of_taking(path) == []


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_process_that_is_there_keeps_its_lock(path, holder):
    with pytest.raises(ConfigError, match=rf"process {holder.pid} .*, or delete .*lock"):
        lines_of_taking(path)
    holder.kill()
    holder.wait()
    assert lines_of_taking(path) == []


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_number_that_another_process_has_now(path):
    with file_lock(path):
        held = json.loads(path.read_text())
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            lines_of_taking(path)
    path.write_text(json.dumps(held | {"start_ticks": 1}))
    assert lines_of_taking(path) == []


def test_of_another_host_a_line_says_whose_it_was(path):
    with file_lock(path):
        held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"host": "elsewhere", "process_id": 17}))
    (line,) = lines_of_taking(path)
    assert "last used by process 17 on host elsewhere" in line
    assert lines_of_taking(path) == []


@pytest.mark.parametrize("text", ["", "null", "5", '{"host"', "[" * 200_000, '{"host": 1}'])
def test_a_lock_file_of_anything_else(text, path):
    path.write_text(text)
    assert lines_of_taking(path) == []


def test_an_error_releases_the_lock(path):
    with pytest.raises(ZeroDivisionError), file_lock(path):
        raise ZeroDivisionError
    assert lines_of_taking(path) == []
