"""Low-rank adaptation of the decoder's kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.models import LanguageModel, LanguageModelShape, ModelOptions, Variables
from revnet_jax.models.transformer.linear import merged_kernel
from tests import thorough

V, RANK = 17, 3
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"vocab_size": V, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24}
KINDS = [thorough({}), {"bias": "all", "activation": "gelu"}]


def model(**changes):
    shape = LanguageModelShape(**(SIZES | changes))
    return LanguageModel(shape, ModelOptions("reverse", grid=None, compute_dtype=jnp.float64))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapted_kernels_are_their_sum(kind):
    """In float64: W + alpha / rank A B. The adapters start at no difference."""
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        token_BT = jax.random.randint(jax.random.key(1), (2, 9), 0, V)
        adapted, plain = model(lora_rank=RANK, lora_alpha=7.0, **kind), model(**kind)
        params = jit(adapted.init)(jax.random.key(0)).params
        start = {**params, "layers": merged(params["layers"])}
        assert jax.tree.structure(start) == jax.tree.structure(
            jax.eval_shape(plain.init, jax.random.key(0)).params
        )
        logits = jit(plain.logits)(Variables(start, {}), token_BT)
        np.testing.assert_allclose(
            jit(adapted.logits)(Variables(params, {}), token_BT), logits, atol=1e-12
        )
        moved = jax.tree_util.tree_map_with_path(_moved, params)
        alike = {**moved, "layers": merged(moved["layers"])}
        expected = jit(plain.logits)(Variables(alike, {}), token_BT)
        found = jit(adapted.logits)(Variables(moved, {}), token_BT)
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert np.abs(found - logits).max() > 1e-2
        kernel, a, b = (moved["layers"][1]["up"][name] for name in ("kernel", "lora_a", "lora_b"))
        by_hand = kernel + 7.0 / RANK * np.einsum("lir,lrno->lino", a, b)
        np.testing.assert_allclose(alike["layers"][1]["up"]["kernel"], by_hand, atol=1e-12)


def merged(params):
    """The layers without adapters, which are added to their kernels."""
    if isinstance(params, tuple):
        return tuple(map(merged, params))
    if not isinstance(params, dict):
        return params
    rest = {name: merged(part) for name, part in params.items() if not name.startswith("lora_")}
    if "lora_a" in params:
        matrices = (params[name] for name in ("kernel", "lora_a", "lora_b"))
        one = lambda *matrices: merged_kernel(*matrices, 7.0 / RANK)
        rest["kernel"] = jax.vmap(one)(*matrices)
    return rest


def _moved(path, leaf):
    """As after some training: the second matrices are no longer zero."""
    name = jax.tree_util.keystr(path, simple=True)
    if not name.endswith("lora_b"):
        return leaf
    return jax.random.normal(jax.random.key(len(name)), leaf.shape, leaf.dtype)


def test_adapters_stay_wide_where_kernels_are_narrow():
    options = ModelOptions("reverse", param_dtype=jnp.bfloat16)
    lm = LanguageModel(LanguageModelShape(**SIZES, lora_rank=RANK), options)
    qkv = jax.eval_shape(lm.init, jax.random.key(0)).params["layers"][0]["qkv"]
    assert qkv["kernel"].dtype == jnp.bfloat16
    assert qkv["lora_a"].dtype == qkv["lora_b"].dtype == jnp.float32


def test_experts_have_no_adapters():
    with pytest.raises(ValueError, match="got lora_rank=2 and experts=4, expected 0, or a rank"):
        LanguageModelShape(**SIZES, lora_rank=2, experts=4)
