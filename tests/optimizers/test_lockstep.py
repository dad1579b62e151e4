"""The optimizer inside the backward sweep does what it does after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revnet_jax.config import ConfigError
from revnet_jax.core import chain, reversible_block
from revnet_jax.models import Variables
from revnet_jax.optimizers.build import is_kernel
from revnet_jax.optimizers.lockstep import LockstepOptimizer, check_layerwise
from revnet_jax.optimizers.muon import scale_by_muon
from revnet_jax.optimizers.optimizer import OrdinaryOptimizer
from revnet_jax.optimizers.rounding import rounded
from revnet_jax.training.build import build_recipe
from revnet_jax.training.step import init_state, make_train_step
from tests import by_default, thorough

FAST = {"xla_backend_optimization_level": 0}
DEPTH, WIDTH, ROWS = 6, 16, 16
DECAY = {"weight_decay": 0.01, "mask": is_kernel}
SCHEDULE = optax.linear_schedule(0.0, 0.01, 5)
OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(**DECAY), optax.sgd(SCHEDULE, momentum=0.9)),
    "adamw": optax.adamw(SCHEDULE, **DECAY),
    "lion": optax.lion(SCHEDULE, **DECAY),
    "muon": None,
}


def make(name, stacked=("layers",)):
    """Muon is told where layers are stacked; what is elementwise need not know."""
    if name != "muon":
        return OPTIMIZERS[name]
    return optax.chain(
        scale_by_muon(b1=0.9, b2=0.99, stacked=stacked),
        optax.add_decayed_weights(**DECAY),
        optax.scale_by_learning_rate(SCHEDULE),
    )


def branch(params, x, context):
    """Smooth, so that roundings stay roundings; with dropout."""
    keep = jax.random.bernoulli(context.data, 0.9, x.shape)
    x = jnp.where(keep, x, jnp.zeros_like(x))
    hidden = jnp.tanh(x @ params["kernel"] + params["bias"][None])
    return hidden @ params["kernel"].T


def init(dtype):
    kernel = jax.random.normal(jax.random.key(0), (2, DEPTH, WIDTH, WIDTH), dtype) / 3
    layers = tuple({"kernel": k, "bias": jnp.zeros((DEPTH, WIDTH), dtype)} for k in kernel)
    return {"layers": layers, "head": {"kernel": jnp.ones((WIDTH, 3), dtype)}}


def loss_fn(variables, batch, key, *, sweep):
    params = variables.params
    head = params["head"]["kernel"]
    x = tuple(jax.random.normal(jax.random.key(1), (2, ROWS, WIDTH), head.dtype))
    (y1, y2), _ = chain(
        reversible_block(branch, branch, grid=None),
        params["layers"],
        x,
        data_L=jax.random.split(key, DEPTH),
        update=sweep.update,
        state_L=sweep.state_L("layers"),
    )
    return jnp.mean(jnp.sin((y1 + y2) @ head)), ((), {})


def steps(name, wrap, dtype, lockstep):
    """Ten of them: the parameters after, and the norm of the last gradient."""
    params = init(dtype)
    optimizer = OrdinaryOptimizer(wrap(make(name)))
    if lockstep:
        outside, layer = wrap(make(name, stacked=())), wrap(make(name, stacked=None))
        optimizer = LockstepOptimizer(outside, layer, ("layers",))

    def step(params, state, key):
        new = optimizer.step(loss_fn, Variables(params, ()), state, None, key, None)
        return new.variables.params, new.state, new.gradient_norm

    step, state = jax.jit(step, compiler_options=FAST), optimizer.init(params)
    for key in jax.random.split(jax.random.key(2), 10):
        params, state, norm = step(params, state, key)
    return params, norm


@pytest.mark.parametrize("name", by_default(OPTIMIZERS, "adamw"))
@pytest.mark.parametrize(
    ("dtype", "tolerance", "moments"),
    # Rounded by a hash of their bits, moments have to be equal to be rounded alike.
    [
        thorough("float32", 1e-6, None),
        ("float64", 1e-12, None),
        thorough("float64", 1e-12, "bfloat16"),
        thorough("float64", 1e-12, "float8"),
    ],
)
def test_ten_steps_equal_the_ordinary_ones(name, dtype, tolerance, moments):
    wrap = lambda optimizer: rounded(optimizer, moments=moments) if moments else optimizer
    if (name, dtype) == ("muon", "float32"):
        # Products of a stack round otherwise than a layer's, and five iterations enlarge what lies
        # along small singular values up to 3.4445**5 times. In float64 1e-12 is kept.
        tolerance *= 3.4445**5
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        ordinary, norm = steps(name, wrap, dtype, lockstep=False)
        lockstep, lockstep_norm = steps(name, wrap, dtype, lockstep=True)
        for a, b, c in zip(*map(jax.tree.leaves, (ordinary, lockstep, init(dtype))), strict=True):
            assert np.linalg.norm(a - c) > 1e-3  # it was trained
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)
        np.testing.assert_allclose(lockstep_norm, norm, rtol=max(1e-6, tolerance))  # a float32


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_looks_at_one_layer_is_layerwise(name):
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw asks for it
        check_layerwise(make(name), {"layers": init("float32")["layers"]})


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.apply_if_finite(optax.sgd(0.1), 5),
        optax.lamb(0.1),
    ],
)
def test_what_looks_at_all_gradients_is_refused(optimizer):
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"looks at all gradients at once.*clip=layer"),
    ):
        check_layerwise(optimizer, init("float32")["layers"])


def test_the_config_refuses_what_does_not_go_together(tiny_config):
    tiny_config.optimizer.lockstep = True
    tiny_config.optimizer.clip_norm = 1.0
    with pytest.raises(ConfigError, match=r"config.optimizer: got lockstep and .*clip=layer"):
        build_recipe(tiny_config)
    tiny_config.optimizer.clip = "layer"
    build_recipe(tiny_config)
    tiny_config.microbatches = 2
    with pytest.raises(ConfigError, match=r"config.microbatches: got 2 and optimizer.lockstep"):
        build_recipe(tiny_config)
    tiny_config.update_from_flattened_dict({"microbatches": 1, "model.units": (1, 1)})
    tiny_config.model.channels = (4, 8, 16)
    with pytest.raises(ConfigError, match="got True for a network without chains"):
        build_recipe(tiny_config)


def one_step(config):
    """On a batch whose halves, every other image, are equal."""
    task, schedule, optimizer = build_recipe(config)
    state = init_state(task.network, optimizer, seed=0)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 8, 8, 1)).astype(np.float32).repeat(2, axis=0),
        "label": rng.integers(0, 10, 8).astype(np.int32).repeat(2),
    }
    step = make_train_step(task, optimizer, schedule)
    return jax.jit(step, compiler_options=FAST)(state, batch)


def difference(a, b):
    """Largest relative difference of any array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-9) for x, y in pairs)


