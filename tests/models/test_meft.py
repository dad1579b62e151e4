"""A pretrained decoder made reversible by adapters: the integrator "meft"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model
from revnet_jax.core import Context, Grid
from revnet_jax.models import LanguageModel, LanguageModelShape, ModelOptions, Sweep, Variables
from revnet_jax.models.transformer import base
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.training.build import build_recipe
from revnet_jax.training.initial import load_weights
from revnet_jax.training.step import init_state, make_train_step
from tests import slow

B, T, V, LAYERS = 3, 7, 17, 2
FAST = {"xla_backend_optimization_level": 0}
jit = functools.partial(jax.jit, compiler_options=FAST)
SIZES = {"vocab_size": V, "layers": LAYERS, "width": 16, "heads": 2, "kv_heads": 1, "hidden": 24}


def model(backprop="reverse", *, shape=(), **options):
    sizes = SIZES | {"integrator": "meft", "adapter_rank": 4} | dict(shape)
    return LanguageModel(LanguageModelShape(**sizes), ModelOptions(backprop, **options))


def tokens():
    return jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)


def trained(lm):
    """Variables as after some training: second matrices of adapters are no longer zero."""

    def moved(path, leaf):
        name = jax.tree_util.keystr(path, simple=True)
        if not name.endswith(("adapter_b", "lora_b")):
            return leaf
        return jax.random.normal(jax.random.key(len(name)), leaf.shape, leaf.dtype) / 4

    variables = jit(lm.init)(jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(moved, variables.params)
    return variables._replace(params=params)


def gradient(lm, variables, key=None):
    token_BT = tokens()

    def loss(params, probes):
        args = variables._replace(params=params), token_BT[:, :-1], token_BT[:, 1:]
        return lm.loss(*args, key=key, sweep=Sweep(probes))[0]

    return jit(jax.value_and_grad(loss, (0, 1)))(variables.params, lm.probes())


def naive_loss(lm, params):
    """The paper's equations, layer by layer; the streams change places."""
    variables = Variables(params, {})
    f, g, adapter = lm._branches()
    context = Context(lm._positions(0, tokens()[:, :-1])[0], (None, None, None))
    x1 = x2 = lm._embed(variables, tokens()[:, :-1], 0, None)
    for layer in range(LAYERS):
        of_f, of_g, of_adapter = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
        hidden = x2 + f(of_f, x2, context)[0]
        hidden = hidden + g(of_g, hidden, context)[0]
        y1 = 0.1 * x1 + hidden
        y2 = 1.0 * x2 + adapter(of_adapter, y1, context)[0]
        x1, x2 = y2, y1
    logits = lm._normalise(variables, x2 + 0.1 * x1) @ params["head"]["kernel"]
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, tokens()[:, 1:, None], axis=-1))


@pytest.mark.thorough
def test_a_layer_is_that_of_the_paper():
    """In float64: loss and gradient. Stored, because without a grid what is undone drifts."""
    with jax.enable_x64(), jax.numpy_dtype_promotion("standard"):
        lm = model("store", shape={"lora_rank": 2}, grid=None, compute_dtype=jnp.float64)
        params = trained(lm).params
        expected, true = jit(jax.value_and_grad(functools.partial(naive_loss, lm)))(params)
        found, (got, _) = gradient(lm, Variables(params, {}))
        assert found == pytest.approx(float(expected), rel=1e-12)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
            assert np.linalg.norm(b) > 0
            assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b)


@pytest.mark.parametrize(("grid", "scale"), [(Grid(), 0.09993922), (None, 0.1)], ids=str)
def test_the_head_has_the_scale_of_the_layers(grid, scale, monkeypatch):
    lm, one = model("store", grid=grid), jnp.ones(4)
    monkeypatch.setattr(lm, "run_chain", lambda *args, **data: ((one, 0 * one), (None,)))
    x, _ = lm._run(lm._layer(*lm._branches(), training=False), (None,) * 3, one)
    np.testing.assert_allclose(x, scale, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        slow({"lora_rank": 2, "dropout": 0.2}, {"compute_dtype": jnp.bfloat16}),
        slow({"experts": 4}, {"stored_layers": 1}),
    ],
)
def test_reverse_is_store_bit_for_bit(shape, options):
    lm = model(shape=shape, **options)
    variables, key = trained(lm), jax.random.key(3)
    stored = model("store", shape=shape, **options | {"stored_layers": 0})
    loss, (expected, _) = gradient(stored, variables, key)
    other, (got, exactness) = gradient(lm, variables, key)
    assert other == loss
    assert exactness["layers"].mismatches == 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_it_starts_near_the_pretrained_network(monkeypatch):
    """At a distance in proportion to lambda, whatever the first matrices of the adapters are."""
    twin = LanguageModel(LanguageModelShape(**SIZES, reversible=False), ModelOptions("store"))
    variables = jit(model().init)(jax.random.key(0))
    pretrained = Variables({**variables.params, "layers": variables.params["layers"][:2]}, {})
    token_BT = tokens()[:, :-1]
    plain = jit(twin.logits)(pretrained, token_BT)

    def distance(scale):
        monkeypatch.setattr(base, "MEFT_SCALES", (scale, 1.0))
        lm = model("store", grid=None)
        return float(jnp.linalg.norm(jit(lm.logits)(variables, token_BT) - plain))

    lm, first = model(), variables.params["layers"]
    others = {**first[2], "adapter_a": first[2]["adapter_a"] + 1}
    moved = variables._replace(params={**variables.params, "layers": (*first[:2], others)})
    logits = jit(lm.logits)
    np.testing.assert_array_equal(logits(variables, token_BT), logits(moved, token_BT))
    far = distance(2**-6)
    assert far < 0.1 * float(jnp.linalg.norm(plain))
    assert far / distance(2**-9) == pytest.approx(8, rel=0.1)


