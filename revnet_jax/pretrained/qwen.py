"""Qwen2 (arXiv:2407.10671), with biases of queries, keys and values, and Qwen3 (arXiv:2505.09388),
with norms of queries and keys. All else is as in Llama.
"""

from __future__ import annotations

from typing import Any

from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.layout import Family
from revnet_jax.pretrained.llama import SHARED, describe_sizes, sizes, tensors


def settings_2(found: Description) -> dict[str, Any]:
    """The settings of a Qwen2."""
    found.only("use_sliding_window", False)
    return sizes(found)


def settings_3(found: Description) -> dict[str, Any]:
    """The settings of a Qwen3, whose heads are of 128 unless it says otherwise."""
    found.only("use_sliding_window", False)
    bias = "attention" if found.flag("attention_bias", False) else "none"
    return {**sizes(found, head_size=128), "bias": bias}


def describe_3(model: Any, data: Any) -> dict[str, Any]:
    """The config.json of a Qwen3."""
    return {**describe_sizes(model, data), "attention_bias": model.bias != "none"}


QWEN2 = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    fixed={**SHARED, "qk_norm": False, "bias": "qkv"},
    biases=("qkv",),
    settings=settings_2,
    describe=describe_sizes,
    tensors=tensors,
    context="max_position_embeddings",
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)
QWEN3 = Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    fixed={**SHARED, "qk_norm": True},
    biases=("none", "attention"),
    settings=settings_3,
    describe=describe_3,
    tensors=tensors,
    context="max_position_embeddings",
    prefix="model.",
    ignored=r"\.rotary_emb\.inv_freq$",
)
