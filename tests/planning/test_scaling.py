"""The same work per device on more and more devices."""

import dataclasses
import json

import pytest

from revnet_jax.config import flatten, language_model
from revnet_jax.errors import UserError
from revnet_jax.planning import scaling
from revnet_jax.planning.compile import CompiledStep, NotCompiled
from revnet_jax.planning.topology import Topology

GIB = 2**30


class FakeCompiler:
    """Says what it is told to, by number of devices; keeps what it was asked."""

    def __init__(self, topology, say):
        self.topology, self._say, self.asked = topology, say, []

    def report(self, line):
        pass

    def refusals(self, settings):
        return {}

    def steps(self, settings):
        self.asked += settings.values()
        return {name: self._say(self.topology, each) for name, each in settings.items()}


def say(topology, settings):
    """A second of arithmetic; half of one to send within a slice, a second more between slices."""
    n = topology.num_devices
    return CompiledStep(
        num_devices=n,
        device_kind="NVIDIA H100 80GB HBM3" if topology.is_gpu else "TPU v5 lite",
        limit_bytes=16 * GIB,
        needed_bytes=9 * GIB,
        out_of_memory=False,
        argument_bytes=6 * GIB,
        traffic={
            "hbm_bytes": 0,
            "host_bytes": 0,
            "ici_bytes": {"all-gather": 100_000_000_000},
            "dcn_bytes": {"all-reduce": 3_125_000_000} if topology.slices > 1 else {},
        },
        parts=None,
        flops=n * 197_000_000_000_000,
        weights_bytes=1 * GIB,
        gradient_bytes=1 * GIB,
        optimizer_bytes=2 * GIB,
        batch_bytes=0,
        compile_seconds=1.0,
        cached=False,
    )


def compilers(*topologies, say=say):
    return [FakeCompiler(topology, say) for topology in topologies]


SMALL = Topology("v5e:2x4", "v5e", "2x4")
LARGE = Topology("2xv5e:4x4", "v5e", "4x4", 2)


@pytest.fixture
def config():
    config = language_model()
    config.batch_size = 24
    config.mesh.update({"data": 1, "fsdp": -1})
    return flatten(config)


def test_devices_are_counted_as_jax_does():
    assert [SMALL.num_devices, LARGE.num_devices] == [8, 32]
    assert Topology("tpu7x:2x2x1", "tpu7x", "2x2x1").num_devices == 8
    assert Topology("v4:2x2x1", "v4", "2x2x1").num_devices == 4


def test_the_batch_grows_with_the_devices_and_data_with_the_slices(config):
    asked = compilers(SMALL, LARGE)
    report = scaling.scaling(config, asked, strategies=None)
    assert report["strategy"] == "reverse/lockstep"
    small, large = (compiler.asked[0] for compiler in asked)
    assert (small["batch_size"], small["mesh.data"]) == (24, 1)
    assert (large["batch_size"], large["eval_batch_size"], large["mesh.data"]) == (96, 96, 2)
    assert large["optimizer.lockstep"]
    assert large["mesh.fsdp"] == -1


def test_efficiency_is_of_throughput_a_device(config):
    report = scaling.scaling(config, compilers(SMALL, LARGE), strategies=["remat"])
    small, large = report["rows"]
    assert (small["efficiency"], small["in_turn_efficiency"]) == (1, 1)
    assert large["least_ms"] == pytest.approx(1000)
    assert large["efficiency"] == pytest.approx(1)
    assert large["in_turn_efficiency"] == pytest.approx(1.5 / 2.5)
    json.dumps(report)
    table = scaling.scaling_table(report).splitlines()
    assert table[0] == "remat, 3 examples a device"
    assert "all-gather | all-reduce by DCN" in table[2]
    cells = [cell.strip() for cell in table[5].split("|")]
    assert cells[1:6] == ["2xv5e:4x4", "32", "96", "yes", "9.00 GiB"]
    assert cells[-5:-1] == ["1,000", "2,500", "100.0", "60.0"]


def test_hosts_of_gpus_are_slices(config):
    asked = compilers(Topology("h100:8", "h100", "8"), Topology("4xh100:8", "h100", "8", 4))
    report = scaling.scaling(config, asked, strategies=None)
    assert [row["devices"] for row in report["rows"]] == [8, 32]
    assert asked[1].asked[0]["mesh.data"] == 4
    assert "all-gather | all-reduce between hosts" in scaling.scaling_table(report)


def test_networks_are_named_after_the_devices(config):
    """Not after the first topology, which may be this machine."""

    def on_gpus(topology, settings):
        return dataclasses.replace(say(topology, settings), device_kind="NVIDIA H100 80GB HBM3")

    class Local(Topology):
        num_devices = 8

    topologies = Local("local", None, ""), Topology("4xh100:8", "h100", "8", 4)
    report = scaling.scaling(config, compilers(*topologies, say=on_gpus), strategies=["remat"])
    assert "| all-reduce between hosts |" in scaling.scaling_table(report)


def test_a_topology_that_cannot_be_compiled_for_is_a_row(config):
    def some(topology, settings):
        return NotCompiled("a crash") if topology is LARGE else say(topology, settings)

    report = scaling.scaling(config, compilers(SMALL, LARGE, say=some), strategies=None)
    assert report["rows"][1]["error"] == "a crash"
    assert "2xv5e:4x4: a crash" in scaling.scaling_table(report)
    with pytest.raises(UserError, match="a crash"):
        scaling.scaling(config | {"batch_size": 32}, compilers(LARGE, say=some), strategies=None)


def test_a_batch_that_the_first_topology_cannot_split(config):
    expected = "got 24, expected a multiple of the 32 devices of 2xv5e:4x4"
    with pytest.raises(UserError, match=expected):
        scaling.scaling(config, compilers(LARGE), strategies=None)
    with pytest.raises(UserError, match="expected one of them with --scaling"):
        scaling.scaling(config, compilers(SMALL), strategies=["remat", "reverse"])


def test_a_plot_has_a_line_for_each_time(config):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    report = scaling.scaling(config, compilers(SMALL, LARGE), strategies=None)
    memory, time = scaling.draw_scaling(report, figure_class).axes
    assert [len(axis.lines) for axis in (memory, time)] == [2, 2]
    assert list(time.lines[1].get_ydata()) == [1500, 2500]
