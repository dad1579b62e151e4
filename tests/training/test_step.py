"""One training step."""

import jax
import numpy as np
import pytest

from revnet_jax.config import ConfigError, language_model, vision_transformer
from revnet_jax.models.task import cross_entropy
from revnet_jax.training.build import build_recipe
from revnet_jax.training.program import step_program


@pytest.mark.thorough
def test_mixup(tiny_config):
    """The loss of the mixed images, by both labels."""
    tiny_config.mixup = 0.4
    task, _, _ = build_recipe(tiny_config)
    variables = jax.jit(task.network.init)(jax.random.key(0))
    image, label = np.random.default_rng(0).normal(size=(4, 8, 8, 1)), np.asarray([1, 2, 3, 4])
    image = image.astype(np.float32)
    key = jax.random.key(5)
    loss, _ = jax.jit(lambda v: task.loss(v, {"image": image, "label": label}, key))(variables)
    share = float(jax.random.beta(jax.random.split(key)[0], 0.4, 0.4))
    mixed = np.float32(share) * image + np.float32(1 - share) * image[::-1]
    logits, _ = jax.jit(lambda v: task.network.apply(v, mixed, train=True))(variables)
    expected = share * cross_entropy(logits, label) + (1 - share) * cross_entropy(
        logits, label[::-1]
    )
    assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-5)
    tiny_config.mixup = -0.1
    with pytest.raises(ConfigError, match=r"config.mixup: got -0.1, expected a finite number, 0"):
        build_recipe(tiny_config)


@pytest.mark.thorough
def test_unrolled_layers_are_in_no_loop(tiny_config):
    """In all families, and nothing changes in layers that recompute."""
    sizes = {"batch_size": 2, "model.layers": 3, "model.width": 16, "model.heads": 2}
    decoder, vit = language_model(), vision_transformer()
    decoder.update_from_flattened_dict({**sizes, "model.kv_heads": 1, "data.context": 8})
    vit.update_from_flattened_dict({**sizes, "model.hidden": 16, "model.patch": 4})
    tiny_config.model.units = (4, 1)

    def loops(config, backprop, unroll):
        config.model.update({"backprop": backprop, "unroll": unroll})
        program = step_program(config, jax.devices()[:1])
        text = program.step.lower(program.state, program.batch).as_text()
        return text.count("stablehlo.while")

    for config in (tiny_config, vit, decoder):
        for backprop in ("store", "reverse"):
            assert loops(config, backprop, 4) == loops(config, backprop, 1) - 2
        assert loops(config, "remat", 4) == loops(config, "remat", 1)
    tiny_config.model.unroll = 0
    with pytest.raises(ConfigError, match=r"config.model.unroll: got 0, expected a whole .*, 1 to"):
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
