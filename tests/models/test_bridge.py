"""A module as pure functions: nothing is kept inside it, and nothing is lost on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from revnet_jax.core import Context, Exactness, Grid, chain, reversible_block
from revnet_jax.models import (
    BranchData,
    init_layers,
    linen_branch,
    nnx_branch,
    with_keys,
    with_stats,
)
from revnet_jax.models.bridge import PureModule
from tests.core import toy


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


class TwoMasks(nnx.Module):
    """Two dropouts, one of them on a stream of its own name, so that ones show their masks."""

    def __init__(self, rngs):
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rng_collection="noise", rngs=rngs)

    def __call__(self, x):
        return self.first(x), self.second(x)


class LinenTwoMasks(linen.Module):
    @linen.compact
    def __call__(self, x):
        dropouts = linen.Dropout(0.5), linen.Dropout(0.5, rng_collection="noise")
        return tuple(dropout(x, deterministic=False) for dropout in dropouts)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.linear(self.norm(x))))


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(momentum=0.9, use_running_average=not train, name="norm")(x)
        x = jnp.tanh(linen.Dense(WIDTH, name="linear")(x))
        return linen.Dropout(0.3, deterministic=not train)(x)


DEPTH, ROWS, WIDTH = 3, 5, 6
x1, x2 = X12 = tuple(
    Grid().snap(3 * jax.random.normal(jax.random.key(i), (ROWS, WIDTH))) for i in (1, 2)
)
F = nnx_branch(lambda rngs: MLP(rngs), "f")
G = linen_branch(LinenMLP(), "g", x1, train=True)
BLOCK = reversible_block(F, G, has_aux=True)


@functools.cache
def layers():
    """(params_L, data_L) with running averages that are those of some earlier batches."""
    params_L, data_L = init_layers((F, G), jax.random.key(0), DEPTH)
    stats = iter(jax.random.uniform(jax.random.key(9), (4, DEPTH, WIDTH), minval=0.5))
    fresh = {name: data.stats for name, data in data_L.items()}
    return params_L, with_stats(data_L, (jax.tree.map(lambda _: next(stats), fresh),))


@functools.cache
def step(backprop):
    """((loss, (y, aux_L)), gradients, exactness)."""
    params_L, data_L = layers()

    @toy.jit
    def run(params_L, x, probe, data_L):
        def loss(params_L, x, probe):
            y, aux_L = chain(BLOCK, params_L, x, data_L=data_L, backprop=backprop, probe=probe)
            return jnp.mean(y[0] * jnp.sin(y[1])), (y, aux_L)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params_L, x, probe)

    value, (dparams_L, dx, exactness) = run(params_L, X12, Exactness.probe(), data_L)
    return value, (dparams_L, dx), exactness


@pytest.mark.thorough
@pytest.mark.parametrize("backprop", ["remat", "reverse"])
def test_dropout_and_batch_norm_in_a_chain(backprop):
    """The rewind draws the masks of the forward pass, and averages are updated once."""
    value, gradient, exactness = step(backprop)
    true_value, true_gradient, _ = step("store")
    assert exactness.mismatches == 0
    assert exactness.max_abs > 0 or backprop != "reverse"
    assert toy.relative_error(value, true_value) < 1e-6
    assert toy.relative_error(gradient, true_gradient) < 1e-5
    for leaf in jax.tree.leaves(true_gradient):
        assert jnp.linalg.norm(leaf) > 0


@pytest.mark.thorough
def test_running_averages_are_those_of_each_layers_input():
    params_L, data_L = layers()
    forward = toy.jit(lambda params, x, data: BLOCK.forward(params, x, Context(data=data))[0])
    (_, (_, aux_L)), _, _ = step("reverse")
    new_data_L = with_stats(data_L, aux_L)
    x = X12
    for layer in range(DEPTH):
        old, new = (jax.tree.map(lambda leaf: leaf[layer], d) for d in (data_L, new_data_L))  # noqa: B023
        y = forward(jax.tree.map(lambda leaf: leaf[layer], params_L), x, old)  # noqa: B023
        for name, read in (("f", x[1]), ("g", y[0])):  # f reads x2, g reads y1
            batch = {"mean": np.mean(read, axis=0), "var": np.var(read, axis=0)}
            for moment, value in batch.items():
                expected = 0.9 * old[name].stats["norm"][moment] + 0.1 * value
                np.testing.assert_allclose(new[name].stats["norm"][moment], expected, rtol=1e-5)
        x = y
    assert jnp.array_equal(new_data_L["f"].key, data_L["f"].key)


FLAGS = {"deterministic": True, "use_running_average": True}


@pytest.mark.parametrize(
    ("i", "branch"),
    [
        (0, nnx_branch(lambda rngs: nnx.view(MLP(rngs), **FLAGS), "f")),
        (1, functools.partial(G, train=False)),
    ],
    ids=["nnx", "linen"],
)
def test_evaluation_normalises_by_running_averages_and_drops_nothing(i, branch):
    params, data = jax.tree.map(lambda leaf: leaf[0], (layers()[0][i], layers()[1]))
    u, aux = toy.jit(branch)(params, x1, Context(data=data))
    name = "fg"[i]
    stats = data[name].stats["norm"]
    normalised = (x1 - stats["mean"][None]) / jnp.sqrt(stats["var"][None] + 1e-5)
    normalised = normalised * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    hidden = normalised @ params["linear"]["kernel"] + params["linear"]["bias"][None]
    np.testing.assert_allclose(u, jnp.tanh(hidden), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, aux, {name: data[name].stats})


MASKS = [
    nnx_branch(lambda rngs: TwoMasks(rngs), "f"),
    linen_branch(LinenTwoMasks(), "f", jnp.ones((4, 50))),
]


@pytest.mark.parametrize("branch", MASKS, ids=["nnx", "linen"])
def test_masks_are_a_function_of_the_key(branch):
    run = lambda seed: branch(
        {}, jnp.ones((4, 50)), Context(data={"f": BranchData({}, jax.random.key(seed))})
    )[0]
    first, second = run(0)
    np.testing.assert_array_equal(np.unique(first), [0, 2])
    same = lambda a, b: np.mean(np.asarray(a) == np.asarray(b))
    np.testing.assert_array_equal((first, second), run(0))
    assert same(first, run(1)[0]) < 0.7
    assert same(first, second) < 0.7


def test_an_nnx_module_without_streams_takes_its_keywords():
    branch = nnx_branch(lambda rngs: Scaled(3, rngs), "f", train=True)
    params, _ = branch.init(jax.random.key(0))
    context = Context(data={"f": BranchData({"largest": jnp.float32(-1)}, jax.random.key(0))})
    y, aux = branch(params, X, context)
    assert aux["f"]["largest"] == jnp.max(y)
    _, aux = functools.partial(branch, train=False)(params, X, context)
    assert aux["f"]["largest"] == -1


def test_linen_parameters_are_linens_own():
    params, data = jax.tree.map(lambda leaf: leaf[0], (layers()[0][1], layers()[1]["g"]))
    u, _ = toy.jit(functools.partial(G, train=False))(params, x1, Context(data={"g": data}))
    variables = {"params": params, "batch_stats": data.stats}
    np.testing.assert_allclose(u, LinenMLP().apply(variables, x1, train=False), atol=1e-6)
    init = jax.eval_shape(lambda: LinenMLP().init(jax.random.key(0), x1, train=True))
    for tree, true in ((params, init["params"]), (data.stats, init["batch_stats"])):
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, true)


def test_init_layers_draws_every_layer_anew():
    params_L, data_L = init_layers((F, G), jax.random.key(0), DEPTH)
    kernels = np.concatenate([p["linear"]["kernel"] for p in params_L])
    assert kernels.shape == (2 * DEPTH, WIDTH, WIDTH)
    assert len(np.unique(kernels)) == kernels.size
    assert np.std(kernels) == pytest.approx(WIDTH**-0.5, rel=0.2)
    for data in data_L.values():
        assert data.key.shape == (DEPTH,)
        np.testing.assert_array_equal(data.stats["norm"]["mean"], np.zeros((DEPTH, WIDTH)))
        np.testing.assert_array_equal(data.stats["norm"]["var"], np.ones((DEPTH, WIDTH)))
    again = init_layers((F, G), jax.random.key(0), DEPTH)[0]
    jax.tree.map(np.testing.assert_array_equal, again, params_L)


def test_every_step_branch_and_layer_has_its_key():
    data_L = {"g": layers()[1]["g"], "rate": jnp.ones(DEPTH), "f": layers()[1]["f"]}
    new_L = with_keys(data_L, jax.random.key(1))
    bits = lambda data_L: np.concatenate(
        [jax.random.key_data(data_L[name].key)[:, 0] for name in ("f", "g")]
    )
    assert len(np.unique(np.concatenate([bits(data_L), bits(new_L)]))) == 4 * DEPTH
    np.testing.assert_array_equal(bits(toy.jit(with_keys)(data_L, jax.random.key(1))), bits(new_L))
    assert new_L["rate"] is data_L["rate"]
    assert new_L["g"].stats is data_L["g"].stats


class Counter(nnx.Variable):
    pass


class Counting(nnx.Module):
    def __init__(self, rngs):
        self.calls = Counter(jnp.zeros(()))


class LinenCounting(linen.Module):
    @linen.compact
    def __call__(self, x):
        self.variable("memory", "calls", lambda: jnp.zeros(()))
        return x


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nnx_branch(Counting, "f"), "state Counter, expected parameters"),
        (lambda: linen_branch(LinenCounting(), "f", x1), "state memory, expected parameters"),
        (lambda: nnx_branch(MLP(nnx.Rngs(0)), "f"), "got MLP, expected what builds"),
        (
            lambda: nnx_branch(lambda rngs: MLP(rngs).eval(), "f"),
            "got NoneType, expected what builds",
        ),
        (lambda: nnx_branch(LinenMLP(), "f"), "got LinenMLP, expected what builds"),
        (lambda: linen_branch(LinenMLP, "f", x1), "expected a linen module"),
        (lambda: init_layers((F, F), jax.random.key(0), 2), "got branches f, f"),
        (lambda: init_layers(F, jax.random.key(0), 2), "expected branches of nnx_branch"),
        (lambda: chain(BLOCK, layers()[0], X12), "got no data for 'f', expected"),
        (lambda: with_stats(layers()[1], ({"f": ()}, None)), r"averages for \['g'\]"),
        (lambda: PureModule(MLP).apply({}, {}, x1), "got key=None"),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert "\n" not in str(error.value)


def test_partitioning_annotations_need_no_mesh():
    """They are of one layer's axes; where the stacked parameters lie is for others to say."""
    make_kernel = linen.initializers.lecun_normal()
    dense = linen.Dense(8, kernel_init=linen.with_partitioning(make_kernel, (None, "model")))
    annotated = nnx.with_partitioning(make_kernel, (None, "model"))
    linear = lambda rngs: nnx.Linear(8, 8, kernel_init=annotated, rngs=rngs)
    x = jnp.ones((4, 8))
    branches = linen_branch(dense, "f", x), nnx_branch(linear, "g")
    params_L, data_L = init_layers(branches, jax.random.key(0), 3)
    assert [params["kernel"].shape for params in params_L] == [(3, 8, 8)] * 2
    y, _ = chain(reversible_block(*branches, has_aux=True), params_L, (x, x), data_L=data_L)
    assert jnp.all(y[0] != x)
