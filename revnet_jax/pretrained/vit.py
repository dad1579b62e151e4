"""Vision transformers as timm publishes them (Dosovitskiy et al. 2020, arXiv:2010.11929; DeiT,
arXiv:2012.12877): a class token, layer normalisation before each branch, biases everywhere.

The name of the architecture gives the sizes, and `model_args` what differs from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from revnet_jax.config import VIT_SIZES, vision_transformer
from revnet_jax.data.image_folder import IMAGENET_MEAN, IMAGENET_STD
from revnet_jax.models import VisionTransformerShape
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.files import WeightsError
from revnet_jax.pretrained.layout import PublishedFamily, Tensor, as_it_is, transposed

NAMES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
ARCHITECTURE = re.compile(rf"(?:vit|deit)_({'|'.join(NAMES)})_patch(\d+)_\d+")
GELU = {"gelu": "erf", "gelu_tanh": "tanh"}
# Arguments of timm's class that are read, and those that only initialise or train a network.
READ = r"embed_dim|depth|num_heads|mlp_ratio|patch_size|act_layer|img_size|in_chans|num_classes"
READ += r"|weight_init|\w+_rate"
PLAIN = {"global_pool": "token", "class_token": True, "qkv_bias": True}  # of others; or absent


def settings_of_vit(found: Description) -> dict[str, Any]:
    """The settings of a vision transformer."""
    found.only("global_pool", "token")
    example = "the name of a plain vision transformer, such as vit_base_patch16_224"
    name, patch = found.matching("architecture", ARCHITECTURE, example).groups()
    args = found.part("model_args")
    for each in args.names:
        if not re.fullmatch(READ, each):
            args.only(each, PLAIN.get(each))
    args.only("act_layer", *GELU)
    layers, width, heads = VIT_SIZES[NAMES[name]]
    width, ratio = args.whole("embed_dim", width), args.number("mlp_ratio", 4.0)
    most = 2**31  # out of range, but the product of larger ones may be too large for a float
    return {
        "layers": args.whole("depth", layers),
        "width": width,
        "heads": args.whole("num_heads", heads),
        # Rounded down, as in timm.
        "hidden": int(width * ratio) if max(width, ratio) < most else most,
        "patch": args.whole("patch_size", int(patch)),
        "gelu": GELU[args.text("act_layer", "gelu")],
    }


def data_of_vit(found: Description) -> dict[str, Any]:
    """The settings of images as they were published for: their size and normalisation."""
    args, data = found.part("model_args"), found.part("pretrained_cfg")
    channels, *size = map(int, data.numbers("input_size", 3))
    height, width = map(int, args.numbers("img_size", 2, size))
    channels = args.whole("in_chans", channels)
    return {
        "name": "image_folder",
        "image_shape": (height, width, channels),
        "num_classes": args.whole("num_classes", found.whole("num_classes", low=0), low=0),
        "mean": data.numbers("mean", channels),
        "std": data.numbers("std", channels),
    }


def describe_vit(model: Any, data: Any) -> dict[str, Any]:
    """The config.json of a vision transformer."""
    sizes = model.layers, model.width, model.heads
    name = next((name for name, key in NAMES.items() if VIT_SIZES[key] == sizes), "base")
    height, width, channels = data.image_shape
    ratio = model.hidden / model.width
    if int(model.width * ratio) != model.hidden:  # rounded down, as in timm
        ratio = (model.hidden + 0.5) / model.width
    classes = {"num_classes": data.num_classes}
    return {
        "architecture": f"vit_{name}_patch{14 if name == 'huge' else 16}_224",
        **classes,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": {
            **{"in_chans": channels, "img_size": [height, width], "patch_size": model.patch},
            **{"embed_dim": model.width, "depth": model.layers, "num_heads": model.heads},
            **{"mlp_ratio": ratio, **classes},
            "act_layer": next(name for name, gelu in GELU.items() if gelu == model.gelu),
        },
        "pretrained_cfg": {
            **{"input_size": [channels, height, width], "fixed_input_size": True, **classes},
            **{"first_conv": "patch_embed.proj", "classifier": "head", "custom_load": False},
            **_normalisation(data),
        },
    }


def _normalisation(data: Any) -> dict[str, list[float]]:
    """How the images of a run were normalised. Without it timm assumes ImageNet's."""
    if data.mean:
        return {"mean": list(data.mean), "std": list(data.std)}
    if data.name == "image_folder":
        return {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    raise WeightsError(
        f"config.data.mean: got none for a run on {data.name}, expected data.mean and data.std set "
        "in training, or image_folder: timm would normalise images as those of ImageNet"
    )


def tensors_of_vit(a: VisionTransformerShape) -> Iterator[Tensor]:
    """The tensors of a vision transformer."""
    D, V, p = a.width, a.num_classes, a.patch
    height, width, C = a.image_shape
    T = 1 + height // p * (width // p)
    # Theirs has the channels of a patch before its rows and columns, ours after them.
    pixels_first = lambda kernel: np.moveaxis(kernel.reshape(p, p, C, D), (3, 2), (0, 1))
    yield Tensor("cls_token", (1, 1, D), "stem/token", as_it_is)
    yield Tensor("pos_embed", (1, T, D), "stem/position", as_it_is)
    yield Tensor("patch_embed.proj.weight", (D, C, p, p), "stem/embed/kernel", pixels_first)
    yield Tensor("patch_embed.proj.bias", (D,), "stem/embed/bias", as_it_is)
    for layer in range(a.layers):
        for name, shape, path, part in _layer(a):
            yield Tensor(f"blocks.{layer}.{name}", shape, f"layers/{path}", part, layer)
    yield Tensor("norm.weight", (D,), "head/norm/scale", as_it_is)
    yield Tensor("norm.bias", (D,), "head/norm/bias", as_it_is)
    yield Tensor("head.weight", (V, D), "head/out/kernel", transposed)
    yield Tensor("head.bias", (V,), "head/out/bias", as_it_is)


def _layer(a):
    """(name, shape, path of our parameter, its part) of the tensors of a layer."""
    D, F = a.width, a.hidden
    # Theirs has all queries, then all keys, then all values; ours has the three of each head.
    heads_last = lambda leaf: leaf.reshape(*leaf.shape[:-1], a.heads, 3, D // a.heads)
    in_thirds = lambda leaf: np.swapaxes(heads_last(leaf), -3, -2)
    yield "attn.qkv.weight", (3 * D, D), "0/qkv/kernel", lambda x: np.moveaxis(in_thirds(x), 0, -1)
    yield "attn.qkv.bias", (3 * D,), "0/qkv/bias", in_thirds
    linear = {"attn.proj": ("0/out", D, D), "mlp.fc1": ("1/up", F, D), "mlp.fc2": ("1/down", D, F)}
    for name, (path, outputs, inputs) in linear.items():
        yield f"{name}.weight", (outputs, inputs), f"{path}/kernel", transposed
        yield f"{name}.bias", (outputs,), f"{path}/bias", as_it_is
    for branch in (0, 1):
        yield f"norm{branch + 1}.weight", (D,), f"{branch}/norm/scale", as_it_is
        yield f"norm{branch + 1}.bias", (D,), f"{branch}/norm/bias", as_it_is


VIT = PublishedFamily(
    model_type="vit",
    fixed={"pool": "token"},
    base=vision_transformer,
    data=data_of_vit,
    settings=settings_of_vit,
    describe=describe_vit,
    tensors=tensors_of_vit,
    head=r"^head\.",
)
