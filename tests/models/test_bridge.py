"""A module as pure functions: nothing is kept inside it, and nothing is lost on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revnet_jax.models.bridge import PureModule


class Scaled(nnx.Module):
    """A running maximum, and a parameter under a name of its own."""

    def __init__(self, size, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size,)))
        self.largest = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x, *, train):
        y = x * self.weight[...]
        if train:
            self.largest[...] = jnp.maximum(self.largest[...], jnp.max(y))
        return y


MODULE = PureModule(lambda rngs: Scaled(3, rngs))
X = jnp.asarray([1.0, 2.0, 3.0])


def test_apply_is_pure():
    params, stats = MODULE.init(jax.random.key(0))
    assert set(params) == {"weight"}
    assert set(stats) == {"largest"}
    for _ in range(2):
        y, new_stats = MODULE.apply(params, stats, X, train=True)
        np.testing.assert_array_equal(y, X * params["weight"])
        np.testing.assert_array_equal(new_stats["largest"], jnp.maximum(jnp.max(y), 0))
        assert stats["largest"] == 0
    _, new_stats = MODULE.apply(params, {"largest": jnp.float32(7)}, X, train=False)
    assert new_stats["largest"] == 7


def test_init_follows_the_key():
    init = lambda seed: MODULE.init(jax.random.key(seed))[0]["weight"]
    np.testing.assert_array_equal(init(0), init(0))
    assert np.all(np.asarray(init(0) != init(1)))


def test_vmap_of_init_stacks_layers():
    keys = jax.random.split(jax.random.key(0), 4)
    params_L, stats_L = jax.vmap(MODULE.init)(keys)
    assert params_L["weight"].shape == (4, 3)
    assert stats_L["largest"].shape == (4,)
    for key, weight in zip(keys, params_L["weight"], strict=True):
        np.testing.assert_allclose(weight, MODULE.init(key)[0]["weight"], rtol=1e-6)


def test_gradients_flow_through_the_output_and_not_through_running_averages():
    params, stats = jax.tree.map(lambda leaf: leaf + 1, MODULE.init(jax.random.key(0)))

    @jax.jit
    def loss(params):
        y, new_stats = MODULE.apply(params, stats, X, train=True)
        return jnp.sum(y) + 100 * new_stats["largest"]

    np.testing.assert_array_equal(jax.grad(loss)(params)["weight"], X)


def test_other_state_is_refused():
    """Dropout's counter would be lost between calls."""
    with pytest.raises(ValueError, match="Non-exhaustive filters"):
        PureModule(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
