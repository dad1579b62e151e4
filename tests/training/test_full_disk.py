"""A run whose disk fills up ends with one line, and goes on to the same bits once there is room."""

import subprocess
import sys

import pytest

from tests.small_run import ROOT

# How large a file may grow in KiB, and what is said then.
FULL = {
    1: "error: cannot write {}/config.json: File too large (file system ",
    30: "error: saving to {}/checkpoints failed: File too large (file system ",
    "unlimited": "error: cannot write {}/tensorboard: ",  # where a file is in its place
}


@pytest.mark.thorough
def test_a_full_disk(run_program, tiny_flags, tmp_path):
    alone = tmp_path / "alone"
    assert run_program("train", *tiny_flags, f"--workdir={alone}")[0] == 0
    for kib, said in FULL.items():
        workdir = tmp_path / str(kib)
        workdir.mkdir()
        if kib == "unlimited":
            (workdir / "tensorboard").touch()
        program = f"{sys.executable} scripts/train.py {' '.join(tiny_flags)} --workdir={workdir}"
        command = ["bash", "-c", f"ulimit -f {kib}; exec {program}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1, done.stderr
        lines = done.stderr.splitlines()
        assert lines[-1].startswith(said.format(workdir)), done.stderr
        assert all(line.startswith("step ") for line in lines[:-1]), done.stderr

        if kib == "unlimited":
            (workdir / "tensorboard").unlink()
        status, _, stderr = run_program("train", *tiny_flags, f"--workdir={workdir}")
        assert status == 0, stderr
        assert (workdir / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
