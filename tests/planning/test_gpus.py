"""GPUs that programs are compiled for and that are not there."""

import importlib.util
import json

import pytest

from revnet_jax.planning import gpus
from revnet_jax.planning.topology import TopologyError, parse_topology
from tests.nvidia import needs_compiler, run_for

ATTENTION = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(targets), ("data",))
place = lambda shape, *spec: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec))
)

def loss(kernel, x):
    q = (x @ kernel).reshape(*x.shape[:2], 2, 64)
    attended = jax.nn.dot_product_attention(q, q, q, is_causal=True, implementation="cudnn")
    return jnp.mean(attended.astype(jnp.float32))

x = place((len(targets), 1024, 128), "data")
traced = jax.jit(jax.grad(loss)).trace(place((128, 128)), x)
lowered = traced.lower()
compiled = lowered.compile()
text = compiled.as_text()
print(json.dumps({
    "devices": len(targets),
    "kind": targets[0].device_kind,
    "hosts": len({device.process_index for device in targets}),
    "same": lowered.as_text() == traced.lower(lowering_platforms=("cuda",)).as_text(),
    "cudnn": text.count("__cudnn$fmhaSoftmax"),
    "all_reduce": "all-reduce" in text,
    "peak": compiled.memory_analysis().peak_memory_in_bytes,
}))
"""


def test_topologies_of_gpus(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if installed
    found = parse_topology("4xh100:8")
    assert (found.chip, found.shape, found.slices) == ("h100", "8", 4)
    assert found.num_devices == 32
    assert found.is_gpu
    assert not parse_topology("v5e:2x2").is_gpu
    assert not parse_topology("local").is_gpu
    for wrong in ("h100:3", "h100", "h100:2x4", "0xh100:8", "h900:8"):
        with pytest.raises(TopologyError, match=r"h100:\{1, 2, 4, 8\}.* and 4xh100:8"):
            parse_topology(wrong)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"NVIDIA compiler.*run scripts/setup\.sh gpu_compiler"):
        parse_topology("h100:8")


def test_the_users_flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    flags = gpus.environment()["XLA_FLAGS"].split()
    assert flags == ["--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0"]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "kind", "hosts"),
    [
        ("h100:1", "NVIDIA H100 80GB HBM3", 1),
        ("2xh200:4", "NVIDIA H200", 2),
        ("a100:2", "NVIDIA A100-SXM4-80GB", 1),
        ("b200:1", "NVIDIA B200", 1),
    ],
)
def test_a_program_for_gpus_that_are_not_here(name, kind, hosts):
    """cuDNN's attention, forward and backward, without cuDNN; and a sum over the devices."""
    found = json.loads(run_for(name, ATTENTION))
    devices = parse_topology(name).num_devices
    peak = found.pop("peak")
    assert found == {
        "devices": devices,
        "kind": kind,
        "hosts": hosts,
        "same": True,
        "cudnn": 2,
        "all_reduce": devices > 1,
    }
    assert 1e6 < peak < 1e7
