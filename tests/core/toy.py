"""A small reversible block that uses everything a branch may use, for the tests of the core."""

import functools

import jax
import jax.numpy as jnp

from revnet_jax.core import Grid, reversible_block

WIDTH, ROWS = 6, 5
# Values do not depend on how hard the compiler tries, and these tests mostly compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def f(params, x, context):
    """Dropout from a per-layer key, a shared input, a float and an integer auxiliary output."""
    hidden = jnp.tanh(x @ params["w"] + params["b"][None]) * context.shared["scale"]
    keep = jax.random.bernoulli(context.data["key"], 0.8, hidden.shape)
    u = jnp.where(keep, hidden, jnp.zeros_like(hidden)) @ params["v"]
    return u, {"moment": hidden.mean(axis=0), "choice": jnp.argmax(hidden, axis=-1)}


def g(params, x, context):
    """Reads integers from the shared input, and data that is a float but not differentiated."""
    hidden = jax.nn.gelu(x @ params["w"])[:, context.shared["order"]]
    return hidden * context.data["rate"], {"energy": jnp.sum(hidden**2)}


def block(grid=Grid()):
    return reversible_block(f, g, has_aux=True, grid=grid)


def arguments(depth, dtype=jnp.float32, *, typed_keys=True):
    """(params_L, x, shared, data_L) for `block()`."""
    k = jax.random.split(jax.random.key(depth), 7)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    square = (depth, WIDTH, WIDTH)
    params_f = {
        "w": normal(k[0], *square) / 2,
        "b": normal(k[1], depth, WIDTH),
        "v": normal(k[2], *square) / 2,
    }
    x = (normal(k[3], ROWS, WIDTH), normal(k[4], ROWS, WIDTH))
    shared = {"scale": normal(k[5], WIDTH), "order": jnp.arange(WIDTH)[::-1]}
    shared["scale"] = jnp.broadcast_to(shared["scale"], (ROWS, WIDTH))
    keys = (jax.random.key if typed_keys else jax.random.PRNGKey)(7)
    data_L = {
        "key": jax.random.split(keys, depth),
        "rate": jnp.linspace(0.2, 0.9, depth, dtype=dtype),
    }
    return (params_f, {"w": normal(k[6], *square) / 2}), x, shared, data_L


def loss(y, aux_L):
    """Depends on both streams and on every floating-point auxiliary output, nonlinearly."""
    (y1, y2), (aux_f, aux_g) = y, aux_L
    outputs = jnp.mean(y1**2) + jnp.mean(jnp.sin(y2) * y1)
    return outputs + jnp.sum(aux_f["moment"] ** 2) + jnp.mean(jnp.cos(aux_g["energy"]))


def relative_error(tree, true_tree):
    """Relative L2 distance over all leaves together."""
    flat = lambda t: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(t)])
    a, b = flat(tree), flat(true_tree)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
