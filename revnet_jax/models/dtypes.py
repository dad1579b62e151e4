"""Mixed precision: what is computed in at least float32, and which parameters may be narrowed."""

from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import trees


def at_least_float32(dtype: Any) -> Any:
    """The dtype for sums, norms, softmax and logits: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# The decoder's embeddings, of tokens and of positions. Not those that the ViT adds, "position" and
# "token": their dtype is that of its streams, which stay in float32. Checkpoints hold these names.
_NARROWED_EMBEDDINGS = ("embed", "positions")


def is_narrowed(path: Any) -> bool:
    """Whether the leaf at this path is a kernel or an embedding, which `param_dtype` applies to."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    # Not low-rank adapters, `lora_a` and `lora_b`: they stay in float32.
    return name.endswith("kernel") or name in _NARROWED_EMBEDDINGS


def narrowed(params: Any, dtype: Any) -> Any:
    """Casts kernels and embeddings to this dtype; normalisations and biases keep theirs.

    Kernels in 8 bits (`models/int8.py`) stay as they are.
    """
    is_cast = lambda path, leaf: is_narrowed(path) and trees.is_inexact(leaf)
    narrow = lambda path, leaf: leaf.astype(dtype) if is_cast(path, leaf) else leaf
    # float32 is no cast, so that parameters that were initialised in float64 keep it.
    return params if dtype == jnp.float32 else jax.tree_util.tree_map_with_path(narrow, params)
