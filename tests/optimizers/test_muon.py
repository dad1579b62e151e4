"""Muon takes each matrix on its own: in stacks, in lockstep and on a mesh."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from revnet_jax.config import image_classification, language_model, vision_transformer
from revnet_jax.optimizers.build import make_optimizer
from revnet_jax.optimizers.muon import COEFFICIENTS, ITERATIONS, orthogonalize
from revnet_jax.optimizers.rounding import apply_updates
from revnet_jax.training.build import build_recipe
from tests import thorough
from tests.optimizers.test_optimizer import OPTIMIZER
from tests.training.test_sharding import FAMILIES, check, differences

RATE, DECAY = 0.1, 0.01
SHAPES = {
    "layers": (
        {"qkv": {"kernel": (3, 8, 24)}, "up": {"kernel": (3, 8, 2, 10)}, "scale": (3, 8)},
        {"up_kernel": (3, 4, 8, 2, 10), "down_kernel": (3, 4, 10, 8)},
    ),
    "convs": {"0": {"kernel": (2, 3, 3, 4, 6)}, "1": {"kernel": (2, 1, 1, 6, 4)}},
    "transition": {"kernel": (3, 3, 4, 6), "bias": (6,)},
    "stem": {"kernel": (8, 8)},
    "embed": (7, 8),
    "head": {"kernel": (8, 5)},
}


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple) and isinstance(node[0], int)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape)), shapes, is_leaf=is_shape)


def make(stacked=("layers", "convs"), **changes):
    options = OPTIMIZER | {"name": "muon", "weight_decay": DECAY, "stacked": stacked} | changes
    return make_optimizer(optax.constant_schedule(RATE), **options)


def matrices(tree):
    """The views of all matrices in a tree of arrays like `SHAPES`, by hand."""
    f, g = tree["layers"]
    yield from f["qkv"]["kernel"]
    yield from (up[:, part] for up in f["up"]["kernel"] for part in (0, 1))
    yield from (up[:, part] for layer in g["up_kernel"] for up in layer for part in (0, 1))
    yield from (down for layer in g["down_kernel"] for down in layer)
    yield from (kernel.reshape(36, 6) for kernel in tree["convs"]["0"]["kernel"])
    yield from (kernel.reshape(6, 4) for kernel in tree["convs"]["1"]["kernel"])
    yield tree["transition"]["kernel"].reshape(36, 6)


def others(tree):
    """All that is left to Adam."""
    return [tree["layers"][0]["scale"], tree["transition"]["bias"], tree["embed"]], [
        tree[name]["kernel"] for name in ("stem", "head")
    ]


def naive_orthogonal(x):
    """What five iterations make of each singular value, from a decomposition."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(ITERATIONS):
        s = sum(c * s**power for c, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    assert np.all((s > 0.6) & (s < 1.3))
    return 0.2 * np.sqrt(max(x.shape)) * (u * s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (2, 3, 12, 5)])
def test_singular_values_become_one(shape):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=shape)
        found = np.asarray(jax.jit(orthogonalize)(x)).reshape(-1, *shape[-2:])
        for one, matrix in zip(found, x.reshape(found.shape), strict=True):
            np.testing.assert_allclose(one, naive_orthogonal(matrix), atol=1e-7)
            assert 0.15 < np.sqrt(np.mean(one**2)) < 0.25
        assert not np.any(orthogonalize(jnp.zeros(shape)))


@pytest.mark.thorough
def test_three_updates_equal_the_formula_for_each_matrix_and_adam_for_the_rest():
    with jax.enable_x64(True):
        optimizer, params = make(), normal(0)
        adam = optax.adamw(RATE, b2=0.999, weight_decay=0.0)
        adamw = optax.adamw(RATE, b2=0.999, weight_decay=DECAY)
        state, (plain, decayed) = optimizer.init(params), others(params)
        adam_state, adamw_state = adam.init(plain), adamw.init(decayed)
        expected = [np.array(matrix) for matrix in matrices(params)]
        momentum = [np.zeros_like(matrix) for matrix in expected]
        for step in range(1, 4):
            grads = normal(step)
            updates, state = jax.jit(optimizer.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            for i, grad in enumerate(map(np.asarray, matrices(grads))):
                momentum[i] = 0.95 * momentum[i] + 0.05 * grad
                direction = naive_orthogonal(0.95 * momentum[i] + 0.05 * grad)
                expected[i] = expected[i] - RATE * (direction + DECAY * expected[i])
            with jax.numpy_dtype_promotion("standard"):
                plain_grads, decayed_grads = others(grads)
                updates, adam_state = adam.update(plain_grads, adam_state, plain)
                plain = optax.apply_updates(plain, updates)
                updates, adamw_state = adamw.update(decayed_grads, adamw_state, decayed)
                decayed = optax.apply_updates(decayed, updates)
        for found, matrix in zip(matrices(params), expected, strict=True):
            np.testing.assert_allclose(found, matrix, atol=1e-7)
        for found, leaf in zip(jax.tree.leaves(others(params)), [*plain, *decayed], strict=True):
            np.testing.assert_allclose(found, leaf, atol=1e-12)


def test_the_first_update_is_that_of_optax():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, grad = ({"kernel": jnp.asarray(next(iter(matrices(normal(i)))))} for i in (0, 1))
        reference = muon(RATE, consistent_rms=0.2, weight_decay=DECAY)
        expected, _ = reference.update(grad, reference.init(x), x)
        optimizer = make(stacked=None)
        found, _ = optimizer.update(grad, optimizer.init(x), x)
        np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=1e-8)


