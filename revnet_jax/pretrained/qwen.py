"""Qwen2 (arXiv:2407.10671), with biases of queries, keys and values, and Qwen3 (arXiv:2505.09388),
with norms of queries and keys. All else is as in Llama.
"""

from __future__ import annotations

from typing import Any

from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.layout import PublishedFamily
from revnet_jax.pretrained.llama import SHARED, describe_shared, shared_settings, tensors_of_llama


def settings_of_qwen2(found: Description) -> dict[str, Any]:
    """The settings of a Qwen2."""
    found.only("use_sliding_window", False)
    return shared_settings(found)


def settings_of_qwen3(found: Description) -> dict[str, Any]:
    """The settings of a Qwen3, whose heads are of 128 unless it says otherwise."""
    found.only("use_sliding_window", False)
    bias = "attention" if found.flag("attention_bias", False) else "none"
    return {**shared_settings(found, head_size=128), "bias": bias}


def describe_qwen3(model: Any, data: Any) -> dict[str, Any]:
    """The config.json of a Qwen3."""
    return {**describe_shared(model, data), "attention_bias": model.bias != "none"}


QWEN2 = PublishedFamily(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    # All Qwen2 have these biases, so config.json has no field for them.
    fixed={**SHARED, "qk_norm": False, "bias": "qkv"},
    biases=("qkv",),
    settings=settings_of_qwen2,
    describe=describe_shared,
    tensors=tensors_of_llama,
    context="max_position_embeddings",
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)
QWEN3 = PublishedFamily(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fixed={**SHARED, "qk_norm": True},
    biases=("none", "attention"),
    settings=settings_of_qwen3,
    describe=describe_qwen3,
    tensors=tensors_of_llama,
    context="max_position_embeddings",
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)
