"""Published vision transformers become a run, and come back; what is not one is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import vision_transformer
from revnet_jax.errors import UserError
from revnet_jax.models import ModelOptions, Variables, VisionTransformer
from revnet_jax.pretrained.description import Description
from revnet_jax.pretrained.exporting import description_of, export_weights, family_for
from revnet_jax.pretrained.importing import import_weights
from revnet_jax.pretrained.vit import VIT, settings_of_vit
from revnet_jax.runs.manifest import by_path
from revnet_jax.runs.workdir import claim, load_config
from revnet_jax.training.restore import restore_run
from tests import thorough
from tests.pretrained import published_vit as published
from tests.pretrained.test_bad_files import files_under, refusal
from tests.pretrained.test_import import same_bits, stored

pytest.importorskip("safetensors", reason="needs the extra pretrained")
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
H, W, C, V = published.H, published.W, published.C, published.V


@pytest.fixture
def source(tmp_path):
    published.write(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("changes", [{}, thorough({"act_layer": "gelu_tanh"})])
def test_logits_are_those_of_the_naive_model(changes, tmp_path):
    model = published.changed(**changes)
    found = published.write(tmp_path / "source", model)
    report = import_weights(tmp_path / "source", tmp_path / "run")
    assert report == {"model_type": "vit", "num_params": sum(x.size for x in found.values())}
    run = restore_run(tmp_path / "run")
    image_BHWC = np.random.default_rng(1).normal(size=(2, H, W, C))
    expected = np.stack([published.logits(model, found, image) for image in image_BHWC])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        options = ModelOptions(backprop="remat", compute_dtype=jnp.float64)
        network = VisionTransformer(run.task.network.shape, options)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), run.variables.params)
        apply = jit(lambda params, image: network.apply(params, image, train=False)[0])
        np.testing.assert_allclose(
            apply(Variables(params, {}), image_BHWC), expected, rtol=0, atol=1e-9
        )
    apply = jit(lambda variables, image: run.task.network.apply(variables, image, train=False)[0])
    narrow_BV = apply(run.variables, jnp.asarray(image_BHWC, jnp.float32))
    np.testing.assert_allclose(narrow_BV, expected, rtol=0, atol=1e-4)


def test_what_was_imported_is_exported_bit_for_bit(source, tmp_path):
    import_weights(source, tmp_path / "run")
    export_weights(tmp_path / "run", tmp_path / "out")
    same_bits(stored(tmp_path / "out"), published.tensors())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in ("model_args", "pretrained_cfg"):
        expected = {k: v for k, v in published.MODEL[part].items() if k != "drop_path_rate"}
        assert expected.items() <= written[part].items()
    import_weights(tmp_path / "out", tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(tmp_path / "run")
    data = load_config(tmp_path / "run").data
    assert (data.image_shape, data.num_classes) == ((H, W, C), V)
    assert (data.mean, data.std) == ((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))


def test_every_parameter_is_in_one_tensor(source, tmp_path):
    import_weights(source, tmp_path / "run")
    network = restore_run(tmp_path / "run").task.network
    shapes = by_path(jax.eval_shape(network.init, jax.random.key(0)).params)
    leaves = {path: np.zeros(leaf.shape, int) for path, leaf in shapes.items()}
    for tensor in VIT.tensors(network.shape):
        view = tensor.view(leaves[tensor.path])
        assert view.size == np.prod(tensor.shape)
        view += 1
    assert all(np.all(leaf == 1) for leaf in leaves.values())


@pytest.mark.thorough
def test_a_new_head_starts_at_zero(tmp_path):
    """For other classes, and for models that were published without classes."""
    found = published.tensors()
    headless = {name: x for name, x in found.items() if not name.startswith("head.")}
    without = {**published.changed(num_classes=0), "num_classes": 0}
    sources = {"other": (published.MODEL, found), "none": (without, headless)}
    for name, (model, tensors) in sources.items():
        published.write(tmp_path / name, model, tensors)
        import_weights(tmp_path / name, tmp_path / f"{name}_run", num_classes=7)
        run = restore_run(tmp_path / f"{name}_run")
        assert run.config.data.num_classes == 7
        head = run.variables.params["head"]["out"]
        assert (head["kernel"].shape, head["bias"].shape) == ((24, 7), (7,))
        assert not np.any(head["kernel"])
        assert not np.any(head["bias"])
        export_weights(tmp_path / f"{name}_run", tmp_path / f"{name}_out")
        out = stored(tmp_path / f"{name}_out")
        assert (out.pop("head.weight").shape, out.pop("head.bias").shape) == ((7, 24), (7,))
        same_bits(out, headless)
    assert "got a model without classes, expected --num_classes" in refusal(
        tmp_path / "none", tmp_path / "run"
    )
    import_weights(tmp_path / "other", tmp_path / "same", num_classes=V)
    head = restore_run(tmp_path / "same").variables.params["head"]["out"]
    np.testing.assert_array_equal(head["kernel"].T, found["head.weight"])


@pytest.mark.parametrize(
    ("size", "hidden", "name"),
    [
        ("Ti", 768, "vit_tiny_patch16_224"),
        ("H", 5120, "vit_huge_patch14_224"),
        ("S", 1007, "vit_small_patch16_224"),
    ],
)
def test_a_run_of_ours_is_described(size, hidden, name, tmp_path):
    """The widths of all feed-forward networks survive, although timm rounds their ratio down."""
    config = vision_transformer(size)
    config.model.hidden, config.model.reversible = hidden, False
    config.data.name = "image_folder"
    written = description_of(config, family_for(config), "float32")
    assert written["architecture"] == name
    assert written["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    (tmp_path / "config.json").write_text(json.dumps(written))
    settings = settings_of_vit(Description(tmp_path / "config.json"))
    assert settings == {name: config.model[name] for name in settings}
    config.model.width = 1408  # one of those with which rounding errors occur
    for hidden in range(1, 2000):
        config.model.hidden = hidden
        ratio = description_of(config, VIT, "float32")["model_args"]["mlp_ratio"]
        assert int(config.model.width * ratio) == hidden


NORM = "blocks.1.norm2.weight"
TENSORS = {
    "missing": ({NORM: None}, f"got no {NORM}, expected the tensors of a vit as its config.json"),
    "extra": ({"fc_norm.bias": np.ones(3, np.float32)}, "got the unknown fc_norm.bias, expected"),
    "shape": ({NORM: np.ones(25, np.float32)}, f"got {NORM} of (25,), expected (24,)"),
    "dtype": ({NORM: np.ones(24, np.int8)}, f"got {NORM} in I8, expected F32, BF16, F16, F64"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_model(name, source, tmp_path):
    changes, message = TENSORS[name]
    found = {name: x for name, x in (published.tensors() | changes).items() if x is not None}
    published.write(source, published.MODEL, found)
    assert message in refusal(source, tmp_path / "run")


DESCRIPTIONS = {
    "a ResNet": ({"architecture": "resnet50"}, "got architecture=resnet50, expected the name of a"),
    "another kind": ({"architecture": "vit_base_patch16_clip_224"}, "expected the name of a plain"),
    "a number": ({"architecture": 3}, "got architecture=3, expected a string"),
    "of transformers": (
        {"architecture": None, "model_type": "vit"},
        "got model_type=vit, expected",
    ),
    "pooling": ({"global_pool": "avg"}, "got global_pool=avg, expected 'token'"),
    "classes": ({"num_classes": -1, "model_args": {}}, "got num_classes=-1, expected a whole"),
    "no image": ({"pretrained_cfg": None}, "got input_size=None, expected 3 numbers"),
    "no arguments": ({"model_args": None}, "got patch=16 for images of (8, 12), expected a"),
    "a list": ({"model_args": [1]}, "got model_args=[1], expected an object"),
}
ARGUMENTS = {
    "norms": ({"qk_norm": True}, "got qk_norm=True, expected None"),
    "no biases": ({"qkv_bias": False}, "got qkv_bias=False, expected True"),
    "layer scale": ({"init_values": 1e-5}, "got init_values=1e-05, expected None"),
    "activation": ({"act_layer": "silu"}, "got act_layer=silu, expected 'gelu' or 'gelu_tanh'"),
    "heads": ({"num_heads": 5}, "got heads=5, expected a divisor of the width 24"),
    "patches": ({"patch_size": 5}, "got patch=5 for images of (8, 12), expected a divisor"),
    "size": ({"img_size": "8"}, "got img_size=8, expected 2 numbers"),
    "a size too large": ({"img_size": 10**400}, "got img_size=1000"),
    "sizes too large": ({"img_size": [8, 10**400]}, "got img_size=[8, 1000"),
    "a ratio too large": ({"mlp_ratio": 1e308}, "config.model.hidden: got 2147483648, expected"),
    "a width too large": ({"embed_dim": 10**400}, "config.model.hidden: got 2147483648"),
    "another depth": ({"depth": 1}, "got the unknown 12, such as blocks.1."),
}


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *ARGUMENTS])
def test_descriptions_of_another_model(name, source, tmp_path):
    changes, message = DESCRIPTIONS.get(name) or ARGUMENTS[name]
    model = {**published.MODEL, **changes} if name in DESCRIPTIONS else published.changed(**changes)
    (source / "config.json").write_text(json.dumps(model))
    assert message in refusal(source, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("size", [None, -40])
def test_files_that_are_missing_or_cut_short(name, size, source, tmp_path):
    path = source / name
    content = path.read_bytes()
    path.unlink() if size is None else path.write_bytes(content[:size])
    assert str(path if size is not None else source) in refusal(source, tmp_path / "run")


@pytest.mark.parametrize("name", ["cifar10", "digits", "mine:load"])
def test_a_normalisation_that_timm_would_not_know(name, tmp_path):
    config = vision_transformer()
    config.model.reversible = False
    config.data.name = name
    (tmp_path / "run").mkdir()
    claim(tmp_path / "run", config, {})
    before = files_under(tmp_path)
    with pytest.raises(UserError, match=rf"^config.data.mean: got none for a run on {name}, exp"):
        export_weights(tmp_path / "run", tmp_path / "out")
    assert files_under(tmp_path) == before
    config.data.update({"mean": (0.5,), "std": (0.25,)})
    written = description_of(config, VIT, "float32")["pretrained_cfg"]
    assert (written["mean"], written["std"]) == ([0.5], [0.25])


def test_a_context_is_one_of_decoders(source, tmp_path):
    assert "got context=16 for a vit, expected 0: it has none" in refusal(
        source, tmp_path / "run", context=16
    )


EXPORTS = {
    "streams": ({"reversible": True}, "got True with integrator='streams', expected False, or"),
    "pooling": ({"pool": "mean"}, "config.model.pool: got 'mean', expected 'token': a vit"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_runs_that_no_family_has(name):
    changes, message = EXPORTS[name]
    config = vision_transformer()
    config.model.update({"reversible": False, **changes})
    with pytest.raises(UserError) as caught:
        family_for(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
