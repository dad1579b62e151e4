"""Plans: from what compilers say to a table and a recommendation."""

import json
import pathlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor as pool

import jax
import pytest

import revnet_jax
from revnet_jax.config import flatten, language_model
from revnet_jax.errors import UserError
from revnet_jax.planning import compile as compile_steps
from revnet_jax.planning import worker
from revnet_jax.planning.compile import CompiledStep, Compiler, NotCompiled
from revnet_jax.planning.largest import Largest, largest_that_fits
from revnet_jax.planning.plan import plan, recommend
from revnet_jax.planning.report import plan_table
from revnet_jax.planning.topology import Topology, parse_topology
from revnet_jax.planning.units import size
from revnet_jax.planning.variants import variants
from revnet_jax.planning.worker import (
    FIGURES,
    _gradient_bytes,
    _kept,
    as_config,
    asked_bytes,
    measure_step,
    reading_code,
    tree_bytes,
)
from revnet_jax.training.program import step_program

GIB = 2**30
PACKAGE = pathlib.Path(revnet_jax.__file__).parent
LOCAL = parse_topology("local")
STEP = CompiledStep(
    num_devices=4,
    device_kind="TPU v5 lite",
    limit_bytes=16 * GIB,
    needed_bytes=9 * GIB,
    out_of_memory=False,
    argument_bytes=6 * GIB,
    traffic={
        "hbm_bytes": 819_000_000,
        "host_bytes": 0,
        "ici_bytes": {"all-gather": 100_000_000},
        "dcn_bytes": {},
    },
    parts=None,
    flops=4 * 197_000_000_000,
    weights_bytes=1 * GIB,
    gradient_bytes=1 * GIB,
    optimizer_bytes=2 * GIB,
    batch_bytes=0,
    compile_seconds=1.0,
    cached=False,
)


class FakeCompiler:
    """Says what it is told to, by strategy and batch size."""

    topology = LOCAL

    def __init__(self, say):
        self._say = say
        self.asked, self.lines = [], []
        self.report = self.lines.append

    def refusals(self, settings):
        return {}

    def steps(self, settings):
        self.asked += settings.values()
        return {name: self._say(each) for name, each in settings.items()}


def say(settings):
    """store does not fit; reverse does more arithmetic; remat cannot be compiled."""
    changes = {
        "store": {"needed_bytes": 22 * GIB, "out_of_memory": True}
        | {"argument_bytes": None, "traffic": None, "parts": None},
        "reverse": {"flops": 5 * 197_000_000_000},
    }
    if settings["model.backprop"] == "remat":
        return NotCompiled("the compiling process ended with status -6: Check failed")
    return CompiledStep(**{**vars(STEP), **changes[settings["model.backprop"]]})


def test_where_time_goes_is_said_of_gpus_alone(step_config):
    asked = lambda kind, parts: (
        lambda settings: CompiledStep(**{**vars(STEP), "device_kind": kind, "parts": parts})
    )
    of = lambda compiler: plan(flatten(step_config), compiler, strategies=["reverse"], by_part=True)
    local = FakeCompiler(asked("TPU v5 lite", None))
    assert of(local)["rows"][0]["parts"] is None  # the rest of the plan is not lost
    assert re.match("left out by_part for TPU v5 lite, expected a GPU", local.lines[-1])
    tpu = FakeCompiler(asked("TPU v5 lite", None))
    tpu.topology = Topology("v5e:2x2", "v5e", "2x2")
    with pytest.raises(UserError, match="got by_part for v5e:2x2, expected a GPU"):
        of(tpu)
    assert tpu.asked == []  # said before anything is compiled
    parts = [{"part": "all", "ms": 1.5, "flops": 2e9, "hbm_bytes": GIB, "kernels": 3}]
    parts[0]["slowest"] = {"dot": 1.25}
    report = of(FakeCompiler(asked("NVIDIA H100 80GB HBM3", parts)))
    assert report["rows"][0]["parts"] == parts
    assert "| all  | 1.50 |     2 | 1.00 GiB |       3 |            dot 1.25 |" in plan_table(
        report
    )


def test_kernels_that_only_a_gpu_can_name_are_left_out(step_config):
    step_config.deterministic = True
    compiler = FakeCompiler(say)
    plan(flatten(step_config), compiler, strategies=["reverse"])
    assert compiler.lines == []
    compiler.topology = Topology("h100:1", "h100", "1")
    plan(flatten(step_config), compiler, strategies=["reverse"])
    assert re.match("config.deterministic has no effect: XLA would", *compiler.lines)


