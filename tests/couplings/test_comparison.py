"""The comparison of couplings: equal parameters, exact training, a table and JSON."""

import json

import jax
import jax.numpy as jnp
import pytest

from revnet_jax.couplings.comparison import compare_couplings, parameter_spread
from revnet_jax.couplings.network import CouplingNetwork
from revnet_jax.couplings.rows import ROWS
from revnet_jax.errors import UserError
from scripts.compare_couplings import PARAMETER_TOLERANCE, as_table, draw

TINY = {"channels": 6, "hidden": 12, "num_branches": 6, "batch_size": 8}
SHAPE = {"image_shape": (8, 8, 1), "num_classes": 10}


def quick_jit(function, **kwargs):
    """The package's `exact_jit`, but compiled quickly rather than well."""
    options = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options, **kwargs)


def num_params(name, sizes):
    params = jax.eval_shape(CouplingNetwork(name, **sizes, **SHAPE).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("channels", "hidden"), [(18, 18), (24, 24), (48, 48)])
def test_all_rows_have_the_same_parameters(channels, hidden):
    sizes = {"channels": channels, "hidden": hidden, "num_branches": 12}
    rows = [{"num_params": num_params(name, sizes)} for name in ROWS]
    assert parameter_spread(rows) < PARAMETER_TOLERANCE


def test_residues_are_those_of_the_couplings():
    sizes = {"channels": 18, "hidden": 18, "num_branches": 12}
    bits = {name: CouplingNetwork(name, **sizes, **SHAPE).residue_bits() for name in ROWS}
    assert bits.pop("residual") is None
    assert bits == {name: {"affine": 1, "bdia": 1, "momentum": 0.5}.get(name, 0) for name in bits}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_maps_images_to_logits(name):
    """Abstractly, under its own strategy, in training and in evaluation."""
    sizes = {"channels": 6, "hidden": 12, "num_branches": 6}
    network = CouplingNetwork(name, **sizes, **SHAPE)
    key, image = jax.random.key(0), jnp.zeros((4, 8, 8, 1))

    def both(key, image):
        params = network.init(key)
        trained = network.apply(params, image, backprop=network.train_backprop, key=key)
        return trained, network.apply(params, image, backprop="store")

    assert [logits.shape for logits in jax.eval_shape(both, key, image)] == [(4, 10)] * 2


@pytest.mark.thorough
def test_rows_train_exactly_and_print_as_a_table_and_as_json(monkeypatch):
    monkeypatch.setattr("revnet_jax.couplings.comparison.exact_jit", quick_jit)
    report = compare_couplings(["bdia", "residual"], seeds=1, num_steps=2, **TINY)
    bdia, residual = report["rows"]
    assert bdia["mismatches"] == 0
    assert residual["mismatches"] is residual["temporary_bytes"]["reverse"] is None
    assert bdia["max_abs"] > 0
    assert bdia["temporary_bytes"]["reverse"] < bdia["temporary_bytes"]["store"]
    assert all(row["median_step_ms"] > 0 for row in report["rows"])
    assert json.loads(json.dumps(report)) == report
    table = [line.split() for line in as_table(report).splitlines() if line.startswith("| ")]
    assert [line[1] for line in table] == ["coupling", "---", "bdia", "residual"]
    assert "+-" not in table[2]  # a single seed has no deviation


def test_the_plot_is_small(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure
    memory = {"reverse": 2**20, "store": 2**22}
    row = {"coupling": "additive", "accuracies": [0.9, 0.8], "accuracy_mean": 0.85}
    baseline = {"coupling": "residual", "temporary_bytes": {**memory, "reverse": None}}
    rows = [{**row, "temporary_bytes": memory}, {**row, **baseline}]
    drawn = draw({"rows": rows, "data": "digits", "batch_size": 50}, figure)
    drawn.savefig(tmp_path / "plot.png", dpi=100)
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("names", "arguments", "message"),
    [
        (["aditive"], {}, "did you mean additive?"),
        ([], {}, "got no couplings, expected some of additive"),
        (["additive"], {"data": "mnist"}, "got data 'mnist', expected one of digits, cifar10"),
        (["additive"], {"data": "cifar10"}, "got no dir for cifar10"),
        (["additive"], {"dir": "somewhere"}, "expected None"),
    ],
)
def test_what_cannot_be_compared_is_one_line(names, arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        compare_couplings(names, **arguments)
    assert "\n" not in str(error.value)


def test_the_script_says_what_is_wrong_before_it_trains(run_program):
    status, stdout, stderr = run_program("compare_couplings", "--couplings=additive,afine")
    assert (status, stdout) == (1, "")
    assert stderr.strip() == ("error: got unknown coupling 'afine': did you mean affine?")
