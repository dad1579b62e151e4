"""An i-RevNet is one sequence from the image to the features, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import STRATEGIES
from revnet_jax.models import ConvNet, ConvNetShape, ModelOptions, Sweep
from revnet_jax.models.convolutional.invertible import depth_to_space, space_to_depth
from revnet_jax.training.compiler import exact_jit

COMPILE_FAST = {"xla_backend_optimization_level": 0}
IMAGE_SHAPE = (8, 8, 3)


def architecture(**changes):
    settings = {
        "family": "irevnet",
        "units": (2, 1),
        "channels": (8, 8, 32),
        "bottleneck": False,
        "stem": "pad",
        "image_shape": IMAGE_SHAPE,
        "num_classes": 10,
    }
    return ConvNetShape(**(settings | changes))


@pytest.fixture(scope="module")
def network():
    return ConvNet(architecture())


@pytest.fixture(scope="module")
def variables(network):
    return jax.jit(network.init, compiler_options=COMPILE_FAST)(jax.random.key(0))


@pytest.fixture(scope="module")
def image_BHWC():
    return jax.random.normal(jax.random.key(1), (4, *IMAGE_SHAPE))


def test_space_to_depth_takes_squares_apart():
    x_BHWC = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y_BHWC = space_to_depth(x_BHWC)
    assert y_BHWC.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y_BHWC[1, 1, 2, :3], x_BHWC[1, 2, 4])
    np.testing.assert_array_equal(y_BHWC[1, 1, 2, 3:6], x_BHWC[1, 2, 5])
    np.testing.assert_array_equal(y_BHWC[1, 1, 2, 6:9], x_BHWC[1, 3, 4])
    np.testing.assert_array_equal(depth_to_space(y_BHWC), x_BHWC)


@pytest.mark.parametrize("train", [True, False])
def test_features_are_taken_back_to_the_image_bit_for_bit(network, variables, image_BHWC, train):
    @jax.jit
    def there_and_back(image_BHWC):
        x_BHWC, _ = network.features(variables, image_BHWC, train=train)
        return x_BHWC, network.inverse(variables, x_BHWC, train=train)

    x_BHWC, rebuilt_BHWC = there_and_back(image_BHWC)
    assert x_BHWC.shape == (4, 4, 4, 32)  # more elements than the image has: none are lost
    np.testing.assert_array_equal(rebuilt_BHWC, network.grid.snap(image_BHWC))


@pytest.mark.thorough
def test_one_gradient_whatever_the_strategy(network, variables, image_BHWC):
    grads = {}
    for backprop in STRATEGIES:
        net = ConvNet(network.shape, ModelOptions(backprop=backprop))

        def loss(params, probes, net=net):
            logits_BV, _ = net.apply(
                variables._replace(params=params), image_BHWC, train=True, sweep=Sweep(probes)
            )
            return jnp.mean(jnp.sin(logits_BV))

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=COMPILE_FAST)
        grads[backprop], exactness = grad(variables.params, net.probes())
        if backprop == "reverse":
            (found,) = exactness.values()  # one chain: the whole body
            assert found.mismatches == 0
            assert found.max_abs > 1
    for backprop in ("remat", "reverse"):
        jax.tree.map(
            lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6),
            grads[backprop],
            grads["store"],
        )


@pytest.mark.thorough
def test_memory_between_stages_is_not_kept():
    """Twice the units in every stage take no more memory under reverse."""

    def temporary_bytes(units, backprop):
        network = ConvNet(architecture(units=units), ModelOptions(backprop, check_exactness=False))
        variables = jax.eval_shape(network.init, jax.random.key(0))
        image = jax.ShapeDtypeStruct((32, *IMAGE_SHAPE), jnp.float32)

        def loss(params, variables, image):
            return jnp.mean(network.apply(variables._replace(params=params), image, train=True)[0])

        grad = jax.jit(jax.grad(loss), compiler_options=COMPILE_FAST)
        program = grad.lower(variables.params, variables, image).compile()
        return program.memory_analysis().temp_size_in_bytes

    reverse, store = (
        temporary_bytes((9, 9), backprop) - temporary_bytes((3, 3), backprop)
        for backprop in ("reverse", "store")
    )
    assert reverse < 0.02 * store


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 8, 16)}, r"expected \(8, 8, 32\)"),
        ({"image_shape": (9, 9, 3)}, "height and width divisible by 2"),
        ({"channels": (2, 2, 8)}, "expected a stem that adds channels"),
    ],
)
def test_shapes_that_lose_something(changes, message):
    with pytest.raises(ValueError, match=message):
        architecture(**changes)


def test_a_network_that_loses_something_has_no_inverse(image_BHWC):
    network = ConvNet(architecture(family="revnet", stem="cifar"))
    with pytest.raises(ValueError, match="any other has no inverse down to the image"):
        network.inverse(None, image_BHWC, train=False)


@pytest.mark.thorough
def test_single_layers_between_changes_of_resolution_are_rebuilt_exactly():
    """Outside a loop the compiler sees a layer's neighbours, and might sum in another order."""
    shapes = {"units": (1, 1, 1), "channels": (16, 16, 64, 256), "image_shape": (32, 32, 3)}
    network = ConvNet(architecture(**shapes))
    variables = jax.jit(network.init, compiler_options=COMPILE_FAST)(jax.random.key(0))
    image_BHWC = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))

    def loss(params, probes):
        logits_BV, _ = network.apply(
            variables._replace(params=params), image_BHWC, train=True, sweep=Sweep(probes)
        )
        return jnp.mean(jnp.sin(logits_BV))

    _, exactness = exact_jit(jax.grad(loss, argnums=(0, 1)))(variables.params, network.probes())
    (found,) = exactness.values()
    assert found.mismatches == 0
