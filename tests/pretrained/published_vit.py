"""A tiny vision transformer as timm publishes them, and its logits in plain NumPy and float64.

Written from the published format, with none of the package's mapping of names.

Dims: H rows, W columns, C channels, T class token and patches, N heads, D width, F hidden width, V
classes.
"""

import json
import math

import numpy as np

H, W, C, P, D, F, N, V, LAYERS = 8, 12, 3, 4, 24, 60, 4, 5, 2
T = 1 + H // P * (W // P)
PRETRAINED = {"input_size": [C, H, W], "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.125]}
MODEL = {
    "architecture": "vit_small_patch16_224",
    "num_classes": V,
    "num_features": D,
    "global_pool": "token",
    "model_args": {
        **{"img_size": [H, W], "patch_size": P, "embed_dim": D, "depth": LAYERS, "num_heads": N},
        **{"mlp_ratio": F / D, "num_classes": V, "drop_path_rate": 0.1},
    },
    "pretrained_cfg": PRETRAINED,
}


def changed(**args):
    """The config.json with other arguments of the class."""
    return {**MODEL, "model_args": {**MODEL["model_args"], **args}}


def shapes():
    """The shape of every tensor by name."""
    layer = {
        **{f"norm{i}.{name}": (D,) for i in (1, 2) for name in ("weight", "bias")},
        **{"attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,)},
        **{"attn.proj.weight": (D, D), "attn.proj.bias": (D,)},
        **{"mlp.fc1.weight": (F, D), "mlp.fc1.bias": (F,)},
        **{"mlp.fc2.weight": (D, F), "mlp.fc2.bias": (D,)},
    }
    return {
        **{"cls_token": (1, 1, D), "pos_embed": (1, T, D)},
        **{"patch_embed.proj.weight": (D, C, P, P), "patch_embed.proj.bias": (D,)},
        **{f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()},
        **{"norm.weight": (D,), "norm.bias": (D,), "head.weight": (V, D), "head.bias": (V,)},
    }


def tensors():
    """Random tensors by name, in which no norm or bias is what an untrained one is."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
    found = {name: draw(shape) + ("norm" in name) for name, shape in shapes().items()}
    return {name: x.astype(np.float32) for name, x in found.items()}


def write(folder, model=MODEL, found=None):
    """Writes config.json and the tensors. Returns the tensors."""
    from safetensors.numpy import save_file

    found = tensors() if found is None else found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    save_file(found, folder / "model.safetensors")
    return found


def logits(model, found, image_HWC):
    """The logits [V] of a normalised image, from all tensors in float64."""
    w = {name: np.asarray(x, np.float64) for name, x in found.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    kernel_DCPP, bias_D = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    x_TD = [w["cls_token"][0, 0]]
    for row in range(0, image_HWC.shape[0], P):
        for column in range(0, image_HWC.shape[1], P):
            patch_PPC = image_HWC[row : row + P, column : column + P]
            x_TD.append(np.einsum("dcij,ijc->d", kernel_DCPP, patch_PPC) + bias_D)
    x_TD = np.stack(x_TD) + w["pos_embed"][0]
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        q, k, v = np.split(linear(norm(x_TD, f"{at}.norm1"), f"{at}.attn.qkv"), 3, axis=-1)
        heads = []
        for n in range(N):
            part = slice(n * D // N, (n + 1) * D // N)
            score = np.exp(q[:, part] @ k[:, part].T / math.sqrt(D // N))
            heads.append(score / score.sum(-1, keepdims=True) @ v[:, part])
        x_TD = x_TD + linear(np.concatenate(heads, -1), f"{at}.attn.proj")
        y = linear(norm(x_TD, f"{at}.norm2"), f"{at}.mlp.fc1")
        x_TD = x_TD + linear(_gelu(model, y), f"{at}.mlp.fc2")
    return linear(norm(x_TD, "norm"), "head")[0]


def _gelu(model, x):
    if model["model_args"].get("act_layer") == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
