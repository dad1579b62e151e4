import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from revnet_jax.optimizers.build import is_kernel, make_optimizer, make_schedule
from revnet_jax.optimizers.optimizer import first_moments

SCHEDULE = {
    "name": "piecewise",
    "learning_rate": 0.1,
    "num_steps": 100,
    "warmup_steps": 0,
    "decay_steps": 0,
    "boundaries": (40, 60),
    "factor": 0.1,
}
OPTIMIZER = {
    "name": "sgd",
    "momentum": 0.9,
    "nesterov": False,
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 0.01,
    "clip_norm": 0.0,
    "clip": "global",
    "state_dtype": "float32",
    "stacked": None,
}


def rates(**changes):
    schedule = make_schedule(**SCHEDULE | changes)
    return [float(schedule(jnp.asarray(step))) for step in (0, 5, 39, 40, 60, 99)]


def test_schedules():
    np.testing.assert_allclose(rates(), [0.1, 0.1, 0.1, 0.01, 0.001, 0.001], rtol=1e-6)
    np.testing.assert_allclose(rates(name="constant"), [0.1] * 6, rtol=1e-6)
    cosine = [0.05 * (1 + np.cos(np.pi * step / 100)) for step in (0, 5, 39, 40, 60, 99)]
    np.testing.assert_allclose(rates(name="cosine"), cosine, rtol=1e-4)


def test_warmup_rises_from_zero_to_the_peak_and_the_boundaries_stay():
    np.testing.assert_allclose(
        rates(warmup_steps=10), [0, 0.05, 0.1, 0.01, 0.001, 0.001], rtol=1e-6
    )


def test_wsd_is_stable_until_its_last_steps_and_falls_to_zero():
    wsd = {"name": "wsd", "decay_steps": 40}
    np.testing.assert_allclose(rates(**wsd), [0.1] * 5 + [0.1 / 40], rtol=1e-5)
    np.testing.assert_allclose(
        rates(**wsd, warmup_steps=60), [0, 0.1 / 12, 0.065, 0.1 / 1.5, 0.1, 0.1 / 40], rtol=1e-5
    )
    schedule = make_schedule(**SCHEDULE | wsd)
    np.testing.assert_allclose([schedule(s) for s in (61, 80, 100)], [0.0975, 0.05, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "wsd"}, "got decay_steps=0 for wsd, expected 1 to 100"),
        (
            {"name": "wsd", "warmup_steps": 10, "decay_steps": 91},
            "got decay_steps=91 for wsd, expected 1 to 90: with warmup_steps=10 they are part of",
        ),
        ({"name": "step"}, "got name='step', expected one of piecewise"),
        ({"warmup_steps": 100}, "got warmup_steps=100"),
        ({"boundaries": (60, 40)}, "got boundaries="),
        ({"boundaries": (0.5,)}, "got boundaries="),
        ({"boundaries": (0, 40)}, "got boundaries="),
    ],
)
def test_schedule_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**SCHEDULE | changes)


def test_only_kernels_decay():
    params = {"chain": ({"convs": {0: {"kernel": jnp.ones(2)}}, "norms": {"scale": jnp.ones(2)}},)}
    mask = is_kernel(params)
    assert mask == {"chain": ({"convs": {0: {"kernel": True}}, "norms": {"scale": False}},)}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_two_updates_equal_the_formula(name):
    optimizer = make_optimizer(optax.constant_schedule(0.1), **OPTIMIZER | {"name": name})
    params = {"kernel": jnp.asarray([2.0]), "bias": jnp.asarray([2.0])}
    gradients = [{"kernel": jnp.asarray([g]), "bias": jnp.asarray([g])} for g in (0.5, -1.0)]
    state = optimizer.init(params)
    expected = {"kernel": 2.0, "bias": 2.0}
    moments = {"kernel": (0.0, 0.0), "bias": (0.0, 0.0)}
    for count, gradient in enumerate(gradients, start=1):
        with jax.numpy_dtype_promotion("standard"):  # optax's adamw mixes dtypes
            updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for key, x in expected.items():
            decay = 0.01 * x if key == "kernel" else 0.0
            g, (m, v) = float(gradient[key][0]), moments[key]
            if name == "sgd":
                m = 0.9 * m + g + decay
                expected[key] = x - 0.1 * m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                direction = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
                expected[key] = x - 0.1 * (direction + decay)
            moments[key] = (m, v)
    for key, value in expected.items():
        np.testing.assert_allclose(params[key], [value], rtol=1e-4)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="got name='adam', expected one of sgd, adamw, lion, muon"):
        make_optimizer(optax.constant_schedule(0.1), **OPTIMIZER | {"name": "adam"})


def test_schedules_run_under_jit():
    schedule = make_schedule(**SCHEDULE | {"warmup_steps": 3})
    assert jax.jit(schedule)(jnp.asarray(1, jnp.int32)).dtype == jnp.float32


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "muon"])
def test_first_moments_are_of_all_parameters(name):
    """The benchmark takes them for gradients: Muon's of matrices, and Adam's of what is left."""
    params = {"layers": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "head": jnp.ones(3)}
    optimizer = make_optimizer(1.0, **OPTIMIZER | {"name": name})
    found = first_moments(optimizer.init(params))
    sizes = {g: sum(x.size for x in jax.tree.leaves([m[g] for m in found])) for g in params}
    assert sizes == {"layers": 20, "head": 3}
    with pytest.raises(ValueError, match="got an optimizer without first moments, expected a"):
        first_moments(optax.sgd(1.0).init(params))


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1 / 2), ("float8", 1 / 4 + 1 / 128)])
@pytest.mark.parametrize(("name", "moments"), [("sgd", 1), ("adamw", 2), ("lion", 1), ("muon", 1)])
def test_moments_take_less_memory(name, moments, dtype, share):
    """In float8 with two bytes for each block of 64."""
    options = OPTIMIZER | {"name": name, "state_dtype": dtype, "clip_norm": 1.0}
    optimizer = make_optimizer(optax.constant_schedule(0.1), **options)
    params = {"kernel": jnp.ones((64, 64))}
    state = optimizer.init(params)
    sizes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.size > 1)
    assert sizes(state) == moments * params["kernel"].nbytes * share
    updates, new_state = jax.jit(optimizer.update)(params, state, params)
    assert updates["kernel"].dtype == jnp.float32
    kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kind(new_state) == kind(state)


def test_unknown_state_dtype():
    with pytest.raises(
        ValueError, match=r"got state_dtype='int8', expected one of float32, bfloat16, float8"
    ):
        make_optimizer(optax.constant_schedule(0.1), **OPTIMIZER | {"state_dtype": "int8"})
