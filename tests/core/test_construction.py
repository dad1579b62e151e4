"""What layers are built from is checked where they are built."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.core import (
    Block,
    Grid,
    HalfStep,
    additive,
    affine,
    bdia_block,
    leapfrog,
    meft_block,
    momentum_block,
    reversible_block,
    symplectic_block,
)


def double(params, x, context):
    return x * params


def test_a_half_step_cannot_read_what_it_updates():
    with pytest.raises(ValueError, match="updates stream 1 and reads"):
        HalfStep(double, updates=1, reads=(0, 1), coupling=additive())


@pytest.mark.parametrize(
    ("updates", "reads"), [(-1, (0,)), (0, (-1,)), (0, (True,)), (0, 1), (0.0, (1,)), (0, [1])]
)
def test_streams_are_counted_from_zero(updates, reads):
    with pytest.raises(ValueError, match=r"got a half-step that updates .* counted from 0"):
        HalfStep(double, updates=updates, reads=reads, coupling=additive())


def test_a_coupling_and_a_grid_are_made_before_they_are_passed():
    with pytest.raises(TypeError, match=r"got coupling=.*leapfrog.*, expected a Coupling: what"):
        reversible_block(double, double, coupling=leapfrog)
    with pytest.raises(TypeError, match=r"got grid=12, expected Grid\(bits\)"):
        reversible_block(double, double, grid=12)


@pytest.mark.parametrize(
    "make",
    [
        lambda branch: reversible_block(double, branch),
        lambda branch: momentum_block(branch, has_aux=True),
        lambda branch: bdia_block(branch, double),
        lambda branch: meft_block(branch, double),
        lambda branch: symplectic_block(double, branch, step=0.5),
        lambda branch: HalfStep(branch, 0, (1,), additive()),
    ],
)
def test_what_a_branch_is(make):
    with pytest.raises(
        TypeError, match=r"got None as a branch, expected a function of \(params, str"
    ):
        make(None)
    message = r"got a branch <lambda>\(p, x\), expected one of \(params, stream, context\)"
    with pytest.raises(TypeError, match=message):
        make(lambda p, x: x)
    make(functools.wraps(lambda p, x: x)(lambda *args: args[1]))  # takes what it takes itself
    make(jax.jit(double))


CONSTANTS = {
    "scale": additive,
    "step": leapfrog,
    "bound": affine,
    "gamma": lambda gamma: momentum_block(double, gamma=gamma),
    "step of energies": lambda step: symplectic_block(double, double, step=step),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_a_number(name):
    make, name = CONSTANTS[name], name.split()[0]
    for value in ("1.5", None, float("nan"), float("inf"), jnp.ones(2)):
        with pytest.raises(ValueError, match=rf"got {name}=.*, expected a finite number"):
            make(value)
    for value in (np.float32(1.5), jnp.float32(1.5)):
        if name != "gamma":
            make(value)
    message = rf"got {name}=a traced float32\[\], expected a constant.*in its params.*`data_L`"
    with pytest.raises(TypeError, match=message):
        jax.grad(lambda value: make(value) and value)(1.5)


@pytest.mark.parametrize("bits", [0, 25, 1.5, True, "1"])
def test_a_residue_has_a_whole_number_of_bits(bits):
    with pytest.raises(ValueError, match=r"got bits=.*, expected a whole number from 1 to 24"):
        bdia_block(double, double, bits=bits)


@pytest.mark.parametrize("scale", [0, 2**-25, 1.01, -0.5, "1", float("nan")])
def test_a_scale_has_an_inverse_on_the_grid(scale):
    with pytest.raises(ValueError, match=r"got scale=.*, expected a(t least 2\*\*-24| finite num)"):
        meft_block(double, double, scales=(0.5, scale))


@pytest.mark.parametrize("order", [(0,), (0, 0), (1, 2), (0, 1, 2)])
def test_an_order_names_every_stream_once(order):
    half_steps = reversible_block(double, double).half_steps
    with pytest.raises(ValueError, match="expected the indices of the 2 streams in some order"):
        Block(half_steps, order=order)


@pytest.mark.parametrize("bits", [2.5, "12", True, float("nan"), 23, -1])
def test_a_grid_has_a_whole_number_of_bits(bits):
    with pytest.raises(
        ValueError, match=r"got a grid of .* bits, expected a whole number, 0 to 22"
    ):
        Grid(bits)
    assert Grid(np.int64(12)) == Grid(12)
