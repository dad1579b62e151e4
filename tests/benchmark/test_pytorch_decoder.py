"""The twin in PyTorch: what it would not do as the config says is refused, torch or not."""

import re

import pytest

from revnet_jax.config import flatten, language_model
from tests.small_run import ROOT

# Settings that the script neither reads nor refuses.
OF_REVERSIBLE_MODELS = {"backprop", "stored_layers", "unroll", "grid", "grid_bits"} | {
    *("check_exactness", "reversible", "keep_operands")
}
OF_WHAT_IS_REFUSED = {"experts_per_token", "integrator_steps", "adapter_rank", "lora_alpha"} | {
    *("momentum", "nesterov", "frozen_dtype")
}
HOW_IT_IS_COMPUTED = {"attention", "feed_forward_chunks", "loss_chunk"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("model.lora_rank=4", "got 4, expected 0"),
        ("model.compute_dtype=float32", "got 'float32', expected 'bfloat16'"),
        ("model.kv_heads=6", "got 6, expected 12"),
        ("optimizer.clip=layer", "got 'layer', expected 'global'"),
    ],
)
def test_another_model_or_step_is_refused(run_program, flag, message):
    status, stdout, stderr = run_program(
        "pytorch_decoder", "--config=configs/lm_124m.py", f"--config.{flag}"
    )
    assert (status, stdout) == (1, "")
    name = flag.partition("=")[0]
    assert stderr == f"error: config.{name}: {message}: the twin in PyTorch has no other\n"


def test_another_family_is_refused(run_program):
    status, _, stderr = run_program("pytorch_decoder", "--config=configs/vit_s_cifar10.py")
    assert status == 1
    assert stderr.startswith("error: config.model.family: got 'vit', expected 'decoder'")


def test_no_setting_is_ignored():
    text = (ROOT / "scripts" / "pytorch_decoder.py").read_text()
    named = {*re.findall(r"(?:config\.|\")((?:model|optimizer)\.\w+)", text)}
    ignored = {
        name.partition(".")[2]
        for name in flatten(language_model()).keys() - named
        if name.startswith(("model.", "optimizer."))
    }
    assert ignored == OF_REVERSIBLE_MODELS | OF_WHAT_IS_REFUSED | HOW_IT_IS_COMPUTED
