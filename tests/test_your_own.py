"""Models, data and optimizers of one's own: the example outside the package, and mistakes."""

import contextlib
import json
import pathlib
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from revnet_jax.benchmark.pipeline import feed
from revnet_jax.config import (
    ConfigError,
    check_experiment,
    digits,
    experiment,
    flatten,
    language_model,
    references,
)
from revnet_jax.data.dataset import DataError
from revnet_jax.data.source import Arrays
from revnet_jax.families import build_task
from revnet_jax.optimizers.lockstep import LockstepOptimizer
from revnet_jax.planning.compile import Compiler
from revnet_jax.planning.plan import plan
from revnet_jax.planning.timeline import timelines, with_layers
from revnet_jax.planning.topology import parse_topology
from revnet_jax.planning.variants import deeper, has_depth, model_depth, variants
from revnet_jax.training.build import build_recipe
from revnet_jax.training.inputs import build_data
from revnet_jax.training.loop import train
from revnet_jax.training.restore import evaluate_run
from revnet_jax.training.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "your_own" / "gated_recurrence.py"
TINY = {
    "num_steps": 4,
    "batch_size": 16,
    "eval_batch_size": 64,
    "log_every_steps": 1,
    "eval_every_steps": 4,
    "checkpoint_every_steps": 2,
    "model.layers": 3,
    "data.examples": 300,
    "data.tokens": 8,
}


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    config = runpy.run_path(str(EXAMPLE))["get_config"]()
    config.update_from_flattened_dict(TINY)
    return config


def test_the_example_trains_resumes_and_is_measured(config, tmp_path):
    """One step program for all of it; it is compiled once."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    summary = train(config, whole)
    assert summary["exact_mismatches"] == 0
    assert json.loads((whole / "config.json").read_text())["folders"] == [str(EXAMPLE.parent)]
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "4")
    (part / "summary.json").unlink()
    resumed = train(config, part)
    assert [resumed[name] for name in ("steps", "train_loss", "eval_loss")] == [
        summary[name] for name in ("steps", "train_loss", "eval_loss")
    ]
    assert evaluate_run(part)["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert feed(config, seconds=0)["pipeline_per_second"] > 0
    with pytest.raises(ConfigError, match=r"--data_dir: got /x, expected none: .*load has no "):
        evaluate_run(part, data_dir="/x")
    # By devices that do not divide the batches of training.
    record = json.loads((part / "config.json").read_text())
    record["config"]["batch_size"] = 15
    (part / "config.json").write_text(json.dumps(record))
    assert evaluate_run(part)["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)


@pytest.mark.thorough
def test_the_example_is_planned_by_processes_that_find_its_module(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.model.layers = 2
    settings = flatten(config)
    assert {"reverse", "reverse+1", "reverse/lockstep"} < variants(settings).keys()
    assert model_depth(settings) == 2
    assert deeper(settings, 3) == {"model.layers": 6}
    compiler = Compiler(parse_topology("local"), tmp_path, lambda line: None)
    report = plan(settings, compiler, strategies=["reverse"])
    assert report["recommendation"]["strategy"] == "reverse"


@pytest.mark.thorough
def test_the_example_has_a_timeline(config):
    assert with_layers(config, 5).model.layers == 5
    assert has_depth(flatten(config))
    (line,) = timelines(config, 3, ["reverse"])
    assert line.peak_bytes == pytest.approx(line.compiled_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("sums", lambda self, variables, batch: {"loss": 1.0}, r"got \{'loss'.* from sums of"),
        ("sums", lambda self, variables, batch: {"count": batch["weight"]}, "a dictionary of scal"),
        ("loss", lambda self, *_, sweep: jnp.ones(()), r"got .* from loss of .*, expected \(a sc"),
        ("loss", lambda self, *_, sweep: (jnp.ones(2), ({}, {})), "new running averages"),
        ("loss", lambda self, *_, sweep: (jnp.ones(()), ({}, {"a": jnp.ones(2)})), "of scalars"),
    ],
)
def test_what_a_task_returns_is_checked_before_training(
    config, method, wrong, message, monkeypatch
):
    mesh = make_mesh(jax.devices())
    build_data(config, mesh)
    task = references.load_reference("model.family", config.model.family).__globals__["Hold"]
    monkeypatch.setattr(task, method, wrong)
    with pytest.raises(ConfigError, match=message):
        build_data(config, mesh)


def test_a_model_without_a_setting_of_its_depth(config):
    config = ConfigDict(config.to_dict())
    del config.model["layers"]
    assert not has_depth(flatten(config))
    for use in (lambda: model_depth(flatten(config)), lambda: with_layers(config, 3)):
        with pytest.raises(ConfigError, match=r"config.model.layers: got None, expected a whole"):
            use()


@pytest.mark.parametrize("is_null", [False, True])
def test_configs_that_lack_what_every_run_has(is_null):
    config = experiment().to_dict()
    check_experiment(ConfigDict(config))
    config |= {"model": {**config["model"], "family": None}} if is_null else {"model": {}}
    config = ConfigDict(config)
    with pytest.raises(ConfigError, match=r"config: got no .*model.family.*, expected what every"):
        check_experiment(config)


def test_the_page_shows_the_example():
    assert EXAMPLE.read_text() in (ROOT / "docs" / "your_own.md").read_text()


@pytest.mark.parametrize("lockstep", [False, True])
def test_optimizers_of_optax_by_name(lockstep):
    config = digits()
    config.optimizer.update({"name": "optax:adan", "lockstep": lockstep})
    optimizer = build_recipe(config).optimizer
    assert isinstance(optimizer, LockstepOptimizer) == lockstep
    config.optimizer.eps_root = 1e-8
    build_recipe(config)
    config.optimizer.rooot = 1e-8
    with pytest.raises(ConfigError, match=r"^config.optimizer: got optax:adan without a parameter"):
        build_recipe(config)


def test_images_of_ones_own_for_a_network_of_the_package(module):
    module(
        """
        from revnet_jax.data import load_dataset

        def load(dir, half=False):
            assert dir == "there"
            return load_dataset("digits")
        """
    )
    config = digits()
    config.data.update({"name": "mine:load", "dir": "there"})
    mesh = make_mesh(jax.devices())
    batches = build_data(config, mesh).train(0)
    assert next(batches)["image"].shape == (100, 8, 8, 1)
    batches.close()
    config.data.num_classes = 7
    with pytest.raises(ConfigError, match=r"config.data.num_classes: got 7, expected 10"):
        build_data(config, mesh)


def test_a_source_for_a_language_model_has_no_bits_per_byte(module):
    """Nothing is known of its text."""
    module(
        """
        import numpy as np
        from revnet_jax.data.source import Arrays

        def load(context):
            arrays = {name: np.zeros((9, context), np.int32) for name in ("token", "target")}
            return Arrays(arrays, arrays)
        """
    )
    config = language_model()
    config.batch_size = config.eval_batch_size = 2
    config.data.update({"name": "mine:load", "context": 16})
    data = build_data(config, make_mesh(jax.devices()))
    task = build_recipe(config).task.of_data(data.record)
    assert task.scores({"loss": 1.0}).keys() == {"eval_loss", "eval_perplexity"}


SOURCE = """
import numpy as np
from revnet_jax.data.source import Arrays

