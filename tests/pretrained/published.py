"""Tiny models as published: config.json, tensors, and their logits in plain NumPy and float64.

Written from the published formats, with none of the package's mapping of names.

Dims: T tokens, N heads, G key-value heads, K head size, D width, F hidden width, V vocabulary.
"""

import json
import math

import numpy as np

V, D, F, N, G, LAYERS = 67, 24, 40, 4, 2, 2
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "num_key_value_heads": G,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
MODELS = {
    "llama": {
        **_LLAMA,
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": {**ROPE, "rope_type": "llama3", "original_max_position_embeddings": 24},
        "tie_word_embeddings": True,
        "eos_token_id": 3,
    },
    # With all biases, and the fields of newer versions.
    "llama_biased": {
        **_LLAMA,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen2": {**_LLAMA, "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": V,
        "n_embd": D,
        "n_layer": LAYERS,
        "n_head": N,
        "n_positions": 96,
    },
}


def shapes(model):
    """The shape of every tensor by name."""
    if model["model_type"] == "gpt2":
        found = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (96, D)}
        layer = {
            **{"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,)},
            **{"attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,)},
            **{"mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,)},
            **{"mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)},
            **{f"ln_{i}.{name}": (D,) for i in (1, 2) for name in ("weight", "bias")},
        }
        found |= {f"transformer.h.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}
        return found | {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    K = model.get("head_dim", D // N)
    layer = {
        **{"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)},
        **{"self_attn.q_proj.weight": (N * K, D), "self_attn.o_proj.weight": (D, N * K)},
        **{"self_attn.k_proj.weight": (G * K, D), "self_attn.v_proj.weight": (G * K, D)},
        **{"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D)},
        "mlp.down_proj.weight": (D, F),
    }
    biased = ("q_proj", "k_proj", "v_proj") if model["model_type"] == "qwen2" else ()
    biased += ("q_proj", "k_proj", "v_proj", "o_proj") if model.get("attention_bias") else ()
    biased += ("gate_proj", "up_proj", "down_proj") if model.get("mlp_bias") else ()
    for name in [name for name in layer if name.split(".")[1] in biased]:
        layer[name.replace("weight", "bias")] = layer[name][:1]
    if model["model_type"] == "qwen3":
        layer |= {f"self_attn.{x}_norm.weight": (K,) for x in "qk"}
    found = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    found |= {f"model.layers.{i}.{n}": s for i in range(LAYERS) for n, s in layer.items()}
    return found if model.get("tie_word_embeddings") else found | {"lm_head.weight": (V, D)}


def tensors(model, dtype=np.float32):
    """Random tensors by name, in which no norm or bias is what an untrained one is."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
    found = {name: draw(shape) for name, shape in shapes(model).items()}
    for name in found:
        if "norm" in name or "ln_" in name:
            found[name] += 1
    return {name: x.astype(dtype) for name, x in found.items()}


def write(folder, model, found=None, *, files=1):
    """Writes config.json and the tensors, in several files if asked. Returns the tensors."""
    from safetensors.numpy import save_file

    found = tensors(model) if found is None else found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    if files == 1:
        save_file(found, folder / "model.safetensors")
        return found
    places = {name: f"part{i % files}.safetensors" for i, name in enumerate(found)}
    for file in set(places.values()):
        save_file({name: x for name, x in found.items() if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return found


def logits(model, found, token_T):
    """The logits [T, V] of a sequence, from all tensors in float64."""
    w = {name: np.asarray(x, np.float64) for name, x in found.items()}
    return _gpt2(w, token_T) if model["model_type"] == "gpt2" else _llama(model, w, token_T)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _attention(q, k, v):
    """The attention of one head: q, k, v are [T, K]."""
    score = q @ k.T / math.sqrt(q.shape[-1])
    return _softmax(np.where(np.tri(len(q), dtype=bool), score, -np.inf)) @ v


def _rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * weight


def _frequencies(model, K):
    """Rotary frequencies, one pair of elements after the other, each by its own if."""
    rope = model.get("rope_scaling") or model.get("rope_parameters") or {}
    base = model.get("rope_theta") or rope.get("rope_theta", 10_000.0)
    found = []
    for i in range(K // 2):
        f = base ** (-2 * i / K)
        if rope.get("rope_type") == "llama3":
            context, low, high = (
                rope[name]
                for name in (
                    "original_max_position_embeddings",
                    "low_freq_factor",
                    "high_freq_factor",
                )
            )
            length = 2 * math.pi / f
            if length > context / low:
                f = f / rope["factor"]
            elif length >= context / high:
                smooth = (context / length - low) / (high - low)
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        found.append(f)
    return np.asarray(found)


def _rotate(x, frequency):
    """x [T, K]: pair i is (x[i], x[i + K / 2])."""
    y = np.empty_like(x)
    half = len(frequency)
    for t in range(len(x)):
        for i in range(half):
            c, s = math.cos(t * frequency[i]), math.sin(t * frequency[i])
            y[t, i] = x[t, i] * c - x[t, i + half] * s
            y[t, i + half] = x[t, i + half] * c + x[t, i] * s
    return y


def _llama(model, w, token_T):
    K, eps = model.get("head_dim", D // N), model["rms_norm_eps"]
    frequency = _frequencies(model, K)
    x = w["model.embed_tokens.weight"][token_T]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        linear = lambda x, name, at=at: (
            x @ w[f"{at}{name}.weight"].T + w.get(f"{at}{name}.bias", np.zeros(1))
        )
        y = _rms(x, w[f"{at}input_layernorm.weight"], eps)
        q, k, v = (linear(y, f"self_attn.{which}_proj") for which in "qkv")
        heads = []
        for n in range(N):
            g = n // (N // G)
            q_n, k_n, v_n = q[:, n * K : (n + 1) * K], *(a[:, g * K : (g + 1) * K] for a in (k, v))
            if model["model_type"] == "qwen3":
                q_n = _rms(q_n, w[f"{at}self_attn.q_norm.weight"], eps)
                k_n = _rms(k_n, w[f"{at}self_attn.k_norm.weight"], eps)
            heads.append(_attention(_rotate(q_n, frequency), _rotate(k_n, frequency), v_n))
        x = x + linear(np.concatenate(heads, -1), "self_attn.o_proj")
        y = _rms(x, w[f"{at}post_attention_layernorm.weight"], eps)
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    x = _rms(x, w["model.norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def _gpt2(w, token_T):
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    linear = lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"]
    x = w["transformer.wte.weight"][token_T] + w["transformer.wpe.weight"][: len(token_T)]
    K = D // N
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        q, k, v = np.split(linear(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn"), 3, axis=-1)
        parts = [slice(n * K, (n + 1) * K) for n in range(N)]
        heads = [_attention(q[:, part], k[:, part], v[:, part]) for part in parts]
        x = x + linear(np.concatenate(heads, -1), f"{at}.attn.c_proj")
        y = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        gelu = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(gelu, f"{at}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
