"""The timeline: what is drawn is what the compiler allocates, and has the shape it should."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.config import image_classification, language_model
from revnet_jax.core import chain, reversible_block
from revnet_jax.errors import UserError
from revnet_jax.families import build_task
from revnet_jax.planning.timeline import (
    batch_shape,
    draw_timelines,
    timeline_report,
    timeline_table,
    timelines,
    with_layers,
)
from revnet_jax.programs.buffers import assignment
from revnet_jax.programs.liveness import liveness

BASIC = ("store", "remat", "reverse")
ROWS, WIDTH, LAYERS = 256, 16, 8
STREAM_BYTES = ROWS * WIDTH * 4


@pytest.fixture(scope="module")
def lines():
    config = image_classification()
    sizes = {"batch_size": 32, "model.units": (1,), "model.channels": (8, 8)}
    config.update_from_flattened_dict(sizes)
    return timelines(config, 6)  # of three, what one branch computes is more than remat keeps


def followed_chain(backprop):
    """The liveness of a chain's gradient, and the compiler's figure."""
    branch = lambda params, x, context: jnp.tanh(x @ params)
    block = reversible_block(branch, branch)

    def loss(params_L, x):
        y, _ = chain(block, params_L, x, backprop=backprop)
        return jnp.sum(y[0] * y[1])

    params_L = (jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32),) * 2
    x = (jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),) * 2
    compiled = jax.jit(jax.grad(loss)).lower(params_L, x).compile()
    memory: Any = compiled.memory_analysis()
    return liveness(assignment(compiled)), memory.temp_size_in_bytes


@pytest.mark.thorough
def test_the_peak_that_is_drawn_is_the_compilers_own_figure(lines):
    """Both figures are read off the same program."""
    assert [line.backprop for line in lines] == list(BASIC)
    for line in lines:
        assert line.peak_bytes == pytest.approx(line.compiled_bytes, rel=0.1)
        assert line.peak_bytes <= max(line.allocated_bytes) <= line.compiled_bytes
    store, remat, reverse = lines
    assert store.peak_bytes > remat.peak_bytes > reverse.peak_bytes


@pytest.mark.parametrize(("backprop", "streams_a_layer"), [("store", 4), ("remat", 2)])
def test_what_is_kept_fills_up_layer_by_layer_and_empties_again(backprop, streams_a_layer):
    """store: of each branch its input and the product."""
    found, compiled_bytes = followed_chain(backprop)
    live, turn = found.live_bytes, found.turn
    assert max(live) == pytest.approx(compiled_bytes, rel=0.1)
    kept = streams_a_layer * LAYERS * STREAM_BYTES
    assert live[turn] == pytest.approx(kept, abs=4 * STREAM_BYTES)
    # Two points that a layer's turn of the loop lies between, both ways, and a branch at work.
    half_way = live[turn // 2], live[turn + (len(live) - turn) // 2]
    assert half_way == pytest.approx((kept / 2, kept / 2), abs=6 * STREAM_BYTES)
    # As it is allocated it is there all the time.
    assert found.allocated_bytes[turn // 2] >= kept
    assert np.all(live <= found.allocated_bytes)


def test_reverse_is_flat():
    """No turn of a loop differs from the next, and nothing in it depends on the depth."""
    found, compiled_bytes = followed_chain("reverse")
    live, turn = found.live_bytes, found.turn
    assert max(live) == pytest.approx(compiled_bytes, rel=0.1)
    assert np.array_equal(live, found.allocated_bytes)
    assert max(live) < 12 * STREAM_BYTES
    backward = live[turn : turn + (len(live) - turn) // LAYERS * LAYERS].reshape(LAYERS, -1)
    assert np.ptp(backward.max(axis=1)[1:-1]) <= STREAM_BYTES


def test_a_program_without_a_backward_loop_is_refused():
    compiled = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((64, 64))).compile()
    with pytest.raises(ValueError, match="expected a gradient of chains"):
        liveness(assignment(compiled))


@pytest.mark.parametrize("family", ["revnet", "resnet", "irevnet"])
def test_every_chain_gets_its_layers(step_config, family):
    step_config.model.family = family
    channels = (8, 8, 32) if family == "irevnet" else (8, 8, 16)
    step_config.model.channels = channels
    step_config.model.update({"backprop": "reverse,store", "stored_layers": 2})
    chains = build_task(with_layers(step_config, 5)).network.chains.values()
    depths = [sum(group.depth for group in chain if group.unit) for chain in chains]
    assert depths == ([10] if family == "irevnet" else [5, 5])


def test_layers_are_in_a_loop(step_config):
    step_config.model.unroll = 3
    assert with_layers(step_config, 3).model.unroll == 1


@pytest.mark.thorough
def test_figures_are_printed_and_drawn(lines, tmp_path):
    table = [line.split("|") for line in timeline_table(lines).splitlines()]
    assert [row[1].strip() for row in table[2:]] == list(BASIC)
    report = timeline_report(lines)
    assert json.loads(json.dumps(report)) == report
    assert all(0 < row["backward_starts_at"] < row["instructions"] for row in report)
    figure = draw_timelines(lines, "three", pytest.importorskip("matplotlib.figure").Figure)
    figure.savefig(tmp_path / "plot.png", dpi=100)
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 150_000


def test_the_title_is_of_the_device_that_is_compiled_for():
    """Its attention kernel too, which this machine's CPU would refuse."""
    config = language_model()
    config.model.attention = "cudnn"
    device: Any = SimpleNamespace(platform="gpu")
    assert batch_shape(config, device) == (config.batch_size, config.data.context)


def test_what_cannot_be_drawn_is_one_line(step_config):
    with pytest.raises(UserError, match="got strategy 'revers', expected some of store, "):
        timelines(step_config, 3, ["revers"])
    with pytest.raises(UserError, match="got 2 layers, expected 3 or more"):
        timelines(step_config, 2)
