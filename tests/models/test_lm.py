"""The decoder: one function whatever its gradient costs, causal, and the same token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.core import Grid
from revnet_jax.models import LanguageModel, LanguageModelShape, ModelOptions, Sweep, Variables
from revnet_jax.models.transformer.attention import (
    attend,
    rotary_angles,
    rotate,
    scores_times_values,
)
from revnet_jax.training.sharding import make_mesh, on_mesh, put_batch
from tests import thorough

B, T, V = 2, 13, 17
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"vocab_size": V, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24}
VARIANTS = {
    "reversible": {},
    "twin": {"reversible": False},
    "experts": {"experts": 4},
    "tied": {"tied": True},
    "dropout": {"dropout": 0.3},
    "as Qwen": {
        "head_size": 6,
        "bias": "attention",
        "qk_norm": True,
        "rotary_scaling": (8, 1, 4, 9),
    },
    "as GPT-2": {"norm": "layer", "activation": "gelu", "bias": "all", "learned_positions": 20},
}


def model(backprop=None, *, options=(), **changes):
    """options: of `ModelOptions` and of `LanguageModel`."""
    shape, options = LanguageModelShape(**(SIZES | changes)), dict(options)
    backprop = backprop or ("reverse" if shape.reversible else "store")
    names = ("attention", "feed_forward_chunks", "loss_chunk")
    own = {name: options.pop(name) for name in names if name in options}
    return LanguageModel(shape, ModelOptions(backprop, **options), **own)


def tokens(seed=1):
    return jax.random.randint(jax.random.key(seed), (B, T + 1), 0, V)


def gradient(lm, variables, *, key=None, balance=0.1):
    token_BT = tokens()

    def loss(params, probes):
        nll, aux = lm.loss(
            Variables(params, {}), token_BT[:, :-1], token_BT[:, 1:], key=key, sweep=Sweep(probes)
        )
        return nll + (balance * jnp.mean(aux[0]) if aux else 0.0), aux

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jit(value_and_grad)(variables.params, lm.probes())


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["twin", "experts", "dropout", "as Qwen", "as GPT-2"])
def test_strategies_give_one_gradient(name):
    """The twin has `store` and `remat` alone."""
    changes = VARIANTS[name]
    key = jax.random.key(2) if "dropout" in changes else None
    variables = jit(model(**changes).init)(jax.random.key(0))
    (loss, _), (expected, _) = gradient(model("store", **changes), variables, key=key)
    assert abs(float(loss) - np.log(V)) < 1
    for backprop in ("remat", "reverse")[: 1 + changes.get("reversible", True)]:
        lm = model(backprop, **changes)
        (other, _), (got, exactness) = gradient(lm, variables, key=key)
        assert other == pytest.approx(float(loss), rel=1e-6)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        if backprop == "reverse":
            assert exactness["layers"].mismatches == 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options", [{"loss_chunk": 4}, {"loss_chunk": T, "feed_forward_chunks": 13}]
)
def test_chunks_change_nothing(options):
    variables = jit(model().init)(jax.random.key(0))
    (expected, _), (expected_gradient, _) = gradient(model(), variables)
    (loss, _), (got, _) = gradient(model(options=options), variables)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_logits():
    lm, token_BT = model(), tokens()
    variables = jit(lm.init)(jax.random.key(0))
    log_p = jax.nn.log_softmax(jit(lm.logits)(variables, token_BT[:, :-1]))
    nll_BT = -jnp.take_along_axis(log_p, token_BT[:, 1:, None], axis=-1)[..., 0]
    weight_BT = (jnp.arange(T)[None] < jnp.array([[5], [T]])).astype(jnp.float32)
    loss, _ = jit(lm.loss)(variables, token_BT[:, :-1], token_BT[:, 1:], weight_BT)
    assert loss == pytest.approx(float(jnp.sum(nll_BT * weight_BT) / weight_BT.sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["reversible", "twin", "experts"])
def test_no_output_depends_on_later_tokens(name):
    lm, token_BT = model(**VARIANTS[name]), tokens()
    variables = jit(lm.init)(jax.random.key(0))
    logits = jit(lm.logits)
    t = 6
    changed_BT = token_BT.at[:, t].set((token_BT[:, t] + 1) % V)
    before, after = logits(variables, token_BT), logits(variables, changed_BT)
    np.testing.assert_array_equal(before[:, :t], after[:, :t])
    assert jnp.all(jnp.any(before[:, t:] != after[:, t:], axis=-1))


def test_no_gradient_leaks_to_later_tokens():
    """By the embedding of a token that occurs once."""
    lm, t = model(), 6
    token_BT = jnp.arange(T)[None]
    variables = jit(lm.init)(jax.random.key(0))

    def early(embed):
        params = {**variables.params, "embed": embed}
        x_BTD, _ = lm.features(Variables(params, {}), token_BT)
        return jnp.sum(jnp.square(x_BTD[:, :t]) * jnp.arange(16.0)[None, None])

    norms = jnp.linalg.norm(jit(jax.grad(early))(variables.params["embed"]), axis=-1)
    assert jnp.all(norms[:t] > 0)
    assert jnp.all(norms[t:] == 0)


@pytest.mark.parametrize(
    ("name", "grid", "tolerance"),
    [
        ("reversible", None, 1e-5),
        thorough("twin", None, 1e-5),
        thorough("experts", None, 1e-5),
        thorough("tied", None, 1e-5),
        thorough("as Qwen", None, 1e-5),
        thorough("as GPT-2", None, 1e-5),
        # Sums in another order may round to the neighbouring point of the grid.
        ("reversible", Grid(), 20 * 2**-12),
    ],
)
def test_token_by_token_is_all_at_once(name, grid, tolerance):
    lm, token_BT = model(**VARIANTS[name], options={"grid": grid}), tokens()
    variables = jit(lm.init)(jax.random.key(0))
    expected = jit(lm.logits)(variables, token_BT)
    extend = jit(lm.extend)
    logits_BV, cache = extend(variables, lm.empty_cache(B, T + 1), token_BT[:, :5], 0)
    np.testing.assert_allclose(logits_BV, expected[:, 4], atol=tolerance)
    for t in range(5, T + 1):
        logits_BV, cache = extend(variables, cache, token_BT[:, t : t + 1], t)
        np.testing.assert_allclose(logits_BV, expected[:, t], atol=tolerance)


@pytest.mark.parametrize("name", ["reversible", "experts", "tied", "as Qwen", "as GPT-2"])
def test_the_twin_has_the_same_parameters(name):
    changes = VARIANTS[name]
    shapes = [
        jax.eval_shape(model(**changes, reversible=reversible).init, jax.random.key(0))
        for reversible in (True, False)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.thorough
@pytest.mark.parametrize(("causal", "length"), [(True, 300), (False, 100)])
def test_chunked_attention_is_attention(causal, length):
    q, k, v = (
        jax.random.normal(key, (2, length, heads, 8))
        for key, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    mask = jnp.tril(jnp.ones((length, length), bool)) if causal else None

    def value_and_gradient(function):
        loss = lambda *qkv: jnp.sum(jnp.sin(function(*qkv)))
        return jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    expected = value_and_gradient(lambda q, k, v: scores_times_values(q, k, v, mask))
    got = value_and_gradient(lambda q, k, v: attend(q, k, v, causal=causal, kernel="chunked"))
    reference = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    np.testing.assert_allclose(scores_times_values(q, k, v, mask), reference, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_rotary_scores_depend_on_distance_alone():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
    at = lambda position: rotate(x, rotary_angles(jnp.array([position]), 8))[0, 0, 0]
    assert jnp.dot(at(3), at(7)) == pytest.approx(float(jnp.dot(at(103), at(107))), rel=1e-4)
    np.testing.assert_array_equal(at(0), x[0, 0, 0])


@pytest.mark.thorough
def test_routing_in_bfloat16_replays_at_depth():
    """No routing decision differs between forward and rewind, and the balance loss's gradient is
    store's: 24 layers of experts."""
    changes = {"experts": 4, "layers": 24}
    options = {"compute_dtype": jnp.bfloat16}
    variables = jit(model(**changes).init)(jax.random.key(0))
    rewound = model("reverse", options=options, **changes)
    (_, aux), (got, exactness) = gradient(rewound, variables, balance=1.0)
    stored = model("store", options=options, **changes)
    (_, expected_aux), (expected, _) = gradient(stored, variables, balance=1.0)
    assert exactness["layers"].mismatches == 0
    np.testing.assert_array_equal(aux[1], expected_aux[1])
    router = lambda params: params["layers"][1]["router"]["kernel"]
    difference = jnp.linalg.norm(router(got) - router(expected)) / jnp.linalg.norm(router(expected))
    assert difference <= 1e-6


