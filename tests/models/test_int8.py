"""Kernels in 8 bits: how far they are from what they keep, and what the decoder makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model, vision_transformer
from revnet_jax.models import LanguageModel, LanguageModelShape, ModelOptions, Variables
from revnet_jax.models.int8 import dequantized, quantized
from revnet_jax.models.partition import spec_of
from revnet_jax.training.build import build_recipe
from revnet_jax.training.sharding import make_mesh
from tests import thorough

V = 17
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"vocab_size": V, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outputs", [(12,), (2, 6)], ids=str)
def test_a_weight_is_kept_to_half_a_scale(outputs, dtype):
    """Channels of zeros, of tiny and of huge numbers too; against float64."""
    w = jax.random.normal(jax.random.key(0), (40, *outputs))
    w = w.at[:, ..., 1].set(0).at[:, ..., 2].multiply(1e-30).at[3, ..., 3].set(1e30).astype(dtype)
    with jax.debug_nans(True):  # a channel of zeros divides by no zero
        numbers, scale = quantized(w)
    assert (numbers.dtype, numbers.shape) == (jnp.int8, w.shape)
    assert (scale.dtype, scale.shape) == (jnp.float32, outputs)
    wide, q, s = (np.asarray(x, np.float64) for x in (w, numbers, scale))
    np.testing.assert_allclose(s, np.abs(wide).max(axis=0) / 127, rtol=1e-6)
    # The scale and the quotient are rounded to float32.
    assert np.all(np.abs(wide - q * s) <= s / 2 * (1 + 2**-15))
    largest = np.abs(q).max(axis=0)
    np.testing.assert_array_equal(largest, np.where(s > 0, 127, 0))
    np.testing.assert_allclose(
        dequantized(np.asarray(numbers), np.asarray(scale)), q * s, rtol=1e-6
    )


def model(backprop="reverse", **changes):
    shape = LanguageModelShape(**(SIZES | {"lora_rank": 3} | changes))
    return LanguageModel(shape, ModelOptions(backprop, grid=None, compute_dtype=jnp.float64))


@pytest.mark.parametrize(
    "kind", [{}, thorough({"bias": "all", "activation": "gelu"}), thorough({"reversible": False})]
)
def test_the_network_is_that_of_its_kernels_as_floats(kind):
    """In float64: its logits, and the gradient of its adapters."""
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        small, plain = model("store", frozen_dtype="int8", **kind), model("store", **kind)
        params = jit(small.init)(jax.random.key(0)).params
        params = jax.tree_util.tree_map_with_path(_moved, params)
        kernels = [x for x in jax.tree.leaves(params["layers"]) if x.dtype == jnp.int8]
        assert len(kernels) == 4
        token_BT = jax.random.randint(jax.random.key(1), (2, 9), 0, V)

        def gradient(network, layers):
            is_adapter = lambda path: "lora" in jax.tree_util.keystr(path)

            def loss(adapters):
                leaf = lambda path, x: adapters.get(jax.tree_util.keystr(path), x)
                full = jax.tree_util.tree_map_with_path(leaf, layers)
                logits = network.logits(Variables({**params, "layers": full}, {}), token_BT)
                return jnp.sum(jnp.sin(logits)), logits

            leaves = jax.tree_util.tree_leaves_with_path(layers)
            adapters = {jax.tree_util.keystr(p): x for p, x in leaves if is_adapter(p)}
            return jit(jax.grad(loss, has_aux=True))(adapters)

        grads, logits = gradient(small, params["layers"])
        naive, expected = gradient(plain, as_floats(params["layers"]))
        np.testing.assert_allclose(logits, expected, atol=1e-12)
        assert len(grads) == 8
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, naive[name], rtol=1e-10, atol=1e-10)
            assert np.abs(grad).max() > 1e-4


def as_floats(params):
    """Layers without scales, by which the kernels are multiplied."""
    if isinstance(params, tuple):
        return tuple(map(as_floats, params))
    if not isinstance(params, dict):
        return params
    rest = {name: as_floats(part) for name, part in params.items() if name != "kernel_scale"}
    if "kernel_scale" in params:
        rest["kernel"] = jax.vmap(dequantized)(params["kernel"], params["kernel_scale"])
    return rest


def _moved(path, leaf):
    """As after some training: the second matrices are no longer zero."""
    name = jax.tree_util.keystr(path, simple=True)
    if not name.endswith("lora_b"):
        return leaf
    return 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape, leaf.dtype)


def test_other_parameters_keep_their_dtype():
    options = ModelOptions("reverse", param_dtype=jnp.bfloat16)
    lm = LanguageModel(LanguageModelShape(**SIZES, lora_rank=3, frozen_dtype="int8"), options)
    params = jax.eval_shape(lm.init, jax.random.key(0)).params
    assert params["embed"].dtype == params["head"]["kernel"].dtype == jnp.bfloat16
    for name, leaf in params["layers"][1]["down"].items():
        assert leaf.dtype == (jnp.int8 if name == "kernel" else jnp.float32)


def test_scales_are_split_like_their_channels():
    """Over "tensor"; over "fsdp" they are needed whole."""
    mesh = make_mesh(jax.devices(), data=1, tensor=2)
    lm = model(frozen_dtype="int8")
    layers = jax.eval_shape(lm.init, jax.random.key(0)).params["layers"]
    for i, name in ((0, "qkv"), (0, "out"), (1, "up"), (1, "down")):
        linear, path = layers[i][name], f"layers/{i}/{name}/kernel"
        kernel = spec_of(lm.rules, path, linear["kernel"].shape, mesh)
        scale = spec_of(lm.rules, f"{path}_scale", linear["kernel_scale"].shape, mesh)
        assert (scale[-1:] == ("tensor",)) == (kernel[-1] == "tensor") == (name in ("qkv", "up"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.frozen_dtype": "int4"}, "config.model: got frozen_dtype='int4' and lora_rank=2, "),
        (
            {"model.lora_rank": 0},
            "frozen_dtype='int8' and lora_rank=0, expected '', or int8 with a",
        ),
        ({"optimizer.trainable": ""}, r"trainable='', which matches layers/0/\w+/kernel of int8"),
        (
            {"optimizer.trainable": "up|lora"},
            "which matches layers/1/up/kernel of int8, expected a",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, message):
    config = language_model()
    fitting = {"model.lora_rank": 2, "optimizer.trainable": "lora", "model.frozen_dtype": "int8"}
    config.update_from_flattened_dict(fitting)
    build_recipe(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message) as caught:
        build_recipe(config)
    assert "\n" not in str(caught.value)


def test_other_families_have_no_such_setting():
    config = vision_transformer()
    with config.unlocked():
        config.model.frozen_dtype = "int8"
    with pytest.raises(ConfigError, match="differ from those of a vit in frozen_dtype, expected"):
        build_recipe(config)
