"""One training step."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from revnet_jax.config import ConfigError, language_model
from revnet_jax.training.build import build_data, build_recipe
from revnet_jax.training.sharding import make_mesh, put_batch
from revnet_jax.training.step import init_state, make_train_step
from revnet_jax.training.task import cross_entropy


def test_one_device_and_two_make_the_same_update(tiny_config):
    task, schedule, optimizer = build_recipe(tiny_config)
    batches = build_data(tiny_config, make_mesh(jax.devices()[:1])).train(0)
    batch = next(batches)
    batches.close()
    state = init_state(task.network, optimizer, seed=0)
    updates = []
    for count in (1, 2):
        mesh = make_mesh(jax.devices()[:count])
        step = jax.jit(make_train_step(task, optimizer, schedule))
        new_state, metrics = step(
            jax.device_put(state, NamedSharding(mesh, PartitionSpec())), put_batch(batch, mesh)
        )
        assert metrics["exact_mismatches"] == 0
        change = jax.tree.map(
            lambda after, before: np.ravel(np.asarray(after) - np.asarray(before)),
            new_state.variables.params,
            state.variables.params,
        )
        updates.append(np.concatenate(jax.tree.leaves(change)))
    one, two = updates
    # Sums in another order, which ReLUs and the grid turn into a few other decisions.
    assert np.linalg.norm(one - two) < 1e-4 * np.linalg.norm(one)


def test_mixup(tiny_config):
    """The loss of the mixed images, by both labels."""
    tiny_config.mixup = 0.4
    task, _, _ = build_recipe(tiny_config)
    variables = jax.jit(task.network.init)(jax.random.key(0))
    image, label = np.random.default_rng(0).normal(size=(4, 8, 8, 1)), np.asarray([1, 2, 3, 4])
    image = image.astype(np.float32)
    key = jax.random.key(5)
    loss, _ = jax.jit(
        lambda v: task.loss(v, {"image": image, "label": label}, key, probes=None, lockstep=None)
    )(variables)
    share = float(jax.random.beta(jax.random.split(key)[0], 0.4, 0.4))
    mixed = np.float32(share) * image + np.float32(1 - share) * image[::-1]
    logits, _ = jax.jit(lambda v: task.network.apply(v, mixed, train=True))(variables)
    expected = share * cross_entropy(logits, label) + (1 - share) * cross_entropy(
        logits, label[::-1]
    )
    assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-5)
    tiny_config.mixup = -0.1
    with pytest.raises(ConfigError, match=r"config.mixup: got -0.1, expected 0 or more"):
        build_recipe(tiny_config)


def test_settings_of_other_families(tiny_config):
    tiny_config.model.family = "decoder"
    with pytest.raises(ConfigError, match=r"got 'decoder', expected one of revnet, resnet, irev"):
        build_recipe(tiny_config)
    config = language_model()
    config.model.attention = "flash"
    with pytest.raises(ConfigError, match=r"got 'flash' on cpu, expected auto, or one of chunked"):
        build_recipe(config)


def test_label_smoothing():
    logits = jax.random.normal(jax.random.key(0), (3, 4))
    label = np.asarray([0, 3, 2])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    target = np.full((3, 4), 0.2 / 4) + 0.8 * np.eye(4)[label]
    np.testing.assert_allclose(
        cross_entropy(logits, label, 0.2), -np.sum(target * log_p, axis=-1), rtol=1e-6
    )
    np.testing.assert_allclose(cross_entropy(logits, label), -log_p[np.arange(3), label], rtol=1e-6)
