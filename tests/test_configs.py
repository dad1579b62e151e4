"""Every experiment resolves, has every knob, and one of its steps can be traced."""

import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

from revnet_jax.config import ConfigError, flatten
from revnet_jax.families import FAMILIES, build_task
from revnet_jax.models import num_params
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.training.build import build_recipe
from revnet_jax.training.describe import activation_bytes_per_example, describe_model
from revnet_jax.training.dry_run import dry_run
from tests import by_default

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
EXPECTED = {
    "digits", "cifar10_revnet38", "cifar10_revnet110", "cifar10_revnet164", "cifar10_resnet32",
    "cifar10_resnet110", "cifar10_resnet164", "imagenet_revnet56", "imagenet_revnet104",
    "imagenet_resnet50", "imagenet_resnet101", "digits_irevnet", "cifar10_irevnet",
    "lm_bytes", "lm_shakespeare", "lm_124m", "lm_1b", "lm_8b_32k", "lm_finetune",
    "vit_s_cifar10",
    "vit_b_imagenet", "vit_finetune",
}  # fmt: skip
DEEP = {name for name in EXPECTED if re.search("imagenet_re|164|110", name)}
# Trainable parameters, CIFAR-10 and CIFAR-100 (the models of Gomez et al. 2017, to the last one).
NUM_PARAMS = {
    "cifar10_resnet32": (464_154, 470_004),
    "cifar10_revnet38": (464_890, 475_060),
    "cifar10_resnet110": (1_727_962, 1_733_812),
    "cifar10_revnet110": (1_729_194, 1_740_804),
    "cifar10_resnet164": (1_703_258, 1_726_388),
    "cifar10_revnet164": (1_748_778, 1_794_948),
}


def load(name, arm=""):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arm)


def test_all_experiments_are_here():
    assert {path.stem for path in CONFIGS} == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_arm_resolves_and_has_every_knob(name):
    for arm in ("", "laptop"):
        config = load(name, arm)
        knobs = FAMILIES[config.model.family].settings()
        assert flatten(config).keys() == flatten(knobs).keys()
    with pytest.raises(ConfigError, match="got arm 'huge', expected one of"):
        load(name, "huge")


# Some deep convolutional networks take seconds.
@pytest.mark.parametrize("name", by_default(sorted(EXPECTED), *sorted(EXPECTED - DEEP)))
def test_every_arm_builds(name):
    for arm in ("", "laptop"):
        build_recipe(load(name, arm))


@pytest.mark.parametrize("name", by_default(NUM_PARAMS, "cifar10_revnet38", "imagenet_revnet104"))
def test_parameters_are_the_published_ones(name):
    for arm, expected in zip(("", "cifar100"), NUM_PARAMS[name], strict=True):
        network = build_task(load(name, arm)).network
        assert num_params(jax.eval_shape(network.init, jax.random.key(0))) == expected


TRACED = [
    "digits",
    "cifar10_revnet38",
    "imagenet_resnet50",
    "lm_bytes",
    "lm_8b_32k",
    "vit_b_imagenet",
]


@pytest.mark.parametrize("name", by_default(TRACED, TRACED[0]))
def test_one_step_can_be_traced(name):
    report = dry_run(load(name, "laptop"))
    assert report["config"]["model.family"] == load(name).model.family


def test_a_mesh_is_checked_for_devices_that_are_elsewhere():
    config = load("lm_1b")
    config.update({"batch_size": 32})
    with pytest.raises(ConfigError, match=r"config.data.dir: got none for shards, expected where"):
        dry_run(config, 32, num_slices=2, platform="tpu")
    config.data.dir = "there"
    dry_run(config, 32, num_slices=2, platform="tpu")
    for key, message in (("data.name", "expected one of digits, .*"), ("tracker", "expected noth")):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict({key: "nosuch"})
        with pytest.raises(ConfigError, match=rf"^config.{key}: got 'nosuch', {message}"):
            dry_run(wrong, 32, num_slices=2, platform="tpu")
    for devices, slices, platform, attention, message in (
        (0, 1, "tpu", "auto", r"config.mesh: got 0 devices, expected at least 1"),
        (16, 0, "tpu", "auto", r"config.mesh: got 0 slices, expected at least 1"),
        (24, 1, "tpu", "auto", r"config.mesh: got .* for 24 devices, expected sizes whose product"),
        (16, 2, "tpu", "auto", r"config.mesh.data: got 1 for 2 slices, expected a multiple"),
        (64, 1, "tpu", "auto", r"config.batch_size: got 32, expected a multiple of 64"),
        (16, 1, "gpu", "flash", r"config.model.attention: got 'flash' on gpu"),
    ):
        config.model.attention = attention
        with pytest.raises(ConfigError, match=message):
            dry_run(config, devices, slices, platform)


