"""Imported and exported vision transformers against the library that they were published for."""

import importlib.util
import os

import jax
import numpy as np
import pytest

from revnet_jax.config import VIT_SIZES
from revnet_jax.pretrained.exporting import export_weights
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.pretrained.vit import ARCHITECTURE, NAMES
from revnet_jax.training.restore import restore_run

_HAS = all(importlib.util.find_spec(name) for name in ("timm", "torch", "safetensors"))
pytestmark = [
    pytest.mark.timm,
    pytest.mark.skipif(not _HAS, reason="needs timm: scripts/setup.sh timm"),
    # Those of other libraries' own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SMALL = {"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4, "num_classes": 7}
MODELS = {
    "tiny": ("vit_tiny_patch16_224", {}),
    "deit": ("deit_small_patch16_224", {**SMALL, "img_size": 32}),
    "oblong": ("vit_base_patch16_224", {**SMALL, "img_size": (24, 40), "mlp_ratio": 2.4}),
    "grey": ("vit_base_patch32_384", {**SMALL, "img_size": 16, "in_chans": 1}),
    "tanh": ("vit_base_patch16_224", {**SMALL, "img_size": 16, "act_layer": "gelu_tanh"}),
}


def logits_of(model, image_BHWC):
    import torch

    with torch.no_grad():
        return model(torch.tensor(image_BHWC.transpose(0, 3, 1, 2))).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_import_computes_the_same_and_export_is_the_same(name, tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    import timm
    import torch

    architecture, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **arguments).eval()
    with torch.no_grad():  # norms and biases must not be those of an untrained model either
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    timm.models.save_for_hf(model, tmp_path / "source", safe_serialization=True)

    import_weights(tmp_path / "source", tmp_path / "run")
    run = restore_run(tmp_path / "run")
    shape = run.task.network.shape.image_shape
    image_BHWC = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    expected_BV = logits_of(model, image_BHWC)
    apply = jax.jit(lambda variables, x: run.task.network.apply(variables, x, train=False)[0])
    assert np.std(expected_BV) > 0.1
    np.testing.assert_allclose(apply(run.variables, image_BHWC), expected_BV, rtol=0, atol=1e-4)

    export_weights(tmp_path / "run", tmp_path / "out")
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    np.testing.assert_array_equal(logits_of(exported, image_BHWC), expected_BV)
    assert tuple(exported.pretrained_cfg["input_size"]) == (shape[2], *shape[:2])
    for name in ("mean", "std"):
        assert set(exported.pretrained_cfg[name]) == set(model.pretrained_cfg[name])


def test_every_known_name_is_one_network():
    """Names that the pattern matches have the sizes and arguments that it stands for."""
    import timm
    import torch

    names = [name for name in timm.list_models() if ARCHITECTURE.fullmatch(name)]
    assert len(names) > 20
    for name in names:
        size, patch = ARCHITECTURE.fullmatch(name).groups()
        with torch.device("meta"):
            model = timm.create_model(name)
        block = model.blocks[0]
        sizes = len(model.blocks), model.embed_dim, block.attn.num_heads
        assert sizes == VIT_SIZES[NAMES[size]]
        assert model.patch_embed.patch_size == (int(patch),) * 2
        assert block.mlp.fc1.out_features == 4 * model.embed_dim
        assert model.norm.eps == block.norm1.eps == 1e-6
        assert isinstance(block.mlp.act, torch.nn.GELU)
        assert block.mlp.act.approximate == "none"
        assert model.pos_embed.shape[1] == 1 + model.patch_embed.num_patches
