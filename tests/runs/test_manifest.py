"""What is stored of a state: every kind of leaf, its checksum, and a manifest that tells."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from revnet_jax.runs import manifest
from revnet_jax.runs.checkpoint import CheckpointError, Checkpoints
from tests.runs.test_checkpoint import OPTIONS, assert_same_bits, small_state


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any
    raw_key: Any
    nothing: Any


def make_state(seed: int = 0) -> State:
    params = {
        "w": jax.random.normal(jax.random.key(seed), (64, 48)),
        "b": jax.random.normal(jax.random.key(seed + 1), (5,), jnp.bfloat16),
        "a/b": [jnp.arange(3), (jnp.array([True, False]),)],
        "empty": jnp.zeros((0, 3)),
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf]),
    }
    return State(
        step=np.int32(seed),
        params=params,
        opt_state=optax.adamw(1e-3).init({name: params[name] for name in "wb"}),
        key=jax.random.split(jax.random.key(seed), 3),
        raw_key=jax.random.PRNGKey(seed),
        nothing=None,
    )


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        assert checkpoints.restore(jax.eval_shape(make_state)) is None
        assert checkpoints.latest_step() is None
        assert checkpoints.save(7, make_state())
        assert not checkpoints.save(7, make_state())  # exists
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        assert checkpoints.latest_step() == 7
        step, state = checkpoints.restore(jax.eval_shape(make_state))
        assert step == 7
        assert_same_bits(state, make_state())
        # A state of arrays does for an abstract one, and what was uncommitted remains so.
        _, state = checkpoints.restore(make_state(3))
        assert_same_bits(state, make_state())
        assert not any(leaf.committed for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_state_restores_onto_other_shardings(tmp_path, axis_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    plain = {"w": jnp.arange(64.0).reshape(8, 8), "keys": jax.random.split(jax.random.key(0), 4)}
    sharded = {"w": jax.device_put(plain["w"], rows), "keys": jax.device_put(plain["keys"], rows)}
    second = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    with Checkpoints(tmp_path / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, sharded)
        for sharding in (None, second, whole, NamedSharding(mesh, P(None, "data")), rows):
            abstract = jax.eval_shape(lambda: plain)
            w = abstract["w"].update(sharding=sharding)
            keys_sharding = rows if isinstance(sharding, NamedSharding) else sharding
            keys = abstract["keys"].update(sharding=keys_sharding)
            _, state = checkpoints.restore({"w": w, "keys": keys})
            assert_same_bits(state, plain)
            if sharding is not None:
                assert state["w"].sharding == sharding
                assert state["keys"].sharding == keys_sharding


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"name": "resnet"}, "got a str at name"),
        ({"a/b": jnp.zeros(2), "a": {"b": jnp.zeros(2)}}, "two leaves of the path a/b"),
    ],
)
def test_a_state_that_cannot_be_stored_is_an_error(tmp_path, state, message):
    checkpoints = Checkpoints(tmp_path / "checkpoints", **OPTIONS)
    with checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.save(1, state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    with Checkpoints(root / "checkpoints", **OPTIONS) as checkpoints:
        checkpoints.save(1, small_state(1), {"accuracy": 0.5})
        checkpoints.save(2, small_state(2), {"accuracy": 0.7, "loss": float("nan")})
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": jnp.zeros((64, 47))}, r"w: got float32\[64, 48\], expected float32\[64, 47\]"),
        ({"b": jnp.zeros(6)}, r"b: got bfloat16\[6\], expected float32\[6\]"),
        ({"more": jnp.zeros(6)}, r"more: got nothing, expected float32\[6\]"),
        (
            {"key": jax.random.key(0, impl="rbg")},
            r"other random number generators: key: got key<fry>\[\], expected key<rbg>\[\]\. Set "
            "JAX_DEFAULT_PRNG_IMPL to threefry2x32, as it was then",
        ),
    ],
)
def test_another_architecture_is_an_error_and_no_damage(saved, change, message):
    before = sorted(saved.rglob("*"))
    checkpoints = Checkpoints(saved / "checkpoints", **OPTIONS)
    with checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(small_state() | change)
    assert sorted(saved.rglob("*")) == before


def test_differences_are_told_by_their_fields(saved):
    state = small_state()
    wanted = {"w": jnp.zeros((64, 47)), "more": jnp.zeros(6), "key": state["key"]}
    checkpoints = Checkpoints(saved / "checkpoints", **OPTIONS)
    with checkpoints, pytest.raises(manifest.OtherTree) as caught:
        checkpoints.restore(wanted)
    assert set(caught.value.differences) == {
        ("w", ("float32", (64, 48)), ("float32", (64, 47))),
        ("more", None, ("float32", (6,))),
        ("b", ("bfloat16", (6,)), None),
    }


@pytest.mark.parametrize("changed", [None, [], {}, {"leaves": {}, "crc32": 0}])
def test_what_is_no_sealed_manifest_is_damage(changed):
    with pytest.raises(manifest.Damaged, match="its own checksum"):
        manifest.check_seal(changed)


def test_any_single_flipped_bit_changes_the_checksum():
    checksum = jax.jit(jax.vmap(manifest.checksum))
    others = (jnp.bfloat16, jnp.float8_e4m3fn)
    for dtype in (np.float32, np.int8, np.uint16, np.int32, np.complex64, *others):
        raw = np.random.default_rng(0).integers(0, 256, 48, np.uint8)
        flips = np.stack([raw] * (1 + 8 * len(raw)))
        for bit in range(8 * len(raw)):
            flips[bit + 1, bit // 8] ^= 1 << bit % 8
        sums = np.asarray(checksum(flips.view(dtype).reshape(len(flips), 2, -1)))
        assert (sums[1:] != sums[0]).all(), dtype
    with jax.enable_x64(True):
        x = np.arange(4.0)
        signs = [np.array([1.0] * i + [-1.0] * (4 - i)) for i in range(5)]
        sums = {int(manifest.checksum(jnp.asarray(sign * x))) for sign in signs}
        assert len(sums) == 5  # one sign more each: pairs of top bits must not cancel


def test_dtype_and_shape_belong_to_the_checksum():
    x = jnp.arange(6, dtype=jnp.int32)
    same_words = {"x": x, "type": x.astype(jnp.uint32), "shape": x.reshape(2, 3)}
    assert len(set(manifest.checksums(same_words).values())) == 3


def test_the_manifest_is_readable_json(saved):
    written = json.loads((saved / "checkpoints" / "2" / "manifest" / "metadata").read_text())
    assert written["metrics"] == {"accuracy": 0.7}
    assert written["leaves"]["w"]["shape"] == [64, 48]
    assert written["leaves"]["key"]["key_impl"] == "threefry2x32"
