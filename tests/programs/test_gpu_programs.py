"""What NVIDIA's compiler makes of programs whose memory and traffic are known by hand."""

import json
import runpy
import subprocess
import sys

import pytest

from revnet_jax.config import flatten, language_model
from revnet_jax.planning.compile import Compiler
from revnet_jax.planning.plan import plan
from revnet_jax.planning.report import plan_table
from revnet_jax.planning.topology import parse_topology
from tests.nvidia import needs_compiler, run_for

MIB = 2**20
HOSTS_OF_TWO = "2xh100:2"
PROGRAMS = """
import json
import os
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from revnet_jax.programs.traffic import traffic

hosts = [device.process_index for device in targets]
mesh = Mesh(np.array(targets).reshape(2, 2), ("host", "gpu"))
one = Mesh(np.array(targets[:1]), ("x",))
everywhere, found = P(("host", "gpu")), {}

def of(*shape, dtype=jnp.float32, on=one, spec=P()):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(on, spec))

def compiled(name, function, *args, donate=(), **options):
    program = jax.jit(function, donate_argnums=donate).lower(*args).compile(options or None)
    found[name] = traffic(program.as_text(), hosts)._asdict()

half = jnp.bfloat16
product = of(4096, 1024, dtype=half), of(1024, 2048, dtype=half)
compiled("product by Triton", jnp.matmul, *product)
compiled("product by cuBLAS", jnp.matmul, *product, xla_gpu_enable_triton_gemm=False)
convolve = lambda x, w: lax.conv_general_dilated(
    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC")
)
convolved = of(8, 56, 56, 64, dtype=half), of(64, 3, 3, 64, dtype=half)
compiled("convolution by cuDNN", convolve, *convolved)
table, rows = of(50_000, 1024), of(512, dtype=jnp.int32)
compiled("rows read", lambda table, i: table[i], table, rows)
add = lambda table, i, u: table.at[i].add(u)
compiled("rows changed", add, table, rows, of(512, 1024), donate=0)
run = lambda w, x: lax.scan(lambda x, w: (x * w, None), x, w)[0]
compiled("loop", run, of(10, 1024, 1024), of(1024, 1024))

def sharded(name, function, takes, gives):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)
    compiled(name, mapped, of(4096, 1024, on=mesh, spec=takes))

for axes in ("gpu", "host", ("host", "gpu")):
    name = axes if isinstance(axes, str) else "all"
    gathered = {"gpu": P("host"), "host": P("gpu")}.get(name, P())
    sharded(f"gather {name}", lambda x: lax.all_gather(x, axes, tiled=True), everywhere, gathered)
    scattered = P(axes)
    sharded(f"scatter {name}", lambda x: lax.psum_scatter(x, axes, tiled=True), P(), scattered)
    sharded(f"sum {name}", lambda x: lax.psum(x, axes), everywhere, gathered)
    sharded(f"exchange {name}", lambda x: lax.all_to_all(x, axes, 0, 0, tiled=True), everywhere, everywhere)
swap = lambda x: lax.ppermute(x, "host", [(0, 1), (1, 0)])
sharded("permute", swap, everywhere, everywhere)
print(json.dumps(found))
"""  # noqa: E501
# Bytes through memory.
MOVED = {
    "product by Triton": 8 * MIB + 4 * MIB + 16 * MIB,
    "product by cuBLAS": 8 * MIB + 4 * MIB + 16 * MIB,  # and no workspace of 32 MiB
    "convolution by cuDNN": 2 * (2 * 8 * 56 * 56 * 64 + 64 * 3 * 3 * 64),
    "rows read": 2 * 512 * 4096 + 512 * 4,
    "rows changed": 3 * 512 * 4096 + 512 * 4,  # the rows read and written, and what is added
    "loop": 10 * 3 * 4 * MIB,
    "gather gpu": (4 + 8) * MIB,
    "scatter all": (16 + 4) * MIB,
}
# MiB sent to the GPU of the same host, and to another host. 16 MiB in all, 4 on each of 4 GPUs.
SENT = {
    "gather gpu": (4, 0),
    "gather host": (0, 4),
    "gather all": (8, 4),
    "scatter gpu": (8, 0),
    "scatter host": (0, 8),
    "scatter all": (8, 4),
    "sum gpu": (4, 0),
    "sum host": (0, 4),
    "sum all": (4, 2),
    "exchange gpu": (2, 0),
    "exchange host": (0, 2),
    "exchange all": (1, 2),
    "permute": (0, 4),
}


