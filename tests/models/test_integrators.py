"""A pretrained network of one stream, made reversible: by BDIA or the midpoint rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import Context
from revnet_jax.models import LanguageModel, LanguageModelShape, ModelOptions, Sweep, Variables
from revnet_jax.models.transformer.base import draw_factors
from tests import thorough

B, T, V, LAYERS = 3, 7, 17, 3
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"vocab_size": V, "layers": LAYERS, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24}
KEY = jax.random.key(5)
# c of "dual" three eighths of the way from 2**-4 to 1: its fourth root is a multiple of 2**-12.
DUAL = (round(2**-0.625 * 2**12) / 2**12) ** 4


def model(integrator, backprop="reverse", **options):
    shape = LanguageModelShape(**SIZES, integrator=integrator)
    return LanguageModel(shape, ModelOptions(backprop, **options))


def twin():
    return LanguageModel(LanguageModelShape(**SIZES, reversible=False), ModelOptions("store"))


def tokens():
    return jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)


def gradient(lm, variables, key=KEY):
    token_BT = tokens()

    def loss(params, probes):
        args = variables._replace(params=params), token_BT[:, :-1], token_BT[:, 1:]
        return lm.loss(*args, key=key, sweep=Sweep(probes))[0]

    return jit(jax.value_and_grad(loss, (0, 1)))(variables.params, lm.probes())


def naive(lm, variables, factors_L):
    """What the head reads, step by step. factors_L: c of each layer and half-step, [L, 2, ...]."""
    x_BTD = lm._embed(variables, tokens()[:, :-1], 0, None)
    before, x = x_BTD, x_BTD
    context = Context(lm._positions(0, tokens()[:, :-1])[0], (None, None, None))
    for layer in range(LAYERS):
        for i, branch in enumerate(lm._branches()):
            params = jax.tree.map(lambda leaf: leaf[layer], variables.params["layers"][i])  # noqa: B023
            c = factors_L[layer, i]
            u, _ = branch(params, x, context)
            before, x = x, c * before + (1 - c) * x + (1 + c) * u
    return before, x


def test_outside_of_training_bdia_is_the_network_of_one_stream():
    variables = jit(twin().init)(jax.random.key(0))
    token_BT = tokens()[:, :-1]
    expected = jit(twin().logits)(variables, token_BT)
    np.testing.assert_array_equal(jit(model("bdia").logits)(variables, token_BT), expected)
    lm = model("bdia")
    logits_BV, _ = jit(lm.extend)(variables, lm.empty_cache(B, T), token_BT, 0)
    np.testing.assert_allclose(logits_BV, expected[:, -1], atol=1e-5)


@pytest.mark.parametrize("integrator", ["bdia", thorough("midpoint"), thorough("dual")])
def test_a_step_is_that_of_the_paper(integrator):
    """In float64: losses and gradients of the formula, written as a loop.

    Stored, because without a grid what is undone drifts: every step back divides by c.
    """
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        lm = model(integrator, "store", grid=None, compute_dtype=jnp.float64)
        variables = jit(lm.init)(jax.random.key(0))
        embedding = lm._embed(variables, tokens()[:, :-1], 0, None)
        keys = jax.random.split(KEY, (LAYERS + 1, 2))
        factors_L = draw_factors(keys[-1, 1], LAYERS, embedding)
        assert set(np.unique(factors_L)) == {-0.5, 0.5}
        c = {"bdia": 0.0, "midpoint": 1.0, "dual": DUAL}[integrator]
        if integrator == "dual":
            variables = variables._replace(stats={"batches": jnp.asarray(375.0)})
        if integrator != "bdia":
            factors_L = jnp.full_like(factors_L, c)

        def loss(params):
            variables = Variables(params, {})
            before, x = naive(lm, variables, factors_L)
            x = c / 2 * before + (1 - c / 2) * x
            kernel = params["head"]["kernel"]
            log_p = jax.nn.log_softmax(lm._normalise(variables, x) @ kernel)
            return -jnp.mean(jnp.take_along_axis(log_p, tokens()[:, 1:, None], axis=-1))

        expected, gradient_of_params = jit(jax.value_and_grad(loss))(variables.params)
        found, (got, _) = gradient(lm, variables)
        assert found == pytest.approx(float(expected), rel=1e-12)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradient_of_params), strict=True):
            assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b)


@pytest.mark.thorough
@pytest.mark.parametrize("integrator", ["bdia", "dual", "midpoint"])
def test_reverse_is_store_and_exact(integrator):
    variables = jit(model(integrator).init)(jax.random.key(0))
    loss, (expected, _) = gradient(model(integrator, "store"), variables)
    other, (got, exactness) = gradient(model(integrator), variables)
    assert other == loss
    assert exactness["layers"].mismatches == 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_bdia_draws_other_factors_at_every_step():
    variables = jit(model("bdia").init)(jax.random.key(0))
    losses = {float(gradient(model("bdia"), variables, jax.random.key(i))[0]) for i in range(3)}
    assert len(losses) == 3


@pytest.mark.thorough
def test_dual_goes_from_the_network_to_the_midpoint_rule():
    """By the number of batches in its stats, in evaluation and token by token too."""
    lm = model("dual", "store", grid=None)
    variables = jit(lm.init)(jax.random.key(0))
    assert lm.next_stats(variables.stats) == {"batches": 1}
    token_BT = tokens()[:, :-1]
    after = lambda n: variables._replace(stats={"batches": jnp.asarray(float(n))})
    plain = jit(twin().logits)(Variables(variables.params, {}), token_BT)
    distances = [np.abs(jit(lm.logits)(after(n), token_BT) - plain).max() for n in (0, 500, 1000)]
    assert 0 < distances[0] < distances[1] < distances[2]
    midpoint = jit(model("midpoint", grid=None).logits)(after(0), token_BT)
    np.testing.assert_allclose(jit(lm.logits)(after(2000), token_BT), midpoint, atol=1e-5)
    expected = jit(lm.logits)(after(500), token_BT)[:, -1]
    logits_BV, _ = jit(lm.extend)(after(500), lm.empty_cache(B, T), token_BT, 0)
    np.testing.assert_allclose(logits_BV, expected, atol=1e-5)


@pytest.mark.thorough
def test_midpoint_is_near_the_network_whose_weights_it_has():
    """Nearer than with the streams of a RevNet: to first order in the updates of a layer."""
    variables = jit(twin().init)(jax.random.key(0))
    small = jax.tree.map(lambda leaf: 0.05 * leaf, variables.params["layers"])
    variables = Variables({**variables.params, "layers": small}, {})
    token_BT = tokens()[:, :-1]
    expected = jit(twin().logits)(variables, token_BT)
    distance = lambda name: np.abs(
        jit(model(name, grid=None).logits)(variables, token_BT) - expected
    )
    assert distance("midpoint").max() < distance("streams").max() / 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"integrator": "euler"}, "got integrator='euler', expected one of streams, bdia, "),
        ({"integrator": "bdia", "reversible": False}, "and reversible=False, expected streams, or"),
    ],
)
def test_unknown_integrators(changes, message):
    shape = LanguageModelShape(**SIZES, **changes)
    with pytest.raises(ValueError, match=message):
        LanguageModel(shape, ModelOptions("store"))


@pytest.mark.parametrize("integrator", ["bdia", "dual", "meft"])
def test_what_divides_is_only_reversed_on_a_grid(integrator):
    model(integrator, "store", grid=None)
    model(integrator, stored_layers=LAYERS, grid=None)
    for stored_layers in (0, 1):
        with pytest.raises(ValueError, match=f"got integrator='{integrator}' and .* without a gri"):
            model(integrator, stored_layers=stored_layers, grid=None)