@pytest.mark.parametrize("experts_per_token", [thorough(1), thorough(2)])
def test_the_router_learns_from_the_loss(experts_per_token):
    """And not from the balance loss alone."""
    lm = model("store", experts=4, experts_per_token=experts_per_token)
    variables = jit(lm.init)(jax.random.key(0))
    _, (got, _) = gradient(lm, variables, balance=0.0)
    assert jnp.linalg.norm(got["layers"][1]["router"]["kernel"]) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_experts_on_two_devices(backprop, axis):
    """Each sorts its own tokens, or computes its own hidden units.

    On a grid so fine (4.8e-7) that sums which round to a neighbouring point do not show.
    """
    lm = model(backprop, experts=4, options={"grid": Grid(21)})
    mesh = make_mesh(jax.devices(), **{"data": 1, axis: -1})
    variables = jit(lm.init)(jax.random.key(0))

    def loss(params, token_BT):
        nll, aux = lm.loss(Variables(params, {}), token_BT[:, :-1], token_BT[:, 1:])
        return nll + jnp.mean(aux[0])

    value_and_grad = jax.value_and_grad(loss)
    expected = jit(value_and_grad)(variables.params, tokens())
    got = jit(on_mesh(value_and_grad, mesh))(
        jax.device_put(variables.params, NamedSharding(mesh, PartitionSpec())),
        put_batch({"token": np.asarray(tokens())}, mesh)["token"],
    )
    assert mesh.size == 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 0}, "got kv_heads=0, expected a whole number from 1"),
        ({"options": {"loss_chunk": 0}}, "loss_chunk=0, expected 1 or more"),
        ({"heads": 3}, "got width=16 and heads=3, expected a width that heads of an even size"),
        ({"kv_heads": 3}, "got kv_heads=3, expected a divisor of heads=4"),
        ({"rotary_base": 0.0}, "got rotary_base=0.0, expected more than 0"),
        ({"experts": -1}, "got experts=-1, expected 0"),
        ({"dropout": 1.0}, "got dropout=1.0, expected a share"),
        ({"experts": 1}, "got experts_per_token=2, expected 1 to 1"),
        ({"reversible": False, "backprop": "reverse"}, "for a model of one stream"),
        ({"head_size": 5}, "got head_size=5, expected an even size, or 0 for width / heads"),
        ({"norm": "batch"}, "got norm='batch', expected one of rms, layer"),
        ({"bias": "some"}, "got bias='some', expected one of none, qkv, attention, all"),
        ({"activation": "relu"}, "got activation='relu', expected one of swiglu, gelu"),
        ({"experts": 2, "bias": "all"}, "got experts, activation='swiglu' and bias='all', expect"),
        ({"learned_positions": 9, "end_token": 1}, "got learned_positions=9 and end_token=1, ex"),
        ({"rotary_scaling": (8, 4, 4, 9)}, r"got rotary_scaling=\(8, 4, 4, 9\) and learned_posi"),
        ({"experts": 2, "options": {"feed_forward_chunks": 2}}, "got feed_forward_chunks=2 and"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_there_are_no_more_learned_positions_than_learned():
    lm, token_BT = model(learned_positions=T), tokens()
    variables = jax.eval_shape(lm.init, jax.random.key(0))
    assert variables.params["positions"].shape == (T, 16)
    jax.eval_shape(lm.logits, variables, token_BT[:, :T])
    for call in (
        lambda: lm.empty_cache(B, T + 1),
        lambda: jax.eval_shape(lm.logits, variables, token_BT),
    ):
        with pytest.raises(
            ValueError, match=f"got a sequence of {T + 1} tokens, expected at most {T}"
        ):
            call()
