"""Decoders whose tokens read a window, and nothing of other documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.core import Grid
from revnet_jax.models import Sweep, Variables
from revnet_jax.models.transformer import attention
from revnet_jax.training.sharding import make_mesh, on_mesh, put_batch
from tests import thorough
from tests.models.test_lm import T, jit, model, tokens

END = 3
NEAR = {"window": 4, "end_token": END}
ENDS = ((0, 4, 8), (1, 0, 1, 10))  # of row 0: 4 and 8; a document of one token; two that follow


@pytest.fixture
def blocks(monkeypatch):
    """As of long sequences: of four queries, for what reads a window of as many."""
    monkeypatch.setattr(attention, "_SMALLEST_CHUNK", 2)
    monkeypatch.setattr(attention, "_MOST_CHUNKS", 2)


def packed():
    token_BT = np.array(tokens())
    token_BT[token_BT == END] += 1
    for row, *ends in ENDS:
        token_BT[row, ends] = END
    return jnp.asarray(token_BT)


def step_of(lm):
    """(params, inputs, targets) -> (loss, (gradient, exactness))."""

    def step(params, token_BT, target_BT):
        def loss(params, probes):
            return lm.loss(Variables(params, {}), token_BT, target_BT, sweep=Sweep(probes))[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, lm.probes())

    return step


def check_same(got, expected):
    """Compares the results of two steps. The first was reversed, and rebuilt every bit."""
    (loss, (gradient, exactness)), (expected_loss, (expected_gradient, _)) = got, expected
    assert exactness["layers"].mismatches == 0
    assert loss == pytest.approx(float(expected_loss), rel=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("window", [thorough(0), 3])
def test_documents_in_one_sequence_are_documents_apart(window):
    """Each as long as it is, wherever it lies; without `end_token` the second reads the first."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        options = {"compute_dtype": jnp.float64, "grid": None}
        lm = model("store", options=options, window=window, end_token=END)
        mixing = model("store", options=options, window=window)
        variables = jit(lm.init)(jax.random.key(0))
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        token_BT = packed()[:1]
        cut = 5  # after the first end
        first, second = token_BT[:, :cut], token_BT[:, cut:]
        apart = [
            (document.shape[1] - 1) * jit(lm.loss)(variables, document[:, :-1], document[:, 1:])[0]
            for document in (first, second)
        ]
        weight_BT = jnp.ones((1, T)).at[:, cut - 1].set(0)  # which predicts the next document
        together = lambda lm: jit(lm.loss)(variables, token_BT[:, :-1], token_BT[:, 1:], weight_BT)
        expected = float(sum(apart)) / (T - 1)
        assert float(together(lm)[0]) == pytest.approx(expected, rel=1e-12)
        assert float(together(mixing)[0]) != pytest.approx(expected, rel=1e-4)


@pytest.mark.thorough
def test_reverse_is_store(blocks):
    """And the rewind makes the masks that the forward pass had."""
    params, token_BT = jit(model().init)(jax.random.key(0)).params, packed()
    reverse, store = (
        jit(step_of(model(backprop, **NEAR)))(params, token_BT[:, :-1], token_BT[:, 1:])
        for backprop in ("reverse", "store")
    )
    check_same(reverse, store)


@pytest.mark.parametrize("changes", [thorough({"window": 4}), thorough({"end_token": END}), NEAR])
def test_token_by_token_is_all_at_once(changes):
    """Ends within a prompt, the last of it, and between tokens that are read one by one."""
    lm, token_BT = model(options={"grid": None}, **changes), packed()
    variables = jit(lm.init)(jax.random.key(0))
    expected = jit(lm.logits)(variables, token_BT)
    extend = jit(lm.extend)
    logits_BV, cache = extend(variables, lm.empty_cache(2, T + 1), token_BT[:, :5], 0)
    np.testing.assert_allclose(logits_BV, expected[:, 4], atol=1e-5)
    for t in range(5, T + 1):
        logits_BV, cache = extend(variables, cache, token_BT[:, t : t + 1], t)
        np.testing.assert_allclose(logits_BV, expected[:, t], atol=1e-5)


@pytest.mark.thorough
def test_two_devices_with_half_of_each_sequence(blocks):
    """On a grid so fine that sums in another order do not show."""
    step = step_of(model("reverse", options={"grid": Grid(18)}, **NEAR))
    mesh = make_mesh(jax.devices(), data=1, sequence=2)
    params, token_BT = jit(model().init)(jax.random.key(0)).params, np.asarray(packed())
    batch = token_BT[:, :12], token_BT[:, 1:13]
    put = [put_batch({"tokens": array}, mesh)["tokens"] for array in batch]
    params_there = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    on_two = jit(on_mesh(step, mesh))(params_there, *put)
    check_same(on_two, jit(step)(params, *batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, r"got window=-1, expected 0 \(none\) or a number of tokens"),
        ({"end_token": 17}, "got end_token=17, expected the id of the token that ends documents"),
        ({"end_token": -1}, "got end_token=-1, expected .* 0 to 16"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)