def test_rows_say_what_fits_and_what_it_is_made_of(step_config):
    names = ["store", "remat", "reverse"]
    report = plan(flatten(step_config), FakeCompiler(say), strategies=names)
    store, remat, reverse = report["rows"]
    assert (store["fits"], reverse["fits"]) == (False, True)
    assert "status -6" in remat["error"]
    parts = [reverse[f"{name}_bytes"] for name in ("weights", "optimizer", "gradient")]
    assert parts == [2 * GIB, 4 * GIB, 2 * GIB]  # tiles pad arguments to twice their size
    assert reverse["activation_bytes"] == 1 * GIB
    assert store["activation_bytes"] == (22 - 1 - 2 - 1) * GIB
    assert reverse["least_ms"] == pytest.approx(1.25)
    assert reverse["in_turn_ms"] == pytest.approx(1.25 + 0.5)
    assert reverse["ici_bytes"] == {"all-gather": 100_000_000}
    assert reverse["utilization"] == pytest.approx(0.8)  # of 5 operations one is recomputed
    assert store["least_ms"] is None
    assert report["recommendation"]["strategy"] == "reverse"
    assert "; store would not fit" in report["recommendation"]["reason"]
    json.dumps(report)


def test_a_resnet_is_not_reversed(step_config):
    step_config.model.family = "resnet"
    assert not any(name.startswith("reverse") for name in variants(flatten(step_config)))


def test_variants_store_a_quarter_a_half_and_three_quarters_of_the_layers(step_config):
    """One of 4 units changes resolution, and is in no chain."""
    found = variants(flatten(step_config))
    assert [name for name in found if name.startswith("reverse")] == [
        "reverse",
        "reverse+1",
        "reverse+2",
        "reverse/lockstep",
        "reverse+1/lockstep",
        "reverse+2/lockstep",
    ]
    assert found["reverse+2/lockstep"] == {
        "model.backprop": "reverse",
        "model.stored_layers": 2,
        "optimizer.lockstep": True,
    }


def test_a_network_that_there_is_not(step_config):
    step_config.model.channels = (3, 3, 3)
    with pytest.raises(UserError, match=r"config\.model: got channels=\(3, 3, 3\)"):
        plan(flatten(step_config), FakeCompiler(say))


def test_of_equal_times_the_least_memory_is_taken():
    rows = [
        {"strategy": name, "error": None, "fits": True, "least_ms": 1.0, "flops": 1}
        | {"needed_bytes": needed}
        for name, needed in (("store", 9), ("remat", 8))
    ]
    found = recommend(rows, 10)
    assert found["strategy"] == "remat"
    assert found["reason"].startswith("fastest by roofline of those that fit: it needs")
    assert recommend(rows[:1], 10)["reason"].startswith("it fits: it needs")  # no race of one
    assert "of an unknown memory" in recommend(rows, None)["reason"]


def test_where_nothing_fits_the_least_demand_is_named():
    row = {"strategy": "store", "error": None, "fits": False, "needed_bytes": 22 * GIB}
    found = recommend([row, {**row, "strategy": "remat", "needed_bytes": None}], 16 * GIB)
    assert found["strategy"] is None
    assert "16.00 GiB (store asks for 22.00 GiB)" in found["reason"]


def test_settings_are_checked_once_before_anything_compiles(step_config, tmp_path, monkeypatch):
    """What no strategy can use is an error; strategies that cannot be are left out, in a line."""
    lines, compiled = [], []
    compiler = Compiler(LOCAL, tmp_path, lines.append)
    say = lambda _, settings: compiled.extend(settings) or dict.fromkeys(settings, STEP)
    monkeypatch.setattr(Compiler, "steps", say)
    step_config.optimizer.update({"clip": "global", "clip_norm": 1.0})
    names = ["store", "reverse", "offload", "store/lockstep", "reverse/lockstep"]
    report = plan(flatten(step_config), compiler, strategies=names)
    assert compiled == ["store", "reverse"]
    on_cpu, lockstep = lines
    assert on_cpu.startswith("left out offload: config.model.backprop: got offload on a CPU")
    assert lockstep.startswith("left out store/lockstep, reverse/lockstep: config.optimizer: got")
    assert lockstep.endswith("--config.optimizer.clip=layer")
    assert list(report["left_out"]) == ["offload", "store/lockstep", "reverse/lockstep"]
    with pytest.raises(UserError, match=r"batch_size: got 0, expected a whole number, 1 to"):
        plan(flatten(step_config) | {"batch_size": 0}, compiler)
    assert len(lines) == len(compiled) == 2