@pytest.fixture(scope="module")
def programs():
    return json.loads(run_for(HOSTS_OF_TWO, PROGRAMS).splitlines()[-1])


@needs_compiler
def test_bytes_are_those_worked_out_by_hand(programs):
    moved = {name: programs[name]["hbm_bytes"] for name in MOVED}
    # Counters of loops are a few bytes, and what a loop starts from is copied once.
    assert moved.pop("loop") == pytest.approx(MOVED["loop"], rel=0.07)
    assert moved == {name: n for name, n in MOVED.items() if name != "loop"}
    sent = {
        name: tuple(
            sum(programs[name][network].values()) / MIB for network in ("ici_bytes", "dcn_bytes")
        )
        for name in SENT
    }
    assert sent == SENT


OFFLOADED = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from revnet_jax.core import chain, reversible_block
from revnet_jax.programs.traffic import traffic

def loss(params_L, x):
    branch = lambda params, x, context: jnp.tanh(x @ params)
    y, _ = chain(reversible_block(branch, branch), params_L, x, backprop="offload")
    return jnp.sum(y[0] * y[1])

on = SingleDeviceSharding(targets[0])
of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on)
args = (of(8, 1024, 1024),) * 2, (of(4096, 1024),) * 2
compiled = jax.jit(jax.grad(loss)).lower(*args).compile()
print(traffic(compiled.as_text()).host_bytes)
"""


@needs_compiler
def test_streams_go_to_the_hosts_memory_and_come_back():
    streams = 8 * 2 * 16 * MIB
    assert int(run_for("h100:1", OFFLOADED)) == 2 * streams


@needs_compiler
def test_a_plan_for_hosts_of_gpus(tmp_path):
    config = language_model()
    config.update_from_flattened_dict(
        {
            "batch_size": 8,
            "eval_batch_size": 8,
            "data.context": 256,
            "mesh.data": 2,
            "mesh.fsdp": 2,
            "model.layers": 6,
            "model.width": 256,
            "model.heads": 4,
            "model.kv_heads": 4,
            "model.compute_dtype": "bfloat16",
        }
    )
    compiler = Compiler(parse_topology(HOSTS_OF_TWO), tmp_path, lambda line: None)
    report = plan(flatten(config), compiler, strategies=["store", "reverse"])
    store, reverse = report["rows"]
    assert [store["error"], reverse["error"]] == [None, None]
    assert report["devices"] == 4
    assert report["limit_bytes"] == int(0.75 * 84_942_979_072)
    assert reverse["activation_bytes"] < 0.6 * store["activation_bytes"]
    # Weights are gathered within a host, and gradients summed between hosts.
    assert "all-gather" in reverse["ici_bytes"]
    assert "all-reduce" in reverse["dcn_bytes"]
    assert "all-gather" not in reverse["dcn_bytes"]
    assert 0 < reverse["least_ms"] <= reverse["in_turn_ms"] < 100
    table = plan_table(report)
    assert "NVIDIA H100 80GB HBM3, 59.33 GiB each" in table
    assert "by NVLink" in table
    assert "between hosts" in table


@needs_compiler
@pytest.mark.parametrize(
    ("backprop", "unroll", "keep_operands", "most_ms", "most_gib"),
    [
        ("store", 12, False, 36, 6.5),
        ("store", 12, True, 34.5, 7.8),
        ("reverse", 1, False, 45.3, 2.65),
        ("reverse", 1, True, 43.4, 2.65),
        ("reverse", 12, False, 44.4, 2.9),
        ("reverse", 12, True, 42.4, 2.9),
    ],
)
def test_a_step_of_lm_124m_is_predicted_to_take(
    tmp_path, backprop, unroll, keep_operands, most_ms, most_gib
):
    """Kernels of the second took 44.5 ms on an H200 (66 once, 29 of them in the head).

    Without a loop, and without a barrier between its layers, the third would need 3.04 GiB.
    """
    config = runpy.run_path("configs/lm_124m.py")["get_config"]()
    changes = {"batch_size": 16, "eval_batch_size": 16, "model.unroll": unroll}
    config.update_from_flattened_dict({**changes, "model.keep_operands": keep_operands})
    compiler = Compiler(parse_topology("h200:1"), tmp_path, lambda line: None)
    report = plan(flatten(config), compiler, strategies=[backprop], by_part=True)
    (row,) = report["rows"]
    assert row["needed_bytes"] < most_gib * 2**30
    ms = {part["part"]: part["ms"] for part in row["parts"]}
    assert ms["all"] < most_ms
    assert ms["head"] < 10
    assert "| head " in plan_table(report)


@needs_compiler
def test_eight_billion_parameters_at_131072_tokens_fit_into_80_gb(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    config = runpy.run_path("configs/lm_8b_32k.py")["get_config"]()
    changes = {"batch_size": 1, "eval_batch_size": 1, "data.context": 131_072, "mesh.fsdp": 1}
    config.update_from_flattened_dict({**changes, "optimizer.state_dtype": "bfloat16"})
    compiler = Compiler(parse_topology("h100:1"), tmp_path, lambda line: None)
    (row,) = plan(flatten(config), compiler, strategies=["reverse/lockstep"])["rows"]
    assert row["fits"]
    assert row["needed_bytes"] < 65 * 2**30


SEQUENCES = """
import json
from revnet_jax.config import language_model
from revnet_jax.programs.traffic import traffic
from revnet_jax.programs.hlo import parse
from revnet_jax.training.program import step_program

