"""The benchmark: real steps, ratios within turns, limits found, tables and a plot. No speeds."""

import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from revnet_jax.benchmark import suites as benchmark_suites
from revnet_jax.benchmark.limits import find_limit
from revnet_jax.benchmark.models import ConfigModel, MlpChain, TransformerChain
from revnet_jax.benchmark.report import as_tables, draw_benchmark
from revnet_jax.benchmark.steps import Entrant, Setting, compare_strategies
from revnet_jax.benchmark.suites import Search, Suite, select, suites
from revnet_jax.config import language_model
from revnet_jax.errors import UserError
from revnet_jax.planning import gpus
from revnet_jax.planning.topology import parse_topology
from revnet_jax.planning.variants import Variant, parse_variant
from revnet_jax.training import compiler
from tests.nvidia import needs_compiler

MLP = MlpChain(width=16)
BASIC = ("store", "remat", "reverse")
MEASURED = (*BASIC, "reverse/lockstep")
ROOT = pathlib.Path(__file__).parents[2]


def quick_jit(function, **kwargs):
    """The package's `exact_jit`, but compiled quickly rather than well."""
    return compiler.exact_jit(function, quickly=True, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("revnet_jax.benchmark.models.exact_jit", quick_jit)
        yield


def run_benchmark(*flags):
    """(status, stdout, stderr)."""
    command = [sys.executable, "scripts/benchmark.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def rows():
    return list(
        compare_strategies(Setting(MLP, layers=4, batch=32, strategies=MEASURED, seconds=0.01))
    )


@pytest.mark.thorough
def test_every_strategy_is_measured_and_has_the_same_gradient(rows):
    assert [row["strategy"] for row in rows] == list(MEASURED)
    for row in rows:
        assert row["gradient_error"] == row.get("mismatches", 0) == 0
        assert ("mismatches" in row) == row["strategy"].startswith("reverse")
        assert row["step_ms"] > 0
        assert row["turns"] >= 3
        assert row["temporary_bytes"] < row["step_bytes"]
    assert rows[0]["time_vs_store"] == rows[0]["cpu_vs_store"] == rows[1]["time_vs_remat"] == 1
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.thorough
def test_operations_are_those_of_the_products(rows):
    """A branch has 2 products: 2 forward, 4 backward. remat repeats all but the last one of g."""
    product = 2 * 32 * 16 * 16
    assert [row["flops"] / (4 * product) for row in rows] == [12, 15, 16, 16]


@pytest.mark.thorough
def test_operations_fall_and_memory_rises_with_stored_layers():
    strategies = ("reverse", "reverse+2", "reverse+5")
    sizes = {"layers": 8, "batch": 64, "strategies": strategies}
    rows = list(compare_strategies(Setting(MLP, **sizes, seconds=0)))
    flops = [row["flops"] for row in rows]
    temporary = [row["temporary_bytes"] for row in rows]
    assert flops == sorted(flops, reverse=True)
    assert temporary == sorted(temporary)
    assert len(set(flops)) == len(set(temporary)) == len(rows)


@pytest.mark.parametrize("model", [MlpChain(), TransformerChain()])
def test_the_chains_are_those_that_are_described(model):
    """Abstractly: the sizes that the suite measures."""
    program = model.program("reverse", 2, 8)
    (params_L, *_), x = jax.eval_shape(program.init)
    assert {stream.shape for stream in x} == {model.stream_shape(8)}
    width = model.width
    per_layer = {"mlp": 4 * width * (width + 1), "transformer": 12 * width**2 + 9 * width}
    assert sum(leaf.size for leaf in jax.tree.leaves(params_L)) == 2 * per_layer[model.name]
    state, metrics = jax.eval_shape(program.step, *jax.eval_shape(program.init))
    assert set(metrics) == {"loss", "exact_mismatches"}
    assert jax.tree.structure(program.gradient(state)) == jax.tree.structure(params_L)


def test_attention_is_causal():
    model = TransformerChain(width=16, tokens=8, head_size=8)
    f = model.block().half_steps[0].branch
    params = model.init_layer(jax.random.key(0))[0]
    x_BTD = jax.random.normal(jax.random.key(1), model.stream_shape(1))
    branch = jax.jit(lambda x_BTD: f(params, x_BTD, None)[0])
    u, changed = branch(x_BTD), branch(x_BTD.at[:, 5:].set(0))
    assert (u[:, :5] == changed[:, :5]).all()
    assert (u[:, 5:] != changed[:, 5:]).any(axis=-1).all()


@pytest.mark.thorough
def test_the_network_is_the_one_that_is_trained(step_config):
    """Abstractly: its units are set, and momentum holds a gradient for every parameter."""
    model = ConfigModel(step_config)
    program = model.program("reverse", 4, 3)
    state, batch = jax.eval_shape(program.init)
    assert batch["image"].shape == (3, 8, 8, 1)
    new_state, metrics = jax.eval_shape(program.step, state, batch)
    assert set(metrics) == {"loss", "exact_mismatches"}
    sizes = lambda momenta: {
        name: [leaf.shape for leaf in jax.tree.leaves(tree)] for name, tree in momenta.items()
    }
    params = sizes(state.variables.params)
    assert sizes(program.gradient(new_state)) == params
    program = model.program("reverse/lockstep", 4, 3)
    assert sizes(program.gradient(jax.eval_shape(program.init)[0])) == params


@pytest.mark.thorough
def test_limits_are_within_the_memory_given_and_found_by_every_strategy():
    sizes = {"layers": 4, "batch": 256, "limit_bytes": 2 * 2**20}
    find = lambda strategy: find_limit(MLP, strategy, "layers", **sizes, most_compiled=3)
    store, reverse = find("store"), find("reverse")
    for row in (store, reverse):
        assert row["largest"] == row["layers"]
        assert row["largest"] % 4 == 0
        assert row["step_bytes"] <= row["limit_bytes"]
        assert row["examples_per_second"] > 0
        assert row["exact"] == ("or more" not in as_tables([row]))
    assert 4 <= store["largest"] < reverse["largest"]


def test_what_does_not_fit_at_all_has_the_limit_0():
    row = find_limit(MLP, "store", "batch", layers=4, batch=256, limit_bytes=1000)
    assert row["largest"] == row["batch"] == 0
    assert row["exact"]
    assert row["examples_per_second"] is None
    assert "|       0 |" in as_tables([row])


def test_limits_are_found_with_the_kernels_that_are_asked_for(monkeypatch, step_config):
    compiled = []

    class Compiled(Entrant):
        def compile(self, deterministic=False):
            compiled.append(deterministic)
            super().compile(deterministic)

    monkeypatch.setattr("revnet_jax.benchmark.limits.Entrant", Compiled)
    search = Search(MLP, "batch", layers=4, batch=256, strategies=("store",))
    suite = Suite((Setting(MLP, 4, 256, ("store",), seconds=0),), (search,))
    suite = select(suite, deterministic=True)
    (row,) = benchmark_suites.run_suite(suite._replace(settings=()), limit_bytes=1000)
    assert row["largest"] == 0
    assert set(compiled) == {True}
    assert not row["deterministic"]  # a CPU has no such kernels
    assert " yes |" in as_tables([{**row, "deterministic": True}])


def test_memory_is_of_the_device_that_steps_run_on(monkeypatch):
    """The first; the other has had a higher peak."""
    entrant = Entrant("store", MLP.program("store", 2, 4))
    entrant.compile()
    peak = lambda: 300 if entrant.metrics else 100  # after the first step, and before
    first = lambda: {"bytes_in_use": 60, "peak_bytes_in_use": peak()}
    second = lambda: {"bytes_in_use": 0, "peak_bytes_in_use": 1000}
    devices = [SimpleNamespace(memory_stats=stats) for stats in (first, second)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    entrant.start()
    assert entrant.device_bytes == 240


def test_tables_leave_out_what_was_not_measured(rows):
    table = as_tables(rows)
    assert "device, MiB" not in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split()[1] for line in lines[2:]] == ["mlp"] * 4
    store = dict(zip(lines[0].split("|"), lines[2].split("|"), strict=True))
    assert {name.strip(): cell.strip() for name, cell in store.items()}["flops / store"] == "1.000"


def test_the_plot_is_small(rows, tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    limit = {"model": "mlp", "dtype": "float32", "axis": "batch", "largest": 8}
    limit |= {"exact": True, "examples_per_second": 3.5}
    limits = [{**limit, "strategy": name} for name in BASIC]
    draw_benchmark(rows + limits, figure).savefig(tmp_path / "plot.png", dpi=100)
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 150_000


def test_suites_can_be_narrowed(step_config):
    both = suites(step_config, language_model())
    assert {setting.model.name for setting in both["laptop"].settings} == {
        "mlp",
        "wide_mlp",
        "transformer",
        "decoder",
        "revnet",
    }
    sizes = {"layers": [2, 4], "batch": [8], "seconds": 1.0, "strategies": ["store"]}
    chosen = select(both["gpu"], models=["mlp"], **sizes)
    assert [(setting.model.dtype, *setting[1:5]) for setting in chosen.settings] == [
        ("bfloat16", 2, 8, ("store",), 1.0),
        ("bfloat16", 4, 8, ("store",), 1.0),
        ("float32", 2, 8, ("store",), 1.0),
        ("float32", 4, 8, ("store",), 1.0),
        ("bfloat16", 2, 8, ("store",), 1.0),
        ("bfloat16", 4, 8, ("store",), 1.0),
    ]
    assert [setting.deterministic for setting in chosen.settings] == [True] * 4 + [False] * 2
    fastest = select(both["exact"], deterministic=False).settings
    assert len(fastest) == 8
    assert not any(setting.deterministic for setting in fastest)
    assert [search.strategies for search in chosen.searches] == [("store",)]
    assert chosen.minutes == both["gpu"].minutes == 5
    with pytest.raises(UserError, match="got model 'mpl', expected some of mlp, wide_mlp, "):
        select(both["laptop"], models=["mpl"])
    with pytest.raises(UserError, match=r"got strategy 'reverse\+8' for 4 layers"):
        select(both["laptop"], strategies=["store", "reverse+8"])
    with pytest.raises(UserError, match="got 5 layers, expected a multiple of the 2 stages"):
        ConfigModel(step_config).program("store", 5, 2)


def test_the_gpu_suite_asks_first_whether_gradients_are_exact(step_config):
    """In both dtypes, by deterministic kernels; then for time and memory."""
    settings = suites(step_config, language_model())["gpu"].settings
    named = [(s.model.name, s.model.dtype) for s in settings]
    models = ["mlp", "transformer", "decoder", "revnet"]
    halves, fulls = ([(name, d) for name in models] for d in ("bfloat16", "float32"))
    lm = ("lm_124m", "float32")  # as this test's config has it
    assert named == [*halves, *fulls, lm, lm, *halves]
    assert [setting.batch for setting in settings[8:10]] == [16, 64]
    assert {setting.strategies for setting in settings[:8]} == {("store", "reverse")}
    assert [setting.deterministic for setting in settings] == [True] * 8 + [False] * 6
    # In bfloat16 the sizes are the same, so that rows can be put side by side.
    assert [s[1:3] for s in settings[10:]] == [s[1:3] for s in settings[:4]]


def test_noise_is_of_two_runs_from_one_state(monkeypatch):
    """On a CPU there is none; a second step would have another gradient."""
    entrant = Entrant("store", MLP.program("store", 2, 4))
    entrant.compile()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    entrant.start()
    assert entrant.gradient_noise == 0
    assert np.linalg.norm(jax.tree.leaves(entrant.gradient)[0]) > 0


def test_the_twin_of_an_integrator_has_one_stream():
    config = language_model()
    config.model.update({"integrator": "bdia", "layers": 2})
    model = ConfigModel(config, "lm", "tokens")
    assert model.program("twin", 2, 2).step is not None


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_of_a_language_model_are_compared(optimizer):
    """In lockstep too, where each layer's state has its own moments."""
    config = language_model()
    sizes = {"data.context": 8, "model.width": 16, "model.heads": 2, "model.kv_heads": 1}
    config.update_from_flattened_dict({**sizes, "model.hidden": 16, "optimizer.name": optimizer})
    model = ConfigModel(config, "lm", "tokens")
    strategies = ("store", "reverse/unroll", "reverse/lockstep", "twin")
    rows = list(compare_strategies(Setting(model, 3, 2, strategies, seconds=0.01)))
    errors = [row.get("gradient_error") for row in rows]
    assert errors[0] == 0
    assert errors[3] is None
    assert max(errors[1:3]) < 1e-6


def test_what_no_longer_fits_is_skipped(capsys, monkeypatch):
    """By the pace so far: 12 seconds were expected of each, the first took 30."""
    now = [0.0]
    taken = {2: 30.0, 3: 1.0, 4: 1.0}

    def measure(setting):
        now[0] += taken[setting.layers]
        yield {"layers": setting.layers}

    monkeypatch.setattr(benchmark_suites, "compare_strategies", measure)
    monkeypatch.setattr(benchmark_suites.time, "monotonic", lambda: now[0])
    settings = [Setting(MLP, n, 8, ("store",), seconds=2) for n in (2, 3)]
    long = Setting(MLP, 4, 8, BASIC, seconds=2)
    last = Setting(MLP, 3, 8, ("store",), seconds=2)
    suite = Suite((settings[0], long, settings[1], last), minutes=1.5)
    measured = lambda **given: [row["layers"] for row in benchmark_suites.run_suite(suite, **given)]
    assert measured() == [2, 3, 3]
    assert capsys.readouterr().err.splitlines() == [
        "mlp in float32, 2 layers, batch 8: store (may take 12 s)",
        "skipped: mlp in float32, 4 layers, batch 8: store, remat, reverse "
        "(may take 80 s, 60 s left of --minutes)",
        "mlp in float32, 3 layers, batch 8: store (may take 30 s)",
        "mlp in float32, 3 layers, batch 8: store (may take 16 s)",
    ]
    assert measured(minutes=10) == [2, 4, 3, 3]
    assert measured(minutes=0.1) == []


def test_a_setting_that_fails_is_a_row_and_the_next_is_measured(capsys, monkeypatch):
    def measure(setting):
        if setting.layers == 2:
            raise NotImplementedError("Unsupported sequence length Q 65, KV 65.\nand more")
        yield {"layers": setting.layers}

    monkeypatch.setattr(benchmark_suites, "compare_strategies", measure)
    suite = Suite(tuple(Setting(MLP, n, 8, ("store",), seconds=0) for n in (2, 4)))
    failed, row = benchmark_suites.run_suite(suite)
    error = "NotImplementedError: Unsupported sequence length Q 65, KV 65."
    sizes = {"model": "mlp", "dtype": "float32", "layers": 2, "batch": 8}
    assert failed == sizes | {"error": error}
    assert row == {"layers": 4}
    assert f"failed: mlp in float32, 2 layers, batch 8: store: {error}" in capsys.readouterr().err


def test_sizes_that_a_later_model_cannot_have_do_not_lose_what_was_measured(step_config):
    good = Setting(MLP, 4, 8, ("store",), seconds=0)
    wrong = Setting(ConfigModel(step_config), 5, 8, ("store",), seconds=0)
    row, failed = benchmark_suites.run_suite(Suite((good, wrong)))
    assert row["layers"] == 4
    assert failed["error"].startswith("UserError: got 5 layers, expected a multiple of the 2")


def test_a_limit_without_a_search_is_a_mistake():
    suite = Suite((Setting(MLP, 4, 8, ("store",), seconds=0),))
    with pytest.raises(UserError, match="got limit_gib where no limit is searched, expected"):
        next(benchmark_suites.run_suite(suite, limit_bytes=2**30))


def test_mismatches_of_a_first_step_that_is_run_twice_count(monkeypatch):
    entrant = Entrant("reverse", MLP.program("reverse", 4, 8))
    entrant.compile()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    advance = Entrant._advance

    def advance_badly(self, steps=1):
        advance(self, steps)
        self.metrics = {"exact_mismatches": 3 if self.gradient is None else 4}

    monkeypatch.setattr(Entrant, "_advance", advance_badly)
    entrant.start()
    assert entrant.mismatches == 7


@pytest.mark.thorough
def test_the_gpu_suite_on_a_cpu(step_config):
    """Tiny sizes of it, in its order: no mismatches, and no error of the gradient."""
    suite = suites(step_config, language_model())["gpu"]
    suite = select(suite, models=["mlp"], layers=[2], batch=[4], seconds=0.01)
    small = [
        s._replace(
            model=MlpChain(width=16, dtype=s.model.dtype),
            strategies=[name for name in s.strategies if name != "offload"],  # no CPU has it
        )
        for s in suite.settings
    ]
    rows = list(benchmark_suites.run_suite(Suite(tuple(small))))
    assert [(row["dtype"], row["strategy"]) for row in rows][:5] == [
        ("bfloat16", "store"),
        ("bfloat16", "reverse"),
        ("float32", "store"),
        ("float32", "reverse"),
        ("bfloat16", "store"),
    ]
    rebuilt = [row for row in rows if row["strategy"] == "reverse"]
    assert [row["dtype"] for row in rebuilt] == ["bfloat16", "float32", "bfloat16"]
    assert {(row["mismatches"], row["gradient_error"]) for row in rebuilt} == {(0, 0.0)}
    assert "| bfloat16" in as_tables(rows)


def compiled_for_h100(first, last):
    """Programs of the suite's settings, and the errors of those that do not compile."""
    # As the script runs: jax.nn.dot_product_attention promotes dtypes.
    promotion = {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmark.compile_suite", str(first), str(last)],
        cwd=ROOT,
        env={**os.environ, **parse_topology("h100:1").environment, **promotion},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    return len(rows), {row["program"]: row["error"] for row in rows if row["error"]}


@needs_compiler
def test_the_gpu_suite_compiles_for_a_gpu():
    """Its decoder, the one with cuDNN's attention, in bfloat16."""
    assert compiled_for_h100(2, 3) == (2, {})


@pytest.mark.slow
@pytest.mark.skipif(not gpus.has_compiler(), reason="needs NVIDIA's compiler")
@pytest.mark.parametrize(
    ("first", "last", "num_programs"),
    [(0, 4, 8), (4, 8, 8), (8, 10, 10), (10, 12, 13), (12, 14, 7)],
)
def test_all_of_the_gpu_suite_compiles_for_a_gpu(first, last, num_programs):
    assert compiled_for_h100(first, last) == (num_programs, {})


@pytest.mark.parametrize(
    "name",
    [
        "revers",
        "reverse+",
        "reverse8",
        "store+1+1",
        "reverse/",
        "reverse/up",
        "reverse+\N{SUPERSCRIPT TWO}",
        "reverse+\N{ARABIC-INDIC DIGIT THREE}",
        "twin+1",
        "twin/lockstep",
    ],
)
def test_strategies_that_there_are_not(name):
    expected = "expected one of store, .*; or twin, with or without /unroll"
    with pytest.raises(UserError, match=expected):
        parse_variant(name, 8)


def test_no_more_layers_can_be_stored_than_there_are():
    assert parse_variant("reverse+8/lockstep", 8) == Variant("reverse", 8, lockstep=True)
    assert parse_variant("reverse+2/unroll", 8) == Variant("reverse", 2, unrolled=True)
    assert parse_variant("twin/unroll", 8) == Variant("store", unrolled=True, is_twin=True)
    for name in ("reverse", "remat/lockstep", "reverse+3/unroll", "twin"):
        assert parse_variant(name).name == name
    with pytest.raises(UserError, match=r"got strategy 'reverse\+9' for 8 layers, expected \+0"):
        parse_variant("reverse+9", 8)


@pytest.mark.thorough
def test_the_script_prints_json_lines():
    sizes = "--models=mlp", "--layers=2", "--batch=2", "--seconds=0.01"
    status, stdout, _ = run_benchmark(*sizes, "--strategies=store", "--json")
    (row,) = map(json.loads, stdout.splitlines())
    assert (status, row["layers"], row["batch"]) == (0, 2, 2)
    assert math.isfinite(row["step_ms"])
    assert row["command"].startswith("scripts/benchmark.py --models=mlp")


def test_the_script_says_what_is_wrong():
    status, stdout, stderr = run_benchmark("--layers=2,x")
    assert (status, stdout) == (1, "")
    assert stderr.strip() == "error: got --layers=2,x, expected numbers from 1 to 999,999"


@pytest.mark.thorough
def test_a_pipeline_next_to_its_step():
    status, stdout, _ = run_benchmark(
        "--config=configs/digits.py",
        "--config.batch_size=4",
        "--config.model.units=1,1",
        "--config.model.channels=4,4,8",
        "--seconds=0.1",
        "--json",
    )
    row = json.loads(stdout)
    assert status == 0
    assert row["unit"] == "examples"
    assert row["times_the_need"] == row["pipeline_per_second"] / row["step_per_second"] > 0
