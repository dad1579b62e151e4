"""Vision transformers: one function whatever its gradient costs, of the published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import VIT_SIZES
from revnet_jax.models import (
    ModelOptions,
    Sweep,
    Variables,
    VisionTransformer,
    VisionTransformerShape,
    num_params,
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SIZES = {"image_shape": (8, 12, 3), "num_classes": 5, "patch": 4, "layers": 3, "width": 16}
SIZES |= {"heads": 2, "hidden": 24}


def model(backprop="reverse", **changes):
    return VisionTransformer(VisionTransformerShape(**(SIZES | changes)), ModelOptions(backprop))


def drawn(vit):
    """Variables of random numbers: a head that starts at zero hides all gradients but its own."""
    # `init` would have to be compiled for its shapes alone.
    leaves, tree = jax.tree.flatten(jax.eval_shape(vit.init, jax.random.key(0)).params)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return Variables(jax.tree.unflatten(tree, leaves), {})


def gradient(vit, variables, key=None):
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))

    def loss(params, probes):
        options = {"train": key is not None, "key": key, "sweep": Sweep(probes)}
        logits_BV, _ = vit.apply(Variables(params, {}), image, **options)
        return jnp.sum(jnp.sin(logits_BV))

    return jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables.params, vit.probes())


BDIA = {"integrator": "bdia"}
ERF = BDIA | {"gelu": "erf"}
MIDPOINT = {"integrator": "midpoint"}
MIXED = {"pool": "mean", "dropout": 0.3}


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{}, MIXED, MIXED | BDIA, ERF, MIDPOINT], ids=str)
def test_strategies_give_one_gradient(changes):
    variables = drawn(model(**changes))
    key = jax.random.key(2) if changes else None
    loss, (expected, _) = gradient(model("store", **changes), variables, key)
    other, (got, exactness) = gradient(model(**changes), variables, key)
    assert other == pytest.approx(float(loss), rel=1e-6)
    assert exactness["layers"].mismatches == 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(b) > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_outside_of_training_bdia_is_the_network_of_one_stream():
    image = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    one = model("store", reversible=False)
    variables = drawn(one)
    apply = lambda vit, **how: jit(lambda v: vit.apply(v, image, **how)[0])(variables)
    expected = apply(one, train=False)
    np.testing.assert_array_equal(apply(model(**BDIA), train=False), expected)
    exact = apply(model(**ERF), train=False)
    np.testing.assert_array_equal(apply(model(**ERF), train=True), exact)  # no key
    assert np.max(np.abs(exact - expected)) > 1e-5  # another GELU
    draws = [apply(model(**BDIA), train=True, key=jax.random.key(i)) for i in range(2)]
    assert np.max(np.abs(draws[0] - draws[1])) > 1e-3


@pytest.mark.parametrize(
    ("size", "millions"),
    [("Ti", 5.717416), ("S", 22.050664), ("B", 86.567656), ("L", 304.326632), ("H", 632.0458)],
)
@pytest.mark.parametrize("reversible", [True, False])
def test_parameters_are_those_of_the_published_models(size, millions, reversible):
    layers, width, heads = VIT_SIZES[size]
    sizes = {"layers": layers, "width": width, "heads": heads, "hidden": 4 * width}
    sizes |= {
        "patch": 14 if size == "H" else 16,
        "image_shape": (224, 224, 3),
        "num_classes": 1000,
        "reversible": reversible,
    }
    vit = model("store", **sizes)
    assert num_params(jax.eval_shape(vit.init, jax.random.key(0))) == round(millions * 1e6)


def test_streams_stay_in_float32_when_parameters_are_narrowed(monkeypatch):
    options = ModelOptions("reverse", compute_dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    vit = VisionTransformer(VisionTransformerShape(**SIZES), options)
    seen = []
    run_chain = vit.run_chain
    monkeypatch.setattr(
        vit,
        "run_chain",
        lambda layer, params, x, **rest: seen.extend(x) or run_chain(layer, params, x, **rest),
    )
    variables = jax.eval_shape(vit.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, 8, 12, 3), jnp.float32)
    jax.eval_shape(functools.partial(vit.apply, train=False), variables, image)
    assert {x.dtype for x in seen} == {jnp.dtype("float32")}
    # What is added to the streams is not narrowed, the kernel that makes them is.
    stem = variables.params["stem"]
    assert stem["position"].dtype == stem["token"].dtype == jnp.float32
    assert stem["embed"]["kernel"].dtype == jnp.bfloat16


def test_patches_are_read_row_by_row():
    """Moving a patch of the image moves one token."""
    vit = model("store", pool="mean")
    patches = vit._stem
    params, _ = patches.init(jax.random.key(0))
    image = jnp.zeros((1, 8, 12, 3)).at[:, 4:8, 8:12].set(1.0)
    moved = patches.apply(params, {}, image)[0] - patches.apply(params, {}, 0 * image)[0]
    assert [bool(jnp.any(moved[0, t] != 0)) for t in range(6)] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 5}, r"got patch=5 for images of \(8, 12\), expected a divisor"),
        ({"heads": 3}, "got heads=3, expected a divisor of the width 16"),
        ({"layers": 0}, "got layers=0, expected a whole number from 1"),
        ({"pool": "max"}, "got pool='max', expected one of token, mean"),
        ({"integrator": "dual"}, "got integrator='dual', expected one of streams, bdia, midpoint"),
        ({"gelu": "exact"}, "got gelu='exact', expected one of tanh, erf"),
        ({"reversible": False}, "got backprop='reverse' for a model of one stream"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
