"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from revnet_jax.models import LanguageModelShape
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.layout import (
    NO_DECODER_HAS,
    PublishedFamily,
    Tensor,
    as_it_is,
    of_heads,
    one_of,
    transposed,
)

# With Qwen.
SHARED = {"norm": "rms", "activation": "swiglu", "learned_positions": 0, **NO_DECODER_HAS}


def shared_settings(found: Description, *, head_size: int | None = None) -> dict[str, Any]:
    """The settings that Llama and Qwen share.

    Args:
      found: the config.json.
      head_size: of heads if config.json has none; None for their share of the width.
    """
    found.only("hidden_act", "silu")
    width, heads = found.whole("hidden_size"), found.whole("num_attention_heads")
    return {
        "layers": found.whole("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": found.whole("num_key_value_heads", heads),
        # Files older than this field have heads that divide the width.
        "head_size": found.whole("head_dim", head_size or max(1, width // heads)),
        "hidden": found.whole("intermediate_size"),
        "norm_eps": found.number("rms_norm_eps", 1e-6),
        "tied": found.flag("tie_word_embeddings", False),
        **found.rotary(),
    }


def settings_of_llama(found: Description) -> dict[str, Any]:
    """The settings of a Llama."""
    attention, feed_forward = (found.flag(f"{of}_bias", False) for of in ("attention", "mlp"))
    # We have no bias of the feed-forward network alone, so `only` raises an error.
    if feed_forward and not attention:
        found.only("mlp_bias", False)
    bias = "all" if feed_forward else "attention" if attention else "none"
    return {**shared_settings(found), "bias": bias}


def describe_shared(model: Any, data: Any) -> dict[str, Any]:
    """The fields of config.json that Llama and Qwen share."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = dict(zip(names, model.rotary_scaling, strict=False))
    # config.json has a whole number here; the setting is a tuple of floats.
    if scaling:
        scaling[names[-1]] = int(scaling[names[-1]])
    return {
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.context,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size or model.width // model.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rotary_base,
        # The style before version 5 of transformers, which newer versions read too.
        "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None,
        "tie_word_embeddings": model.tied,
    }


def describe_llama(model: Any, data: Any) -> dict[str, Any]:
    """The config.json of a Llama."""
    biases = {"attention_bias": model.bias != "none", "mlp_bias": model.bias == "all"}
    return {**describe_shared(model, data), **biases}


def tensors_of_llama(a: LanguageModelShape) -> Iterator[Tensor]:
    """The tensors of a Llama; with biases of queries, keys and values alone, or norms of queries
    and keys, those of a Qwen."""
    V, D = a.vocab_size, a.width
    yield Tensor("model.embed_tokens.weight", (V, D), "embed", as_it_is)
    for layer in range(a.layers):
        for name, shape, path, part in _layer(a):
            yield Tensor(f"model.layers.{layer}.{name}", shape, f"layers/{path}", part, layer)
    yield Tensor("model.norm.weight", (D,), "head/scale", as_it_is)
    if not a.tied:
        yield Tensor("lm_head.weight", (V, D), "head/kernel", transposed)


def _layer(a):
    """(name, shape, path of our parameter, its part) of the tensors of a layer."""
    D, F, K = a.width, a.hidden, a.size_of_head
    NK = a.heads * K
    yield "input_layernorm.weight", (D,), "0/norm/scale", as_it_is
    for which in "qkv":
        outputs, part = NK if which == "q" else a.kv_heads * K, of_heads(a, which)
        yield f"self_attn.{which}_proj.weight", (outputs, D), "0/qkv/kernel", part
        if a.bias != "none":
            yield f"self_attn.{which}_proj.bias", (outputs,), "0/qkv/bias", part
        if a.qk_norm and which != "v":
            yield f"self_attn.{which}_norm.weight", (K,), f"0/{which}_norm/scale", as_it_is
    yield "self_attn.o_proj.weight", (D, NK), "0/out/kernel", transposed
    yield "post_attention_layernorm.weight", (D,), "1/norm/scale", as_it_is
    # Ours are one kernel [D, 2, F], gate first.
    for i, name in enumerate(("gate", "up")):
        yield f"mlp.{name}_proj.weight", (F, D), "1/up/kernel", one_of(i)
    yield "mlp.down_proj.weight", (D, F), "1/down/kernel", transposed
    if a.bias in ("attention", "all"):
        yield "self_attn.o_proj.bias", (D,), "0/out/bias", as_it_is
    if a.bias == "all":
        yield "mlp.gate_proj.bias", (F,), "1/up/bias", lambda bias: bias[0]
        yield "mlp.up_proj.bias", (F,), "1/up/bias", lambda bias: bias[1]
        yield "mlp.down_proj.bias", (D,), "1/down/bias", as_it_is


LLAMA = PublishedFamily(
    model_type="llama",
    class_name="LlamaForCausalLM",
    fixed={**SHARED, "qk_norm": False},
    biases=("none", "attention", "all"),
    settings=settings_of_llama,
    describe=describe_llama,
    tensors=tensors_of_llama,
    context="max_position_embeddings",
    prefix="model.",
    # Rotary frequencies, which old versions of transformers stored beside the weights.
    ignored=r"\.rotary_emb\.inv_freq$",
)
