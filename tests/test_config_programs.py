"""Every experiment compiles for an H100, and for a TPU v5e, on a machine that has neither.

Kernels refuse shapes and dtypes when a program is traced or compiled for their chip, not before:
cuDNN's attention refused 65 tokens, which no test on a CPU could show.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from revnet_jax.planning import gpus
from revnet_jax.planning.topology import parse_topology
from tests.nvidia import needs_compiler

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
# These have each dtype and each strategy once; the other two pairs are slow tests.
USUAL = (("float32", "store"), ("bfloat16", "reverse"))
OTHERS = (("float32", "reverse"), ("bfloat16", "store"))
# The TPU compiler takes 4 to 15 seconds for a program of these, up to a minute for the others.
QUICK_ON_TPU = ("digits", "lm_bytes", "lm_shakespeare", "vit_s_cifar10")
LARGE_FOR_A_V5E = ("lm_1b", "lm_8b_32k")  # two minutes, and more memory than one has

SLOW = pytest.mark.slow
# Slow ones have no mark `gpu_compiler`, by which CI picks: they take as long as all the others.
NEEDS_NVIDIA = pytest.mark.skipif(
    not gpus.has_compiler(), reason="needs NVIDIA's compiler: scripts/setup.sh gpu_compiler"
)
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: scripts/setup.sh tpu"
)


def groups():
    """Experiments by name without their depth: a process of each group shares what is the same."""
    found = {}
    for name in NAMES:
        found.setdefault(re.sub(r"(?<=net)\d+$", "", name), []).append(name)
    return found


def programs(names, pairs):
    """Networks of one stream have no inverse: they rematerialise."""
    for name in names:
        for dtype, backprop in pairs:
            one_stream = "resnet" in name or name.endswith("_finetune")
            backward = "remat" if one_stream and backprop == "reverse" else backprop
            yield f"{name}/{dtype}/{backward}"


def check(topology, asked):
    """Compiles them, in a process with the settings of this compiler, and shows what fails."""
    asked = list(asked)
    result = subprocess.run(
        [sys.executable, "-m", "tests.compile_configs", topology, *asked],
        cwd=ROOT,
        env={**os.environ, **parse_topology(topology).environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [row["program"] for row in rows] == asked
    assert {row["program"]: row["error"] for row in rows if row["error"]} == {}


def test_every_experiment_is_in_a_group():
    assert {name for names in groups().values() for name in names} == set(NAMES)
    assert groups()["cifar10_resnet"] == [
        "cifar10_resnet110",
        "cifar10_resnet164",
        "cifar10_resnet32",
    ]
    assert list(programs(["imagenet_resnet50"], USUAL))[1] == "imagenet_resnet50/bfloat16/remat"


@needs_compiler
@pytest.mark.parametrize("names", groups().values(), ids=groups().keys())
def test_on_an_h100(names):
    check("h100:1", programs(names, USUAL))


@SLOW
@NEEDS_NVIDIA
@pytest.mark.parametrize("names", groups().values(), ids=groups().keys())
def test_on_an_h100_the_other_way_round(names):
    check("h100:1", programs(names, OTHERS))


@needs_compiler
@pytest.mark.parametrize("name", ["vit_s_cifar10", "lm_bytes"])
def test_fused_attention_on_a_host_of_eight(name):
    """Masked or not, its batch is split over the GPUs."""
    check("h100:8", [f"{name}/bfloat16/reverse"])


@NEEDS_LIBTPU
@pytest.mark.parametrize("name", QUICK_ON_TPU)
def test_on_a_v5e(name):
    check("v5e:1x1", programs([name], USUAL))


@NEEDS_LIBTPU
@SLOW
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LARGE_FOR_A_V5E])
def test_on_a_v5e_all(name):
    check("v5e:1x1", programs([name], (*USUAL, *OTHERS)))
