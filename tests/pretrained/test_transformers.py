"""Imported and exported models against the library that they were published for."""

import importlib.util
import os

import jax
import numpy as np
import pytest

from revnet_jax.pretrained.exporting import export_weights
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.training.generate import generate
from revnet_jax.training.restore import restore_run

_HAS = all(importlib.util.find_spec(name) for name in ("transformers", "torch", "safetensors"))
pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(not _HAS, reason="needs transformers: scripts/setup.sh transformers"),
    # Those of other libraries' own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
V, T = 131, 100
SIZES = {
    "vocab_size": V,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GPT2 = {"vocab_size": V, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
MODELS = {
    "llama": ("Llama", SIZES),
    "llama3": ("Llama", {**SIZES, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama_biased": ("Llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
}


each_model = pytest.mark.parametrize("name", MODELS)


def published(name, folder, noise):
    """A random model in float32, saved by transformers. noise: what is added to its weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, **NO_TOKENS)
    class_name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():  # norms and biases must not be those of an untrained model either
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def logits_of(model, token_BT):
    import torch

    with torch.no_grad():
        return model(torch.tensor(token_BT)).logits.numpy()


@each_model
def test_import_computes_the_same_and_export_is_the_same(name, tmp_path):
    import transformers

    model = published(name, tmp_path / "source", noise=0.1)
    import_weights(tmp_path / "source", tmp_path / "run")
    run = restore_run(tmp_path / "run")
    token_BT = np.random.default_rng(0).integers(0, V, (2, T), np.int32)
    expected_BTV = logits_of(model, token_BT)
    logits_BTV = jax.jit(run.task.network.logits)(run.variables, token_BT)
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-4)

    export_weights(tmp_path / "run", tmp_path / "out", shard_bytes=50_000)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    np.testing.assert_array_equal(logits_of(exported, token_BT), expected_BTV)


@each_model
def test_greedy_decoding_gives_the_same_tokens(name, tmp_path):
    import torch

    model = published(name, tmp_path / "source", noise=0.3)  # less repeats one token
    import_weights(tmp_path / "source", tmp_path / "run")
    run = restore_run(tmp_path / "run")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    sizes = {"context": run.task.context, "num_tokens": 64, "temperature": 0}
    got = list(generate(run.task.network, run.variables, prompt, **sizes))
    assert got == expected
    assert len(set(got)) > 4