@pytest.mark.thorough
def test_a_network_takes_the_same_step_with_layerwise_clipping(tiny_config):
    """Stem, transition and head take the ordinary path in the same step."""
    tiny_config.optimizer.update({"clip_norm": 0.3, "clip": "layer"})
    ordinary, metrics = one_step(tiny_config)
    tiny_config.optimizer.lockstep = True
    lockstep, lockstep_metrics = one_step(tiny_config)
    assert difference(lockstep.variables, ordinary.variables) < 1e-6
    np.testing.assert_allclose(
        lockstep_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-5
    )
    assert lockstep_metrics["exact_mismatches"] == 0
    tiny_config.optimizer.clip_norm = 0.0
    unclipped, _ = one_step(tiny_config)
    assert difference(unclipped.variables.params, ordinary.variables.params) > 1e-4


@pytest.mark.thorough
def test_microbatches_add_up(tiny_config):
    """Free streams: on the grid, batch statistics in another order of sums are other roundings."""
    tiny_config.model.update({"grid": False, "backprop": "store"})
    whole, metrics = one_step(tiny_config)
    tiny_config.microbatches = 2
    parts, parts_metrics = one_step(tiny_config)
    assert difference(parts.variables.params, whole.variables.params) < 1e-5
    for name in ("train_loss", "train_accuracy", "gradient_norm"):
        np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-6)
    tiny_config.model.update({"grid": True, "backprop": "reverse"})
    assert one_step(tiny_config)[1]["exact_mismatches"] == 0