config = language_model()
sizes = {"model.layers": 3, "model.width": 1024, "model.heads": 8, "model.hidden": 2048}
config.update_from_flattened_dict({**sizes, "data.context": 16384, "mesh.sequence": 8})
config.update_from_flattened_dict({"batch_size": 1, "eval_batch_size": 1})
config.model.compute_dtype = "bfloat16"
program = step_program(config, targets)
compiled = program.step.trace(program.state, program.batch).lower().compile()
text = compiled.as_text()
computations = parse(text).computations.values()
instructions = [i for c in computations for i in c.instructions.values()]
gathers = [i for i in instructions if i.opcode.startswith("all-gather")]
gathered = [(a.dtype, a.dims) for i in gathers for a in i.result]
largest = max(a.num_bytes for i in instructions for a in i.result)
print(json.dumps([largest, gathered, traffic(text).ici_bytes]))
"""


@needs_compiler
def test_a_sequence_in_parts_on_eight_gpus():
    """Nobody has all scores, nor all of a stream; weights are gathered in 16 bits."""
    largest, gathered, sent = json.loads(run_for("h100:8", SEQUENCES).splitlines()[-1])
    T, D = 16_384, 1024
    assert largest < 4 * T * D < T * T
    of_layers = [dtype for dtype, dims in gathered if dims in ([D, 2, 2048], [2048, D], [D, D])]
    assert set(of_layers) == {"bf16"}
    assert not any(T in dims for _, dims in gathered)
    # Queries, keys, values and what is read, of 16 bits: forward, in the rewind, as cotangents.
    assert sent["all-to-all"] == 3 * 3 * 4 * (T // 8) * D * 2 * 7 // 8


def run_timeline(*flags):
    command = [sys.executable, "scripts/timeline.py", "--config=configs/digits.py", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@needs_compiler
def test_a_timeline_of_a_gpu(tmp_path):
    pytest.importorskip("matplotlib")
    out = f"--out={tmp_path}/plot.png"
    result = run_timeline("--topology=h100:1", "--strategies=store,reverse", "--json", out)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "NVIDIA H100" in report["title"]
    store, reverse = report["timelines"]
    assert reverse["peak_bytes"] < store["peak_bytes"] / 2
    for line in (store, reverse):
        # Of 9 MB under reverse, half a MB lies unused between buffers.
        assert line["peak_bytes"] == pytest.approx(line["compiled_bytes"], rel=0.1)
        assert line["peak_bytes"] <= line["compiled_bytes"]


@needs_compiler
def test_a_timeline_of_several_devices_is_refused(tmp_path):
    result = run_timeline("--topology=h100:8", f"--out={tmp_path}/plot.png")
    assert result.returncode == 1
    expected = "error: got topology 'h100:8', expected local or one GPU, as h100:1"
    assert result.stderr.strip() == expected