@pytest.mark.thorough
def test_tokens_one_by_one():
    lm = model("store", grid=None)
    variables, token_BT = trained(lm), tokens()[:, :-1]
    expected = jit(lm.logits)(variables, token_BT)[:, -1]
    _, cache = jit(lm.extend)(variables, lm.empty_cache(B, T), token_BT[:, :-1], 0)
    logits_BV, _ = jit(lm.extend)(variables, cache, token_BT[:, -1:], T - 1)
    np.testing.assert_allclose(logits_BV, expected, atol=1e-5)


def config_of(**changes):
    config = language_model()
    config.model.update({name: size for name, size in SIZES.items() if name != "vocab_size"})
    config.model.update({"integrator": "meft", "adapter_rank": 4, "lora_rank": 2})
    config.data.update({"vocab_size": V, "context": 8})
    config.update({"batch_size": 4})
    config.schedule.warmup_steps = 0
    config.optimizer.trainable = "lora|adapter"
    config.update_from_flattened_dict(changes)
    return config


def two_steps(config):
    task, schedule, optimizer = build_recipe(config)
    first = state = init_state(task.network, optimizer, seed=0)
    step = jax.jit(make_train_step(task, optimizer, schedule), compiler_options=FAST)
    token_BT = np.random.default_rng(0).integers(0, V, (4, 9)).astype(np.int32)
    for _ in range(2):
        state, metrics = step(state, {"token": token_BT[:, :-1], "target": token_BT[:, 1:]})
    return first, state, metrics


@pytest.mark.thorough
def test_adapters_alone_are_trained():
    """The others stay as they are, and have no state of the optimizer."""
    first, last, metrics = two_steps(config_of())
    before, frozen = Trainable("lora|adapter").divide(first.variables.params)
    after, still = Trainable("lora|adapter").divide(last.variables.params)
    assert len(jax.tree.leaves(before)) == 10  # of four kernels and of the adapter
    for old, new in zip(jax.tree.leaves(frozen), jax.tree.leaves(still), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.any(old != new)
    sizes = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
    assert sizes(last.opt_state) <= 2 * sizes(before)
    assert metrics["exact_mismatches"] == 0


@pytest.mark.thorough
def test_lockstep_is_the_ordinary_step():
    _, ordinary, _ = two_steps(config_of())
    _, lockstep, _ = two_steps(config_of(**{"optimizer.lockstep": True}))
    for a, b in zip(*(jax.tree.leaves(s.variables) for s in (ordinary, lockstep)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_it_starts_from_weights_without_its_adapters(lora_rank, tmp_path):
    """Those of a network of one stream, plain or with LoRA, are kept to the bit."""
    source = config_of(**{"model.reversible": False, "model.backprop": "store"})
    source.model.update({"integrator": "streams", "lora_rank": lora_rank})
    source.optimizer.trainable = ""
    task, _, optimizer = build_recipe(source)
    state = init_state(task.network, optimizer, seed=3)
    options = {"best_metric": None, "best_mode": "max"}
    with Checkpoints(tmp_path / "checkpoints", **options) as checkpoints:
        checkpoints.save(5, state)
    network = build_recipe(config_of())[0].network
    wanted = jax.eval_shape(network.init, jax.random.key(0))
    step, found = load_weights(tmp_path, wanted, {})
    assert step == 5
    assert jax.tree.structure(found.params["layers"][2]).num_leaves == 0
    expected = jax.tree_util.tree_leaves_with_path(state.variables.params)
    got = jax.tree_util.tree_leaves_with_path(found.params)
    assert [path for path, _ in got] == [path for path, _ in expected]
    for (_, a), (_, b) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.adapter_rank": 0}, "config.model.adapter_rank: got 0, expected"),
        (
            {"model.reversible": False, "model.backprop": "store"},
            "got integrator='meft' and reversible=False, expected streams, or reversible=True",
        ),
        ({"optimizer.trainable": "adapter_c"}, "which matches no parameter.*layers/2/adapter_a"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe(config_of(**changes))