def tokens(context, extreme=3):
    arrays = {name: np.zeros((9, context), np.int32) for name in ("token", "target")}
    return Arrays(arrays, arrays | {"target": np.full((9, context), extreme, np.int32)})

def images(extreme=9):
    arrays = {"image": np.zeros((9, 8, 8, 1), np.float32), "label": np.full(9, extreme, np.int32)}
    return Arrays(arrays, arrays)

def normalised(mean, std): return images()
"""


@pytest.mark.parametrize("extreme", [-1, 255, 256])
def test_token_ids_of_a_source_are_in_the_vocabulary(extreme, module):
    """JAX clamps others silently."""
    module(SOURCE)
    config = language_model()
    config.batch_size = config.eval_batch_size = 2
    config.data.update({"name": "mine:tokens", "context": 16, "extreme": extreme})
    expected = f"^config.data: got target {extreme} in a test batch, expected 0 to 255, as the mod"
    with contextlib.nullcontext() if extreme == 255 else pytest.raises(ConfigError, match=expected):
        build_data(config, make_mesh(jax.devices()))


def test_labels_of_a_source_are_classes(module):
    module(SOURCE)
    config = digits()
    config.batch_size = config.eval_batch_size = 2
    config.data.name = "mine:images"
    build_data(config, make_mesh(jax.devices()))
    config.data.extreme = 10
    with pytest.raises(ConfigError, match=r"got label 10 in a training batch, expected 0 to 9"):
        build_data(config, make_mesh(jax.devices()))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_source_is_not_normalised(name, module):
    module(SOURCE)
    config = digits()
    config.batch_size = config.eval_batch_size = 2
    config.data.update({"name": "mine:normalised", name: (0.5,)})
    build_data(config, make_mesh(jax.devices()))  # by itself
    config.data.name = "mine:images"
    with pytest.raises(ConfigError, match=rf"^config.data.{name}: got \(0.5,\) with the Source of"):
        build_data(config, make_mesh(jax.devices()))


OWN = {"model.family": "mine:build", "data.name": "mine:load", "optimizer.name": "mine:adam"}
MODEL = """
import jax.numpy as jnp, numpy as np, optax
from revnet_jax.data.source import Arrays
from revnet_jax.models import ChainModel, Variables
from revnet_jax.models.task import Task

class Plain(ChainModel):
    def init(self, key):
        return Variables({"layers": jnp.zeros(2)}, {})

class Mine(Task):
    def __init__(self, network): self.network = network
    def loss(self, variables, batch, key, *, sweep): return jnp.zeros(()), ({}, {})
    def sums(self, variables, batch): return {"count": jnp.ones(())}
    def batch_shapes(self, batch_size): return {"x": np.zeros((batch_size, 3), np.float32)}

