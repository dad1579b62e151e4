"""What is computed in more digits than the rest of a branch."""

from typing import Any

import jax.numpy as jnp


def at_least_float32(dtype: Any) -> Any:
    """For sums, norms, softmax and logits, whatever the `dtype` of products."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
