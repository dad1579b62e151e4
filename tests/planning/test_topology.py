"""Names of topologies, and the devices that they stand for."""

import importlib.util
import os
import subprocess
import sys

import pytest

from revnet_jax.planning.topology import TopologyError, _local_devices, parse_topology


def test_unknown_topologies(monkeypatch):
    with pytest.raises(TopologyError, match=r"got topology 'v5e:3x3', expected one of local; v4:"):
        parse_topology("v5e:3x3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"run scripts/setup\.sh tpu"):
        parse_topology("v5e:2x2")


def test_several_slices_are_a_topology(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if installed
    found = parse_topology("4xv5e:16x16")
    assert (found.chip, found.shape, found.slices) == ("v5e", "16x16", 4)
    assert parse_topology("v5p:16x16x24").slices == 1
    for wrong in ("0xv5e:16x16", "xv5e:2x2", "4xlocal", "2x2xv5e:2x2", "v5e", ":2x2"):
        with pytest.raises(
            TopologyError, match="or several such slices or hosts, as in 4xv5e:16x16"
        ):
            parse_topology(wrong)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
@pytest.mark.parametrize(
    ("name", "printed"), [("v5e:1x1", "1 TPU v5 lite 1"), ("2xv5e:2x4", "16 TPU v5 lite 2")]
)
def test_a_program_for_a_tpu_that_is_not_here(name, printed):
    code = (
        "import jax; from revnet_jax.planning.topology import parse_topology, topology_devices\n"
        f"found = topology_devices(parse_topology('{name}'))\n"
        "slices = {getattr(device, 'slice_index', None) for device in found}\n"
        "print(len(found), found[0].device_kind, len(slices))"
    )
    environment = parse_topology(name).environment
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split("\n")[0] == printed


def test_this_machine_is_asked_in_a_process_of_its_own(monkeypatch):
    _local_devices.cache_clear()
    assert parse_topology("local").num_devices == 2
    _local_devices.cache_clear()
    monkeypatch.setenv("JAX_PLATFORMS", "nothing")  # too late for this process
    with pytest.raises(TopologyError, match=r"JAX finds no device here: .*nothing"):
        _ = parse_topology("local").num_devices