def config_of(family, **settings):
    makers = {"revnet": image_classification, "vit": vision_transformer, "decoder": language_model}
    config = makers[family]()
    config.update_from_flattened_dict({**FAMILIES[family], "optimizer.name": "muon", **settings})
    return config


@pytest.mark.parametrize(
    ("family", "settings", "kernels"),
    [
        ("decoder", {}, {"qkv/kernel", "out/kernel", "up/kernel", "down/kernel"}),
        (
            "decoder",
            {"model.experts": 4},
            {"qkv/kernel", "out/kernel", "router/kernel", "up_kernel", "down_kernel"},
        ),
        ("vit", {}, {"qkv/kernel", "out/kernel", "up/kernel", "down/kernel"}),
        thorough("revnet", {}, {"convs/0/kernel", "convs/1/kernel"}),
    ],
)
def test_hidden_kernels_get_muon_in_stacks_and_in_lockstep(family, settings, kernels):
    for lockstep in (False, True):
        config = config_of(family, **settings, **{"optimizer.lockstep": lockstep})
        task, _, optimizer = build_recipe(config)
        params = jax.eval_shape(task.network.init, jax.random.key(0)).params
        state = jax.eval_shape(optimizer.init, params)
        names = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(state)
        ]
        momentum = {name for name in names if "/trace/" in name}
        assert not any("stem" in name or "head" in name for name in momentum)
        ends = {end for end in kernels if any(name.endswith(end) for name in momentum)}
        assert ends == kernels
        assert all(name.endswith(tuple(kernels)) for name in momentum)
        assert all(
            name in momentum or "stem" in name or "head" in name
            for name in names
            if name.endswith("kernel")
        )


@pytest.mark.thorough
def test_parameters_and_momentum_in_bfloat16_move_to_a_neighbour_of_where_they_should():
    narrow = jnp.bfloat16
    params, grads = (jax.tree.map(lambda leaf: leaf.astype(narrow), normal(i)) for i in (0, 1))
    wide = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    clip = {"clip_norm": 1.0, "clip": "layer"}
    optimizer = make(**clip, state_dtype="bfloat16", param_dtype=narrow)
    state = optimizer.init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {
        jnp.dtype(narrow),
        jnp.dtype(jnp.int32),
    }
    updates, _ = jax.jit(optimizer.update)(grads, state, params)
    found = apply_updates(params, updates)
    optimizer = make(**clip)
    updates, _ = jax.jit(optimizer.update)(wide(grads), optimizer.init(wide(params)), wide(params))
    expected = apply_updates(wide(params), updates)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == narrow
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-7, atol=1e-5)


def test_other_kernels_are_refused():
    params = {"kernel": jnp.ones((2, 3, 3, 3, 3))}
    optimizer = make(stacked=None)
    with pytest.raises(ValueError, match=r"got a kernel of shape \(2, 3, 3, 3, 3\) for muon"):
        optimizer.update(params, optimizer.init(params), params)


@pytest.mark.thorough
def test_what_eight_devices_send():
    """Nothing within the products: the exchanges before and after are all there is."""
    program = pathlib.Path(__file__).with_name("sharded_muon.py")
    done = subprocess.run(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each.pop("difference") < 1e-14 for each in found] == [True] * 4
    # 5 kernels in stacks: there and back, for each axis; of one layer 2 are stacks of experts.
    assert found == [
        {"mesh": {"fsdp": 8}, "layers": True, "sent": {"all-to-all": 10}},
        {"mesh": {"fsdp": 8}, "layers": False, "sent": {"all-gather": 3, "all-to-all": 4}},
        {
            "mesh": {"fsdp": 2, "sequence": 2, "tensor": 2},
            "layers": True,
            "sent": {"all-to-all": 20},
        },
        {
            "mesh": {"fsdp": 2, "sequence": 2, "tensor": 2},
            "layers": False,
            "sent": {"all-gather": 6, "all-to-all": 8},
        },
    ]


@pytest.mark.thorough
def test_ten_steps_on_eight_devices_are_those_on_one():
    settings = {**FAMILIES["decoder"], "optimizer.name": "muon"}
    cases = [
        ("reverse", False, {"data": 1, "fsdp": 4, "tensor": 2}, "float64"),
        ("reverse", True, {"data": 1, "fsdp": 8}, "float64"),
    ]
    check(differences("decoder", settings, cases))
