"""A gated linear recurrence in three reversible streams, with data and an optimizer of its own.

python scripts/train.py --config=gated_recurrence.py --workdir=WORKDIR
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from revnet_jax.config import experiment
from revnet_jax.core import multi_stream_block
from revnet_jax.data.source import Arrays
from revnet_jax.models import ChainModel, Variables
from revnet_jax.models.partition import on_batch
from revnet_jax.models.task import Task


def get_config(arm=""):
    config = experiment()  # the knobs that every run has; those below are this file's own
    config.model.family = "gated_recurrence:build"
    config.model.layers = 4
    config.model.widths = (16, 8, 8)
    config.data.name = "gated_recurrence:load"
    config.data.examples, config.data.tokens = 2_000, 32
    config.optimizer.name = "gated_recurrence:signs"
    config.optimizer.decay = 0.9
    config.schedule.learning_rate = 3e-3
    return config


def load(examples, tokens):
    """Signals in [-1, 1] and rare flags: the target is the signal at the last flag, held."""
    rng = np.random.default_rng(0)
    signal_BT = rng.uniform(-1, 1, (examples, tokens)).astype(np.float32)
    flag_BT = rng.random((examples, tokens)) < 0.2
    flag_BT[:, 0] = True
    last_BT = np.maximum.accumulate(np.where(flag_BT, np.arange(tokens), 0), axis=1)
    input_BTC = np.stack([signal_BT, flag_BT], axis=-1, dtype=np.float32)
    target_BT = np.take_along_axis(signal_BT, last_BT, axis=1)
    split = lambda part: {"input": input_BTC[part], "target": target_BT[part]}
    return Arrays(split(slice(200, None)), split(slice(200)))


def signs(learning_rate, decay):
    """Steps of one size, in the direction of the momentum's sign."""
    sign = optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates))
    return optax.chain(optax.trace(decay), sign, optax.scale_by_learning_rate(learning_rate))


class Recurrence(ChainModel):
    def __init__(self, layers, widths, options):
        super().__init__(layers=layers, options=options)
        self.widths = widths

    def init(self, key):
        first, last, *keys = jax.random.split(key, 2 + len(self.widths))
        total, L = sum(self.widths), self.layers
        normal = lambda key, *shape: jax.random.normal(key, shape) / shape[-2] ** 0.5
        widths = zip(keys, self.widths, strict=True)
        layers = tuple(normal(key, L, total - width, 2 * width) for key, width in widths)
        params = {"stem": normal(first, 2, total), "layers": layers, "head": normal(last, total, 1)}
        return Variables(params, {})

    def branch(self, kernel, *others_and_context):
        """h[t] = a[t] h[t-1] + (1 - a[t]) v[t] of the other streams, by an associative scan."""
        x_BTD = jnp.concatenate(on_batch(others_and_context[:-1]), axis=-1)
        x_BTD = jax.nn.standardize(x_BTD, epsilon=1e-5).astype(self.compute_dtype)
        gate_BTD, value_BTD = jnp.split(x_BTD @ kernel.astype(x_BTD.dtype), 2, axis=-1)
        a_BTD = jax.nn.sigmoid(gate_BTD)
        after = lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1])
        _, h_BTD = jax.lax.associative_scan(after, (a_BTD, (1 - a_BTD) * value_BTD), axis=1)
        return on_batch(h_BTD)

    def apply(self, params, x_BTC, **options):
        streams = jnp.split(x_BTC @ params["stem"], np.cumsum(self.widths)[:-1], axis=-1)
        block = multi_stream_block([self.branch] * len(self.widths), grid=self.grid)
        y, _ = self.run_chain(block, params["layers"], tuple(streams), **options)
        return (jnp.concatenate(y, axis=-1) @ params["head"])[..., 0]


@dataclass(frozen=True)
class Hold(Task):
    network: Recurrence
    tokens: int

    def loss(self, variables, batch, key, *, sweep):
        y_BT = self.network.apply(variables.params, batch["input"], sweep=sweep)
        return jnp.mean(jnp.square(y_BT - batch["target"])), (variables.stats, {})

    def sums(self, variables, batch):
        y_BT = self.network.apply(variables.params, batch["input"])
        error_B = jnp.mean(jnp.square(y_BT - batch["target"]), axis=1)
        return {"loss": jnp.sum(batch["weight"] * error_B), "count": jnp.sum(batch["weight"])}

    def batch_shapes(self, batch_size):
        array = lambda *shape: jax.ShapeDtypeStruct((batch_size, self.tokens, *shape), jnp.float32)
        return {"input": array(2), "target": array()}


def build(data, layers, widths, options):
    return Hold(Recurrence(layers, widths, options), data.tokens)