# The published vision transformers, to the last parameter; language models to what they are named.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_s_cifar10", 21_342_346),
        ("vit_b_imagenet", 86_567_656),
        ("lm_124m", 124e6),
        ("lm_1b", 1e9),
        ("lm_8b_32k", 8e9),
    ],
)
def test_the_twin_has_as_many_parameters(name, expected):
    config = load(name)
    counts = []
    for reversible in (True, False):
        config.model.update({"reversible": reversible, "backprop": "store"})
        network = build_task(config).network
        counts.append(num_params(jax.eval_shape(network.init, jax.random.key(0))))
    assert counts[0] == counts[1]
    assert counts[0] == pytest.approx(expected, rel=0 if name.startswith("vit") else 0.05)


@pytest.mark.thorough
def test_describe():
    report = describe_model(load("cifar10_revnet38"))
    assert report["num_params"] == 464_890
    assert report["example"] == {"image": (32, 32, 3), "label": ()}
    assert [chain["layers"] for chain in report["chains"]] == [3, 2, 2]
    assert {chain["backprop"] for chain in report["chains"]} == {"reverse"}
    checked = report["activation_bytes_per_example"]
    assert checked["reverse"] < checked["remat"] < checked["store"]
    unchecked = load("cifar10_revnet38")
    unchecked.model.check_exactness = False
    kept = describe_model(unchecked)["activation_bytes_per_example"]
    # Under reverse a chain keeps its output, under remat every layer's input; the outputs of
    # stages 1 and 2 are kept by the units after them anyway.
    stage_bytes = [4 * h * h * c for h, c in ((32, 32), (16, 64), (8, 112))]
    assert kept["remat"] - kept["reverse"] == sum(
        layers * b for layers, b in zip((3, 2, 1), stage_bytes, strict=True)
    )
    # The exactness check keeps the inputs of the three chains.
    assert checked["reverse"] - kept["reverse"] == sum(stage_bytes)


@pytest.mark.thorough
def test_describe_of_a_resnet_has_no_reverse():
    report = describe_model(load("cifar10_resnet32", "cifar100,laptop"))
    assert report["num_params"] == NUM_PARAMS["cifar10_resnet32"][1]
    assert report["activation_bytes_per_example"]["reverse"] is None


@pytest.mark.thorough
def test_describe_says_what_stored_layers_stands_for(run_program):
    chosen = ("--config=configs/digits.py", "--config.model.stored_layers=-1")
    status, printed, said = run_program("describe", *chosen)
    assert (status, said) == (0, "")
    assert printed.count("-1, as many as fit\n") == 2


def test_activations_kept_for_frozen_parameters_are_not_counted():
    config = load("lm_bytes", "laptop")
    config.update_from_flattened_dict({"model.layers": 2, "model.width": 32, "model.hidden": 64})
    config.model.update({"lora_rank": 2, "reversible": False, "backprop": "store"})
    kept = []
    for trainable, dtype in (("", ""), ("lora", ""), ("lora", "int8")):
        config.model.frozen_dtype = dtype
        kept.append(activation_bytes_per_example(build_task(config), Trainable(trainable)))
    assert kept[0] > kept[1] == kept[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.unit=3"], "got --config.model.unit, .*did you mean --config.model.units"),
        (["--config.units=3"], "did you mean --config.model.units"),
        (["--config.lr=0.1"], "did you mean --config.schedule.learning_rate\\? "),
        (["--config.xyzzy=1"], "no setting of the config: --config=configs/digits.py --help lists"),
        (["--config.optimizer=lion"], "a group of settings .*did you mean --config.optimizer.name"),
        (["--config.optimizer.momentum=nan"], "config.optimizer.momentum: got nan, expected a num"),
        (["--confg=3"], "Unknown command line flag 'confg'"),
        (["lr=3"], "got argument 'lr=3', expected flags only"),
        (["--config.batch_size=a"], "flag --config.batch_size=a: invalid literal"),
        (["--config=configs/digits.py:huge"], "got arm 'huge', expected one of"),
        (["--config=nothing.py"], "got 'nothing.py' as --config, expected a file that exists"),
        (["--config=nothing.py", "--config.seed=1"], "got 'nothing.py' as --config, expected a"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_flags_is_one_line_before_jax_is_imported(flags, message):
    code = (
        "import sys, runpy\n"
        "try: runpy.run_path('scripts/train.py', run_name='__main__')\n"
        "finally: print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "--config=configs/digits.py", "--workdir=w", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == "False\n"
    (line,) = result.stderr.strip().splitlines()
    assert re.match(f"error: .*{message}", line)


@pytest.mark.thorough
def test_what_is_kept_of_a_convolutional_network():
    """Products between nothing but the streams and everything."""
    kept = describe_model(load("digits"))["activation_bytes_per_example"]
    assert kept["reverse"] < kept["remat"] < kept["remat_dots"] < kept["store"]


def test_strategies_of_chains_may_have_spaces_between():
    config = runpy.run_path(str(ROOT / "configs" / "cifar10_revnet38.py"))["get_config"]()
    found = []
    for config.model.backprop in ("reverse,store,remat", " reverse, store ,remat"):
        found.append(build_task(config).network.strategies)
    assert found[0] == found[1]
    assert {strategy.backprop for strategy in found[0].values()} == {"reverse", "store", "remat"}