def test_a_strategy_there_is_not(step_config):
    with pytest.raises(UserError, match="got strategy 'revers', expected some of store, "):
        plan(flatten(step_config), FakeCompiler(say), strategies=["revers"])


def test_the_largest_sizes_are_searched(step_config):
    def say(settings):
        layers = sum(settings["model.units"])
        needed = (settings["batch_size"] + 10 * layers) * GIB // 64
        return CompiledStep(**{**vars(STEP), "needed_bytes": needed})

    compiler = FakeCompiler(say)
    (row,) = plan(flatten(step_config), compiler, strategies=["store"], largest=["batch", "depth"])[
        "rows"
    ]
    # 64 * 16 GiB in all: 4 layers take 40 of them, and a batch of 16 leaves 1,008.
    assert row["largest_batch"] == {"size": 984, "needed_bytes": 16 * GIB, "exact": True}
    assert row["largest_depth"]["size"] == 100
    assert row["largest_depth"]["exact"]
    assert len(compiler.asked) <= 9
    with pytest.raises(UserError, match="got largest='context', expected some of batch, depth"):
        plan(flatten(step_config), compiler, largest=["context"])


def test_batches_are_multiples_of_the_parts_that_a_mesh_splits_them_into():
    """4 devices, 2 of them along "tensor": 2 parts of a batch, each of 3 microbatches."""
    config = flatten(language_model())
    config |= {"mesh.tensor": 2, "batch_size": 18, "microbatches": 3}

    def say(settings):
        return CompiledStep(**{**vars(STEP), "needed_bytes": settings["batch_size"] * GIB // 2})

    (row,) = plan(config, FakeCompiler(say), strategies=["store"], largest=["batch"])["rows"]
    assert row["largest_batch"] == {"size": 30, "needed_bytes": 15 * GIB, "exact": True}


def test_a_search_starts_at_a_multiple_of_its_step():
    with pytest.raises(ValueError, match="got a start of 4, expected a multiple of the step, 8"):
        largest_that_fits(lambda n: n, 4, limit_bytes=3, step=8, most=64)


def test_the_largest_context_is_a_multiple_of_the_config_s():
    config = {**flatten(language_model()), "data.context": 100}

    def say(settings):
        return CompiledStep(**{**vars(STEP), "needed_bytes": settings["data.context"] * GIB // 64})

    report = plan(config, FakeCompiler(say), strategies=["reverse/lockstep"], largest=["context"])
    found = {"size": 1000, "needed_bytes": 1000 * GIB // 64, "exact": True}
    assert report["rows"][0]["largest_context"] == found
    assert "largest context |\n" in plan_table(report)
    assert " 1,000 |\n" in plan_table(report)


def test_a_size_that_cannot_be_compiled_ends_no_search():
    """As a context beyond learned positions, which the model refuses."""
    config = {**flatten(language_model()), "data.context": 100}

    def say(settings):
        if settings["data.context"] > 300:
            return NotCompiled("got too much")
        return CompiledStep(**{**vars(STEP), "needed_bytes": settings["data.context"] * GIB // 64})

    compiler = FakeCompiler(say)
    report = plan(config, compiler, strategies=["reverse/lockstep"], largest=["context"])
    # All up to 300 fit. After 100 and 200, a search of six sizes may end before it tries 300.
    assert 200 <= report["rows"][0]["largest_context"]["size"] <= 300
    line = "reverse/lockstep, data.context 1000 counts as too large: got too much"
    assert line in compiler.lines


@pytest.mark.parametrize("limit", [95, 1000, 1003, 123_456])
@pytest.mark.parametrize("silent", [False, True])
def test_affine_memory_is_solved_in_few_compilations(limit, silent):
    asked = []

    def needed(size):
        asked.append(size)
        bytes_ = 15 + 10 * size
        return None if silent and bytes_ > limit else bytes_

    found = largest_that_fits(needed, 4, limit_bytes=limit, step=4, most=10**6)
    assert found.size == (limit - 15) // 10 // 4 * 4
    assert found.exact
    assert len(set(asked)) == len(asked) <= 5


def test_a_refusal_that_rounds_to_what_there_is_does_not_fit(step_config):
    def say(settings):
        if settings["batch_size"] <= 64:
            return CompiledStep(**{**vars(STEP), "needed_bytes": settings["batch_size"] * GIB // 4})
        refused = {"needed_bytes": 16 * GIB, "out_of_memory": True, "traffic": None}
        return CompiledStep(**{**vars(STEP), **refused})

    (row,) = plan(
        flatten(step_config),
        FakeCompiler(say),
        strategies=["store"],
        largest=["batch", "depth"],
    )["rows"]
    assert row["largest_batch"] == {"size": 64, "needed_bytes": 16 * GIB, "exact": True}


def test_memory_may_fall_where_it_nears_the_limit():
    """As of lm_8b_32k on a TPU v5p, in units of 32,768 tokens and 1e9 bytes."""
    needed = {1: 48, 2: 55, 7: 87, 8: 93, 9: 91, 10: 95, 11: 112}
    found = largest_that_fits(lambda n: needed.get(n, 120), 1, limit_bytes=102, most=4096)
    assert found == Largest(10, 95, exact=True)


def test_what_never_fits_and_what_always_does():
    assert largest_that_fits(lambda n: 100, 1, limit_bytes=10, most=64).size is None
    assert largest_that_fits(lambda n: 5, 1, limit_bytes=10, most=64) == Largest(64, 5, False)


@pytest.mark.parametrize(
    ("message", "num_bytes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (16.50G) exceeds available HBM (15.75G).",
            16.5 * GIB,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.", GIB // 2),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_a_refusal_says_how_much_was_asked_for(message, num_bytes):
    assert asked_bytes(message) == num_bytes


def test_sizes_read_well():
    assert [size(n) for n in (2**40, 3 * GIB // 2, 2**20, 512)] == [
        "1024.00 GiB",
        "1.50 GiB",
        "1.0 MiB",
        "0.5 KiB",
    ]


@pytest.mark.thorough
def test_a_step_is_compiled_once(step_config, tmp_path, capsys):
    """In this process; what is said of memory is what the compiler says."""
    step_config.update_from_flattened_dict({"model.units": (1,), "model.channels": (2, 2)})
    step_config.model.backprop = "store"
    config = as_config(json.loads(json.dumps(flatten(step_config))))
    assert config == step_config
    first, again = (measure_step(config, LOCAL, tmp_path) for _ in range(2))
    assert (first["cached"], again["cached"]) == (False, True)
    assert {**first, "cached": True} == again
    # An answer that cannot be kept is one all the same.
    (tmp_path / "file").touch()
    third = measure_step(config, LOCAL, tmp_path / "file")
    assert {**third, "compile_seconds": first["compile_seconds"]} == first
    assert capsys.readouterr().err.startswith(f"note: cannot write {tmp_path / 'file'}/")
    step = CompiledStep(**first)
    assert step.num_devices == jax.device_count()
    assert step.fits
    assert step.needed_bytes > step.argument_bytes > step.weights_bytes + step.optimizer_bytes
    assert step.traffic["ici_bytes"]["all-reduce"] >= step.gradient_bytes


def test_figures_are_kept_until_the_code_that_reads_programs_changes(tmp_path):
    """`counts` is imported by `by_part` alone. Comments change nothing."""
    for name in ("planning", "programs", "training/compiler.py", "devices.py"):
        source, target = PACKAGE / name, tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    counts = tmp_path / "programs" / "counts.py"
    counts.write_text(f"# A comment.\n{counts.read_text()}")
    code = reading_code(PACKAGE)
    assert reading_code(tmp_path) == code
    counts.write_text(f"{counts.read_text()}\nANOTHER = 1\n")
    assert reading_code(tmp_path) != code


def test_gradients_that_exist_together_in_lockstep(step_config):
    """One layer's of a chain, and all others': the chain of 2 has two layers' in ordinary steps."""
    sizes = {}
    for lockstep in (False, True):
        step_config.optimizer.lockstep = lockstep
        program = step_program(step_config, jax.devices())
        sizes[lockstep] = _gradient_bytes(program, step_config)
    params = program.state.variables.params
    in_chains = {name: tree_bytes(params[name]) for name in program.task.network.stacked}
    assert sizes[False] == tree_bytes(params)
    chain_1, chain_2 = in_chains.values()  # of 1 and of 2 layers
    largest_layer = max(chain_1, chain_2 // 2)
    assert sizes[True] == tree_bytes(params) - chain_1 - chain_2 + largest_layer

    step_config.update_from_flattened_dict(
        {"optimizer.lockstep": False, "microbatches": 2, "model.param_dtype": "bfloat16"}
    )
    program = step_program(step_config, jax.devices())
    params = program.state.variables.params
    in_float32 = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert _gradient_bytes(program, step_config) == tree_bytes(params) + in_float32
    assert tree_bytes(params) < 0.6 * in_float32  # nearly all are in bfloat16


def test_out_of_memory_on_this_machine_is_not_kept(step_config, tmp_path, monkeypatch):
    """Another program may have held the memory of its GPU."""
    refused = {"out_of_memory": True, "needed_bytes": None, "compile_seconds": 1.0}
    refused |= {"argument_bytes": None, "traffic": None, "parts": None}
    monkeypatch.setattr(worker, "_compile", lambda *_: refused)
    assert measure_step(step_config, LOCAL, tmp_path)["out_of_memory"]
    assert list(tmp_path.iterdir()) == []


def test_without_a_limit_there_is_no_largest(step_config):
    known = lambda settings: CompiledStep(**{**vars(STEP), "limit_bytes": None})
    compiler = FakeCompiler(known)
    options = {"strategies": ["store"], "largest": ["batch"]}
    (row,) = plan(flatten(step_config), compiler, **options)["rows"]
    assert "largest_batch" not in row
    assert compiler.lines == [
        "left out the largest batch: TPU v5 lite does not report its memory: "
        "--config.memory_limit_gib says how much there is"
    ]


def test_settings_that_do_not_go_together_are_a_line(step_config, tmp_path):
    settings = flatten(step_config) | {"model.backprop": "backwards"}
    lines = []
    compiler = Compiler(LOCAL, tmp_path, lines.append)
    (step,) = compiler.steps({"wrong": settings}).values()
    assert step.error.startswith("config.model: got backprop='backwards', expected one of")
    assert lines[0].startswith("[1/1] wrong: config.model: got backprop='backwards'")


@pytest.mark.parametrize(("topology", "processes"), [("local", 1), ("v5e:2x2", 2)])
def test_a_tpu_is_opened_by_one_process_at_a_time(topology, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_steps, "has_tpu", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # as if libtpu were there
    made = []
    monkeypatch.setattr(compile_steps, "ThreadPoolExecutor", lambda n: made.append(n) or pool(n))
    compiler = Compiler(parse_topology(topology), tmp_path, print)
    assert compiler.steps({}) == {}
    assert made == [processes]


def worker_that_prints(monkeypatch, stdout, status=0):
    done = lambda command, **_: subprocess.CompletedProcess(command, status, stdout, "so it ended")
    monkeypatch.setattr(subprocess, "run", done)
    return Compiler(LOCAL, pathlib.Path(), lambda line: None)


@pytest.mark.parametrize(
    ("stdout", "status"),
    [("", 0), ("no JSON\n", 0), ("3\n", 0), ('{"step": {"num_dev', 0), ("{}\n", 0), ("{}\n", 1)],
)
def test_a_worker_without_an_answer_has_crashed(monkeypatch, stdout, status):
    compiler = worker_that_prints(monkeypatch, stdout, status)
    assert compiler.refusals({"store": {}}) == {}
    error = f"the compiling process ended with status {status}: so it ended"
    assert compiler.steps({"store": {}}) == {"store": NotCompiled(error)}


def test_libraries_may_print_around_an_answer(monkeypatch):
    answer = json.dumps({"refusals": {"store": "not here"}, "step": vars(STEP)})
    compiler = worker_that_prints(monkeypatch, f"a library\n{answer}\nbye\n\n")
    assert compiler.refusals({"store": {}}) == {"store": "not here"}
    assert compiler.steps({"store": {}}) == {"store": STEP}


def test_figures_that_cannot_be_read_are_not_in_the_cache(tmp_path):
    figures = dict.fromkeys(FIGURES, 1)
    for text in ("", "{}", "[]", '{"traffic": 1}', json.dumps(figures)[:-1], "[" * 200_000):
        (tmp_path / "kept.json").write_text(text)
        assert _kept(tmp_path / "kept.json") is None, text[:20]
    (tmp_path / "kept.json").write_text(json.dumps(figures))
    assert _kept(tmp_path / "kept.json") == figures
    assert _kept(tmp_path / "other.json") is None
    assert _kept(tmp_path / "kept.json" / "below") is None
    assert _kept(tmp_path) is None


def test_a_cache_that_cannot_be_made_does_not_end_a_plan(tmp_path, run_program):
    """What is said is the next mistake."""
    (tmp_path / "file").touch()
    flags = f"--cache_dir={tmp_path}/file/cache", "--topology=nowhere"
    status, stdout, stderr = run_program("plan", "--config=configs/digits.py", *flags)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: got topology 'nowhere', expected one of")
