"""Tests that compile for NVIDIA GPUs which are not there: what marks them, and a process for them.

    from tests.nvidia import needs_compiler, run_for

    @needs_compiler
    def test_a_program(...):
        printed = run_for("h100:1", "print(len(targets))")

`pytest -m gpu_compiler` runs these alone.
"""

import os
import subprocess
import sys

import pytest

from revnet_jax.planning import gpus
from revnet_jax.planning.topology import parse_topology

_NEEDED = (
    pytest.mark.gpu_compiler,
    pytest.mark.skipif(
        not gpus.has_compiler(), reason="needs NVIDIA's compiler: scripts/setup.sh gpu_compiler"
    ),
)
_HEADER = """
from revnet_jax.planning.topology import parse_topology, topology_devices
targets = topology_devices(parse_topology({name!r}))
"""


def needs_compiler(test):
    """Marks a test, which is skipped where the extra `gpu_compiler` is not installed."""
    for mark in _NEEDED:
        test = mark(test)
    return test


def run_for(topology: str, code: str) -> str:
    """What a program prints that finds the devices of a topology in `targets`.

    A process of its own: compilers read their settings from the environment, once. Fails with what
    it wrote to stderr.
    """
    result = subprocess.run(
        [sys.executable, "-c", _HEADER.format(name=topology) + code],
        env={**os.environ, **parse_topology(topology).environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