def build(**options): return Mine(Plain(layers=2, **options))
def arrays(size): return {"x": np.zeros((size, 3), np.float32)}
def load(): return Arrays(arrays(200), arrays(9))
def adam(learning_rate): return optax.adam(learning_rate)
"""


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({}, "", None),
        ({"model.family": "nothing:build"}, "", "model.family: got 'nothing:build' and found no"),
        ({"data.name": "mine.data:load"}, "", "data.name: got 'mine.data:load' and found no mod"),
        ({"optimizer.name": "mine:"}, "", "optimizer.name: got 'mine:', expected MODULE:FUNCTION"),
        ({"model.family": "mine:bild"}, "", "model.family: got 'mine:bild' and no 'bild' in "),
        ({"data.name": "mine:np"}, "", "data.name: got 'mine:np' and a module, not a function"),
        ({}, "import not_there", "model.family: got 'mine:build', which imports 'not_there'"),
        ({"model.width": 3}, "def build(): ...", "model: got mine:build without a parameter wi"),
        ({}, "def build(widths, **o): ...", "model: got no widths, which mine:build takes"),
        ({"model.depth": 3}, "", "model: mine:build: .*unexpected keyword argument 'depth'"),
        ({}, "def build(**o): return Plain(layers=2, **o)", "model.family: got a Plain without ne"),
        ({}, "def build(**o): return Mine(3)", "model.family: got a int without init, probes"),
        ({}, "class Mine(Task):\n def __init__(self, n): ...", "model: mine:build: .*abstract"),
        ({}, "Plain.init = lambda self, key: {'w': 1.0}", "model: got an init of mine:build that"),
        ({"data.size": 3}, "", "data: got mine:load without a parameter size, expected one for"),
        ({}, "load = lambda: {'x': [1, 2]}", "data.name: got a dict without train, test from"),
        ({"data.name": "digits"}, "", "data: got no dir, image_shape, num_classes, verify_images"),
        ({}, "def adam(): ...", "optimizer: got mine:adam without a parameter learning_rate"),
        ({}, "def adam(learning_rate): ...", "optimizer.name: got a NoneType without init"),
        ({"model.backprop": "revers"}, "", "model: mine:build: got backprop='revers', expected"),
        ({"batch_size": 300}, "", "data: got batch_size=300, expected at most the 200 examples"),
        (
            {},
            "class Arrays(Arrays):\n def test(self, **_): return 0, None",
            "data: got a source of 0 test batches, expected one at least",
        ),
        (
            {},
            "Mine.batch_shapes = lambda self, n: {'x': np.zeros((n, 4), np.float32)}",
            r"data: got a training batch of {'x': 'float32\[100, 3\]'}, expected .*\[100, 4\]",
        ),
    ],
)
def test_what_is_wrong_in_files_of_ones_own_is_one_line(settings, code, message, module):
    module(MODEL + code)
    config = experiment()
    config.update_from_flattened_dict(OWN)
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value

    def build():
        build_recipe(config)
        build_data(config, make_mesh(jax.devices()))

    if message is None:
        return build()
    with pytest.raises(ConfigError, match=f"^config.{message}") as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_config_without_what_every_run_has(config):
    del config.model.unroll
    with pytest.raises(ConfigError, match=r"^config: got no model.unroll, expected what every run"):
        build_task(config)
    config = experiment()
    config.model.family = "mine"
    with pytest.raises(ConfigError, match=r"got 'mine', expected one of revnet, .* of your own"):
        build_task(config)


def test_arrays_are_read_once_an_epoch_and_filled_up():
    numbers = lambda n: {"x": np.arange(n)}
    source = Arrays(numbers(6), numbers(5))
    batch = source.train(batch_size=3, seed=0, rows=np.arange(3))
    assert sorted([*batch(0)["x"], *batch(1)["x"]]) == list(range(6))
    second = source.train(batch_size=3, seed=0, rows=np.array([1]))
    assert list(second(1)["x"]) == [batch(1)["x"][1]]
    number, batch = source.test(batch_size=4, rows=np.arange(4))
    assert (number, list(batch(1)["weight"]), batch(1)["x"][0]) == (2, [1, 0, 0, 0], 4)
    for split, other in (({}, {}), (numbers(0), numbers(1)), (numbers(2), {"y": np.ones(2)})):
        with pytest.raises((DataError, ValueError)):
            Arrays(split, other)


def test_modules_are_found_again_without_the_config_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "models" / "mine_in"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep.py").write_text("def build(): return 3")
    references.look_in([tmp_path / "models"])
    assert references.load_reference("model.family", "mine_in.deep:build")() == 3
    settings = {"model.family": "mine_in.deep:build", "data.name": "digits"}
    assert references.folders_of(settings) == [str(tmp_path / "models")]
    # After PYTHONPATH, before modules of other packages that may be called the same.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), str(tmp_path), "site-packages"])
    references.look_in([tmp_path / "models"], first=False)
    assert sys.path[1:] == [str(tmp_path), str(tmp_path / "models"), "site-packages"]
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), "site-packages"])
    references.look_in([tmp_path / "models"], first=False)
    assert sys.path[0] == str(tmp_path / "models")
    assert str(tmp_path / "models") in references.search_path()
