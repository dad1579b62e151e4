"""What is computed in more digits than the rest of a branch, and what is kept in fewer."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """For sums, norms, softmax and logits, whatever the `dtype` of products."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def is_narrowed(path: Any) -> bool:
    """Whether a leaf, by its path in a tree, is a kernel or an embedding, which may be narrowed."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name.endswith("kernel") or name == "embed"


def narrowed(params: Any, dtype: Any) -> Any:
    """Kernels and embeddings, by name, in this dtype; normalisations and biases as they are."""
    narrow = lambda path, leaf: leaf.astype(dtype) if is_narrowed(path) else leaf
    return params if dtype == jnp.float32 else jax.tree_util.tree_map_with_path(narrow, params)
