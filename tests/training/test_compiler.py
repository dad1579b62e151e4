"""Which options a program is compiled with."""

from types import SimpleNamespace

import jax
import pytest

from revnet_jax.config import ConfigError, digits, imagenet
from revnet_jax.training import program
from revnet_jax.training.compiler import compiler_options


def test_options_depend_on_the_platform():
    kernels = {"xla_gpu_exclude_nondeterministic_ops": True}
    assert compiler_options("gpu", deterministic=True) == kernels
    assert compiler_options("gpu") is compiler_options("tpu", deterministic=True) is None
    on_cpu = compiler_options("cpu")
    assert on_cpu == compiler_options("cpu", deterministic=True)
    quickly = compiler_options("cpu", quickly=True)
    assert quickly == on_cpu | {"xla_backend_optimization_level": 0}


def test_max_pooling_has_no_deterministic_gradient():
    config = imagenet()
    config.update_from_flattened_dict({"deterministic": True, "model.stem": "imagenet"})
    with pytest.raises(ConfigError, match=r"got True and model\.stem=imagenet on a GPU"):
        program.recipe_on(config, [SimpleNamespace(platform="cuda")])


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_training_step_asks_for_deterministic_kernels(monkeypatch, deterministic):
    def jit(function, *, platform, **kwargs):
        asked.append((platform, kwargs.pop("deterministic")))
        return jax.jit(function, **kwargs)

    asked = []
    monkeypatch.setattr(program, "exact_jit", jit)
    config = digits()
    config.deterministic = deterministic
    program.step_program(config, jax.devices()[:1])
    assert asked == [("cpu", deterministic)]
