"""The report on a new block: silent about a good one, and plain about each way to be wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    Coupling,
    Grid,
    Invertible,
    check_reversible,
    leapfrog,
    momentum_block,
    reversible_block,
)
from revnet_jax.core.check import _cast
from tests import thorough

WIDTH, ROWS = 8, 16


def dense(params, x, context):
    return jnp.tanh(x @ params)


@pytest.fixture(scope="module")
def arguments():
    keys = jax.random.split(jax.random.key(0), 4)
    params = tuple(jax.random.normal(key, (WIDTH, WIDTH)) for key in keys[:2])
    return params, tuple(jax.random.normal(key, (ROWS, WIDTH)) for key in keys[2:])


def failed(report):
    return {finding.law: finding for finding in report.findings if finding.passed is False}


def test_a_good_block(arguments):
    params, x = arguments
    report = check_reversible(momentum_block(dense), (params[0], ()), x)
    assert report.ok, report
    laws = {finding.law: finding for finding in report.findings}
    assert laws["residue"].measured.startswith("0.50 bits per element")
    assert all(laws[f"gradient = store, {d}"].passed for d in ("float32", "bfloat16", "float64"))
    assert str(report).count("\n") >= len(report.findings) - 1


@pytest.mark.thorough
def test_free_streams(arguments):
    block = reversible_block(dense, dense, grid=None)
    report = check_reversible(block, *arguments, dtypes=["float32", "float64"])
    wrong = failed(report)
    assert {"inverse of forward", "forward of inverse"} <= set(wrong)
    assert "give the block a Grid()" in wrong["inverse of forward"].advice
    assert "gradient = store, float64" not in wrong  # it drifts by an ulp of float64


def test_hidden_randomness(arguments):
    rng = np.random.default_rng(0)
    noisy = lambda params, x, context: x * jnp.float32(rng.uniform())
    wrong = failed(check_reversible(reversible_block(noisy, dense), *arguments, depth=2))
    assert list(wrong) == ["same bits when asked again"]  # the cause, not what follows from it
    assert "draw it from a key" in wrong["same bits when asked again"].advice


def test_an_inverse_that_is_none(arguments):
    params, x = arguments
    layer = Invertible(
        lambda params, x, context: (x[1], x[0] + 1), lambda params, y, context: (y[1], y[0])
    )
    wrong = failed(check_reversible(layer, params, x, depth=3, dtypes=[]))
    assert "not the exact inverse" in wrong["inverse of forward"].advice


def test_a_range_that_is_used_up(arguments):
    params, x = arguments
    grow = lambda params, x, context: 8 * x
    wrong = failed(
        check_reversible(reversible_block(grow, grow, grid=Grid(20)), params, x, dtypes=["float32"])
    )
    assert "grid of fewer bits" in wrong["range of the grid"].advice


@pytest.mark.thorough
def test_a_range_that_overflows_is_named_first(arguments):
    """What fails behind it says so, rather than blame the coupling."""
    large = lambda params, x, context: 3000 * dense(params, x, context)
    wrong = failed(check_reversible(reversible_block(large, large), *arguments, dtypes=["float32"]))
    first, second, *_ = wrong.values()
    assert first.law == "range of the grid"
    assert first.measured.startswith("|x| up to 2.4e+04 of 4096")
    assert "normalise what the branches read" in first.advice
    assert "fewer bits" in first.advice
    assert second.law == "inverse of forward"
    assert "see 'range of the grid'" in second.advice


@pytest.mark.parametrize(
    ("step", "bits", "passed"),
    [
        (5e-5, 12, False),
        thorough(5e-4, 12, None),
        thorough(5e-5, 20, True),
        thorough(0.1, 12, True),
    ],
)
def test_updates_that_vanish_on_the_grid(arguments, step, bits, passed):
    """An ODE whose steps are refined until the state stands still."""
    _, x = arguments
    decay = lambda params, x, context: -0.5 * x
    block = reversible_block(decay, decay, coupling=leapfrog(step), grid=Grid(bits))
    report = check_reversible(block, ((), ()), x, dtypes=[])
    (finding,) = [f for f in report.findings if f.law == "resolution of the grid"]
    assert finding.passed is passed
    smallest = {12: "0.00012", 20: "4.8e-07"}[bits]
    assert f"of a branch's updates rounded to nothing, below {smallest}" in finding.measured
    assert "take a grid of more bits" in finding.advice
    assert report.ok == (passed is not False)


@pytest.mark.thorough
def test_branches_that_return_zeros_lose_nothing(arguments):
    """As those that are initialised with zeros; and what is pushed into a velocity is an update."""
    zero = lambda params, x, context: jnp.zeros_like(x)
    for block, is_lost in (
        (momentum_block(zero), False),
        (momentum_block(lambda *args: zero(*args) + 1e-3), True),
    ):
        report = check_reversible(block, ((), ()), arguments[1], depth=2, dtypes=[])
        assert report.ok != is_lost, report


def test_what_is_no_array_is_one_line(arguments):
    report = check_reversible(reversible_block(dense, dense), *arguments, shared="text")
    assert "got shared of type str, expected an array" in report.findings[0].measured


def test_a_layer_that_changes_a_stream(arguments):
    params, x = arguments
    report = check_reversible(reversible_block(lambda p, x, c: x[:2], dense), params, x)
    (finding,) = report.findings
    assert not report.ok
    assert "expected the shape of the stream" in finding.measured


def test_closing_over_what_is_differentiated(arguments):
    params, x = arguments

    def loss(weight):
        closing = lambda params, x, context: x * weight
        report = check_reversible(reversible_block(closing, dense), params, x)
        assert "closes over traced values" in report.findings[0].measured
        return weight

    jax.grad(loss)(2.0)


def test_closing_over_an_array_is_mentioned(arguments):
    params, x = arguments
    weight = jnp.ones((WIDTH, WIDTH)) / 8
    closing = lambda params, x, context: jnp.tanh(x @ weight)
    report = check_reversible(reversible_block(closing, dense), params, x, depth=2, dtypes=[])
    assert report.ok
    assert "must come through params or shared" in str(report)


def test_a_layer_with_a_gradient_of_its_own_that_is_wrong(arguments):
    """What a hand-written gradient gets wrong is not found by undoing alone."""
    params, x = arguments

    class Wrong(Invertible):
        def rewind(self, *args):
            rewound = super().rewind(*args)
            return rewound._replace(dx=tuple(2 * dx for dx in rewound.dx))

    swap = Wrong(lambda params, x, context: (x[1], x[0]), lambda params, y, context: (y[1], y[0]))
    wrong = failed(check_reversible(swap, params, x, depth=2, dtypes=["float32"]))
    assert "gradient = store, float32" in wrong
    assert "inverse of forward" not in wrong


@pytest.mark.thorough
def test_an_update_that_is_not_snapped(arguments):
    """The gradient of a few layers is hardly wrong yet; that streams are not rebuilt is enough."""
    forgetful = Coupling(
        merge=lambda x, u, grid: (x + u, None), unmerge=lambda y, u, residue, grid: y - u
    )
    block = reversible_block(dense, dense, coupling=forgetful)
    wrong = failed(check_reversible(block, *arguments, depth=2, dtypes=["float32"]))
    assert "snap what is added" in wrong["inverse of forward"].advice
    assert "gradient = store, float32" in wrong


def test_what_cannot_be_run_is_no_pass(arguments):
    """Not even the rewind of a layer that was written for this report alone."""
    (params, _), x = arguments
    block = reversible_block(dense, dense)

    class Unfinished:
        grid = block.grid
        forward, inverse = staticmethod(block.forward), staticmethod(block.inverse)

        def rewind(self, *arguments):
            raise NotImplementedError("later")

    report = check_reversible(Unfinished(), (params, params), x, dtypes=["float32"])
    assert not report.ok
    assert "NotImplementedError: later" in failed(report)["gradient = store, float32"].measured


@pytest.mark.thorough
def test_a_single_layer(arguments):
    report = check_reversible(reversible_block(dense, dense), *arguments, depth=1, dtypes=[])
    assert report.ok, report


@pytest.mark.parametrize("dtypes", ["float32", ["float16"]])
def test_dtypes_that_are_not_compared(arguments, dtypes):
    with pytest.raises(ValueError, match=r"got dtypes=.*, expected a list of some of float32"):
        check_reversible(reversible_block(dense, dense), *arguments, dtypes=dtypes)


def test_complex_parameters_stay_complex(arguments):
    _, x = arguments
    turned = lambda params, x, context: jnp.imag(params * x.astype(params.dtype))
    params = (jnp.complex64(1 + 0.5j), jnp.complex64(0.2j))
    report = check_reversible(reversible_block(turned, turned), params, x)
    assert report.ok, report
    (kept,) = {str(x.dtype) for x in jax.tree.leaves(_cast(params, jnp.bfloat16))}
    assert kept == "complex64"
