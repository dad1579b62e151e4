"""GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions, biases everywhere.

Its linear layers are stored as [in, out], as ours are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from revnet_jax.models import LanguageModelShape
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.layout import (
    NO_DECODER_HAS,
    PublishedFamily,
    Tensor,
    as_it_is,
    transposed,
)


def settings_of_gpt2(found: Description) -> dict[str, Any]:
    """The settings of a GPT-2."""
    # Both names mean the approximation by tanh, which is ours; "gelu" would be the exact one.
    found.only("activation_function", "gelu_new", "gelu_pytorch_tanh")
    # Variants that our decoder has no setting for.
    found.only("scale_attn_weights", True)
    found.only("scale_attn_by_inverse_layer_idx", False)
    found.only("add_cross_attention", False)
    width, heads = found.whole("n_embd"), found.whole("n_head")
    return {
        "layers": found.whole("n_layer"),
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "hidden": found.whole("n_inner", 4 * width),
        "norm_eps": found.number("layer_norm_epsilon", 1e-5),
        "tied": found.flag("tie_word_embeddings", True),
        "learned_positions": found.whole("n_positions"),
    }


def describe_gpt2(model: Any, data: Any) -> dict[str, Any]:
    """The config.json of a GPT-2."""
    return {
        "vocab_size": data.vocab_size,
        "n_positions": model.learned_positions,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tied,
        # The weights of attention have no dropout here.
        "attn_pdrop": 0.0,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


def tensors_of_gpt2(a: LanguageModelShape) -> Iterator[Tensor]:
    """The tensors of a GPT-2."""
    D = a.width
    yield Tensor("transformer.wte.weight", (a.vocab_size, D), "embed", as_it_is)
    yield Tensor("transformer.wpe.weight", (a.learned_positions, D), "positions", as_it_is)
    for layer in range(a.layers):
        for name, shape, path, part in _layer(a):
            yield Tensor(f"transformer.h.{layer}.{name}", shape, f"layers/{path}", part, layer)
    yield Tensor("transformer.ln_f.weight", (D,), "head/scale", as_it_is)
    yield Tensor("transformer.ln_f.bias", (D,), "head/bias", as_it_is)
    if not a.tied:
        yield Tensor("lm_head.weight", (a.vocab_size, D), "head/kernel", transposed)


def _layer(a):
    """(name, shape, path of our parameter, its part) of the tensors of a layer."""
    D, F = a.width, a.hidden
    heads_last = lambda leaf: leaf.reshape(*leaf.shape[:-1], a.heads, 3, a.size_of_head)
    # Theirs has all queries, then all keys, then all values; ours has the three of each head.
    yield (
        "attn.c_attn.weight",
        (D, 3 * D),
        "0/qkv/kernel",
        lambda x: np.swapaxes(heads_last(x), 1, 2),
    )
    yield "attn.c_attn.bias", (3 * D,), "0/qkv/bias", lambda x: np.swapaxes(heads_last(x), 0, 1)
    yield "attn.c_proj.weight", (D, D), "0/out/kernel", as_it_is
    yield "attn.c_proj.bias", (D,), "0/out/bias", as_it_is
    # Ours has an axis for gate and value; with GELU its length is 1.
    yield "mlp.c_fc.weight", (D, F), "1/up/kernel", lambda kernel: kernel[:, 0]
    yield "mlp.c_fc.bias", (F,), "1/up/bias", lambda bias: bias[0]
    yield "mlp.c_proj.weight", (F, D), "1/down/kernel", as_it_is
    yield "mlp.c_proj.bias", (D,), "1/down/bias", as_it_is
    for branch in (0, 1):
        yield f"ln_{branch + 1}.weight", (D,), f"{branch}/norm/scale", as_it_is
        yield f"ln_{branch + 1}.bias", (D,), f"{branch}/norm/bias", as_it_is


GPT2 = PublishedFamily(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    fixed={
        **{"norm": "layer", "activation": "gelu", "bias": "all", "qk_norm": False},
        **{"head_size": 0, "rotary_scaling": (), **NO_DECODER_HAS},
    },
    biases=("all",),
    settings=settings_of_gpt2,
    describe=describe_gpt2,
    tensors=tensors_of_gpt2,
    context="n_positions",
    prefix="transformer.",
    # Causal masks, which old versions of transformers stored beside the weights.
    ignored=r"\.attn\.(masked_)?bias$",
)
