"""What an installation without the clone holds: the library, its experiments and its programs."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from revnet_jax import __main__ as programs
from revnet_jax.config import experiments

ROOT = pathlib.Path(__file__).parents[1]


def test_every_folder_of_the_package_is_packed():
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "revnet_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(packed["packages"]) == names | {"revnet_jax.configs", "revnet_jax.scripts"}


def test_experiments_and_programs_by_name(monkeypatch, capsys):
    assert experiments.locate("digits") == str(ROOT / "configs" / "digits.py")
    assert experiments.locate("lm_1b:laptop") == f"{ROOT / 'configs' / 'lm_1b.py'}:laptop"
    for unchanged in ("digit", "configs/digits.py", "mine.py:arm"):
        assert experiments.locate(unchanged) == unchanged
    assert {"train", "evaluate", "plan", "benchmark"} < set(experiments.names("scripts"))
    monkeypatch.setattr(sys, "argv", ["revnet", "trian"])
    with pytest.raises(SystemExit, match="got program 'trian', expected one of benchmark, "):
        programs.main()
    monkeypatch.setattr(sys, "argv", ["revnet"])
    programs.main()
    assert "Experiments: cifar10_irevnet, " in capsys.readouterr().out


@pytest.mark.thorough
def test_a_wheel_trains_where_nothing_else_of_the_clone_is(tmp_path):
    """The dependencies alone are lent by the environment of this test."""
    clone, empty = tmp_path / "clone", tmp_path / "empty"
    for name in ("revnet_jax", "configs", "scripts"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    known = int(importlib.metadata.version("setuptools").partition(".")[0])
    isolation = ["--no-build-isolation"] if known >= 77 else []
    subprocess.run([*pip, "wheel", *isolation, "--no-deps", "-w", tmp_path, clone], check=True)
    shutil.rmtree(clone)
    (wheel,) = tmp_path.glob("*.whl")

    venv.create(empty, with_pip=False)
    (packages,) = empty.glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, wheel], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments):
        command = [empty / "bin" / "python", "-m", "revnet_jax", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    assert "Trains a model, or goes on with a run" in run("train", "--help").stdout
    steps = ["--config.num_steps=2", "--config.schedule.warmup_steps=0"]
    trained = run("train", "--config=digits", *steps, "--workdir=run")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 2
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["model"]["units"] == [2, 2]
    assert (
        "[console_scripts]\nrevnet = "
        in (next(packages.glob("revnet_jax-*.dist-info")) / "entry_points.txt").read_text()
    )
