"""Every test runs on two simulated CPU devices, with strict promotion of dtypes and ranks."""

import atexit
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap

import pytest

from tests.small_run import ROOT, TINY

# Before jax is imported, by whichever test comes first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    )
# Tests mostly compile. XLA's own passes are the same at this level, machine code is less optimised.
# .ci/run runs the core's tests, and those marked thorough, with XLA's default, 3.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    # By the older code generator, which jax 0.12 does not have any more, these programs compile in
    # two thirds of the time.
    if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.11.")):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
        os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# What one test (or a program that one starts) compiled, the others need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="revnet_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# A process may read half of a file that another writes into JAX's cache. JAX warns then, and
# compiles. This line is for the programs that tests start; pyproject.toml has the one for tests.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache entry")


def pytest_xdist_auto_num_workers():
    """One process more than there are cores, as some tests wait for programs that they start."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def tiny_config():
    from revnet_jax.config import image_classification

    config = image_classification()
    config.update_from_flattened_dict(TINY)
    return config


@pytest.fixture
def step_config():
    """A config for tests that compile its training step, and run none."""
    from revnet_jax.config import image_classification

    config = image_classification()
    config.update({"batch_size": 16, "model": {"units": (1, 3), "channels": (8, 8, 16)}})
    return config


@pytest.fixture
def start_program():
    """Starts `python scripts/NAME.py FLAGS...` from the root of the repository."""

    def start(name, *flags):
        return subprocess.Popen(
            [sys.executable, f"scripts/{name}.py", *flags],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_program(start_program):
    """Runs a program to its end: (status, stdout, stderr)."""

    def run(name, *flags):
        process = start_program(name, *flags)
        stdout, stderr = process.communicate(timeout=600)
        return process.returncode, stdout, stderr

    return run


@pytest.fixture
def tiny_flags():
    """TINY on the command line."""
    as_text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return ["--config=configs/digits.py"] + [
        f"--config.{key}={as_text(value)}" for key, value in TINY.items()
    ]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(text)` makes `mine`, a module with this text, and forgets the one before."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text):
        sys.modules.pop("mine", None)
        (tmp_path / "mine.py").write_text(textwrap.dedent(text))

    yield write
    sys.modules.pop("mine", None)
