"""How programs end: one line and a status, also where the fault is the operating system's."""

import io
import os
import re
import subprocess
import sys

import pytest

from revnet_jax import errors
from revnet_jax.errors import StorageError, UserError, file_system, write_all, writing
from revnet_jax.figures import load_figure_class, save

PROGRAM = """
from revnet_jax.config import cli

def main(argv):
    for _ in range(LINES):
        print("x" * 100)

cli.run(main, required=())
"""


def ended(stdout, program):
    """(status, stderr) of a program that prints there."""
    done = subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=subprocess.PIPE)
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize("lines", [3, 3000])  # in the buffer until the end, or not
def test_output_that_cannot_be_written_is_one_line(lines):
    program = PROGRAM.replace("LINES", str(lines))
    with open("/dev/full", "w") as full:
        status, stderr = ended(full, program)
    assert (status, stderr) == (
        1,
        "error: cannot write to standard output: [Errno 28] No space left on device\n",
    )
    reader, writer = os.pipe()
    os.close(reader)
    status, stderr = ended(writer, program)
    os.close(writer)
    assert (status, stderr) == (
        1,
        "error: cannot write to standard output: [Errno 32] Broken pipe\n",
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        ("errors.Preempted(3)", errors.PREEMPTED_STATUS, "preempted: saved step 3; "),
        ("KeyboardInterrupt", 1, "interrupted\n"),
    ],
)
def test_what_stops_a_program_sets_its_status(error, status, line):
    """Also where stderr cannot be written."""
    program = f"""
from revnet_jax import errors

with errors.exit_status():
    errors.tell("a note")
    raise {error}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith(f"a note\n{line}")
    if status != 1:
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", program], stderr=full)
        assert done.returncode == status


def test_other_errors_of_the_operating_system_lose_no_output():
    program = PROGRAM.replace("LINES", "1").replace("\n\ncli", "\n    open('/nowhere')\n\ncli")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "x" * 100 + "\n"
    assert done.stderr == "error: /nowhere: No such file or directory\n"


def test_writing_names_the_place_and_what_is_free_there(tmp_path):
    path = tmp_path / "no" / "such" / "folder"
    with pytest.raises(StorageError) as caught, writing(path):
        path.write_text("x")
    # What is free may change meanwhile.
    got = re.sub(r"[\d,]+\.\d MiB", "N MiB", str(caught.value))
    mount = file_system(tmp_path).partition(":")[0]
    assert got == (
        f"cannot write {path}: No such file or directory ({mount}: N MiB of N MiB free). Make "
        "room, or make it writable, and start the same command again"
    )
    with pytest.raises(ValueError, match="not of storage"), writing(path):
        raise ValueError("not of storage")


def test_file_systems():
    assert file_system("gs://bucket/run") == "remote storage"
    mount, _, figures = file_system("/proc/self/nowhere").partition(": ")
    assert mount == "file system /proc"
    assert figures.startswith("0.0 MiB of 0.0 MiB free")


def test_plots_are_refused_at_the_start_or_end_in_one_line(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "no" / "x.png", tmp_path / "x.pdf"):
        with pytest.raises(UserError, match=r"got --plot=.*, expected a .png file in a folder"):
            load_figure_class("plot", str(path))

    class Figure:
        def savefig(self, path, dpi):
            with open(path, "w") as file:
                file.write("x" * dpi)

    with pytest.raises(StorageError, match=r"cannot write /dev/full: No space left on device"):
        save(Figure(), "/dev/full")


def test_a_file_that_takes_less_at_a_time_gets_all():
    class Slow(io.BytesIO):
        def write(self, content):
            return super().write(content[:3])

    file = Slow()
    write_all(file, b"0123456789")
    assert file.getvalue() == b"0123456789"
