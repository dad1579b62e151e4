"""The benchmark's models: plain chains and models of configs, each as one jitted training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from revnet_jax.config import settings
from revnet_jax.core import Block, Exactness, chain, reversible_block
from revnet_jax.errors import UserError
from revnet_jax.families import DTYPES
from revnet_jax.planning.variants import parse_variant
from revnet_jax.training.build import build_recipe
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.step import init_state, make_train_step

LEARNING_RATE = 1e-3  # small, so that nothing overflows; no measurement depends on it
MOMENTUM = 0.9


class Program(NamedTuple):
    """A training step, its initialization, and how to read the first gradient.

    Attributes:
      step: `(state, batch) -> (state, metrics)`, jitted, its state donated. Metrics hold the loss
        and, where layers are rebuilt, `exact_mismatches` of all steps so far.
      init: `() -> (state, batch)`.
      gradient: `state -> gradient`, from the state after the first step: momentum starts at zero,
        so that it then holds the gradient.
    """

    step: Any
    init: Callable[[], tuple[Any, Any]]
    gradient: Callable[[Any], Any]


@dataclass(frozen=True)
class Chain:
    """A chain of equal two-stream layers; the loss is the mean square of the output streams.

    Attributes:
      width: of each stream.
      dtype: that branches compute in; streams and parameters are float32.
    """

    width: int
    dtype: str = "float32"
    name: str = "chain"
    unit: ClassVar[str]
    has_twin: ClassVar[bool] = False

    def block(self) -> Block:
        raise NotImplementedError

    def init_layer(self, key: jax.Array) -> Any:
        raise NotImplementedError

    def stream_shape(self, batch: int) -> tuple[int, ...]:
        raise NotImplementedError

    def examples(self, batch: int) -> int:
        """How many of `unit` a batch holds."""
        return batch

    def program(self, strategy: str, layers: int, batch: int) -> Program:
        """The training step: value and gradient, SGD with momentum, and the exactness check."""
        variant = parse_variant(strategy, layers)
        # Where all layers are stored, nothing is rebuilt and there is nothing to check.
        rebuilds = variant.backprop == "reverse" and variant.stored_layers < layers
        settings: dict[str, Any] = {
            "backprop": variant.backprop,
            "stored_layers": variant.stored_layers,
            "unroll": layers if variant.unrolled else 1,
        }
        block = self.block()

        def loss_fn(params_L, momentum_L, probe, x):
            if variant.lockstep:
                settings.update(update=_sgd, state_L=momentum_L)
            y, _ = chain(block, params_L, x, probe=probe, **settings)
            return sum(jnp.mean(jnp.square(stream)) for stream in y)

        def step(state, x):
            params_L, momentum_L, mismatches = state
            value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1, 2))
            # Under lockstep the "gradients" of parameters and momentum are their updated values:
            # the backward sweep applies the update, and can return it only as cotangents. The
            # exactness check leaves the sweep in the same way, as the cotangent of its probe.
            loss, (*new, exactness) = value_and_grad(params_L, momentum_L, Exactness.probe(), x)
            if not variant.lockstep:
                new = _sgd(new[0], momentum_L, params_L)
            mismatches += exactness.mismatches
            metrics = {"exact_mismatches": mismatches} if rebuilds else {}
            return (*new, mismatches), {"loss": loss, **metrics}

        def init():
            params_key, *keys = jax.random.split(jax.random.key(0), 3)
            params_L = jax.vmap(self.init_layer)(jax.random.split(params_key, layers))
            x = tuple(jax.random.normal(key, self.stream_shape(batch)) for key in keys)
            # Mismatches are counted in float32, since they come as a cotangent.
            return (params_L, jax.tree.map(jnp.zeros_like, params_L), jnp.zeros(())), x

        # The state is donated, as in training: the new one takes its memory.
        return Program(exact_jit(step, donate_argnums=0), jax.jit(init), lambda state: state[1])


@dataclass(frozen=True)
class MlpChain(Chain):
    """f and g: normalise, Linear, ReLU (f) or GELU (g), Linear; all layers as wide as a stream."""

    width: int = 512
    name: str = "mlp"
    unit = "rows"

    def block(self) -> Block:
        def branch(activation):
            def run(params, x, context):
                # Normalised in the stream's float32, and only then narrowed.
                hidden = activation(linear(params[0], standardise(x).astype(DTYPES[self.dtype])))
                return linear(params[1], hidden)

            return run

        return reversible_block(branch(jax.nn.relu), branch(jax.nn.gelu))

    def init_layer(self, key: jax.Array) -> Any:
        keys = jax.random.split(key, 4)
        first, second, third, fourth = (init_linear(k, self.width, self.width) for k in keys)
        return (first, second), (third, fourth)

    def stream_shape(self, batch: int) -> tuple[int, ...]:
        return batch, self.width


@dataclass(frozen=True)
class TransformerChain(Chain):
    """f: causal attention with several heads; g: Linear to four times the width, GELU, Linear.

    Both normalise their input. tokens: in each sequence. head_size: of each of the
    width / head_size heads.
    """

    width: int = 256
    tokens: int = 512
    head_size: int = 64
    name: str = "transformer"
    unit = "tokens"

    def block(self) -> Block:
        def attention(params, x_BTD, context):
            qkv = linear(params[0], standardise(x_BTD).astype(DTYPES[self.dtype]))  # [B, T, 3D]
            heads = self.width // self.head_size
            # [B, T, N, K] each. Split, since the derivative of indexing pads each part with zeros.
            q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], 3 * heads, self.head_size), 3, axis=2)
            mixed_BTNK = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            return linear(params[1], mixed_BTNK.reshape(x_BTD.shape))

        def feed_forward(params, x_BTD, context):
            x_BTD = standardise(x_BTD).astype(DTYPES[self.dtype])
            return linear(params[1], jax.nn.gelu(linear(params[0], x_BTD)))

        return reversible_block(attention, feed_forward)

    def init_layer(self, key: jax.Array) -> Any:
        keys, D = jax.random.split(key, 4), self.width
        attention = init_linear(keys[0], D, 3 * D), init_linear(keys[1], D, D)
        feed_forward = init_linear(keys[2], D, 4 * D), init_linear(keys[3], 4 * D, D)
        return attention, feed_forward

    def stream_shape(self, batch: int) -> tuple[int, ...]:
        return batch, self.tokens, self.width

    def examples(self, batch: int) -> int:
        return batch * self.tokens


@dataclass(frozen=True)
class ConfigModel:
    """The model of a config, as `scripts/train.py` trains it, by SGD with momentum or by AdamW.

    Attributes:
      config: its batch size and depth are replaced.
      unit: what `examples` counts.
    """

    config: ConfigDict
    name: str = "revnet"
    unit: str = "images"

    @property
    def dtype(self) -> str:
        """The dtype that branches compute in."""
        return self.config.model.compute_dtype

    @property
    def has_twin(self) -> bool:
        """Whether the model can have one stream in place of two."""
        return "reversible" in self.config.model

    def examples(self, batch: int) -> int:
        return batch * (self.config.data.context if self.unit == "tokens" else 1)

    def program(self, strategy: str, layers: int, batch: int) -> Program:
        """The package's training step on random data.

        Args:
          strategy: "twin" too, the irreversible model of a transformer, which stores all layers.
          layers: in all stages together, the same number in each.
        """
        config = self.config.copy_and_resolve_references()
        if "units" in config.model:
            stages = len(config.model.units)
            if layers % stages:
                raise UserError(f"got {layers} layers, expected a multiple of the {stages} stages")
            config.model.units = (layers // stages,) * stages
        else:
            config.model.layers = layers
        variant = parse_variant(strategy, layers)
        config.update_from_flattened_dict(variant.settings())
        config.model.unroll = layers if variant.unrolled else 1
        if variant.is_twin:
            config.model.reversible = False
            # Integrators make a network of one stream reversible, which the twin is not.
            if "integrator" in config.model:
                config.model.integrator = "streams"
        task, schedule, optimizer = build_recipe(config)
        train_step = make_train_step(task, optimizer, schedule, ema_decay=config.ema_decay)

        def step(state, batch):
            state, metrics = train_step(state, batch)
            kept = {"loss": metrics["train_loss"]}
            if "exact_mismatches" in metrics:
                kept["exact_mismatches"] = metrics["exact_mismatches"]
            return state, kept

        def init():
            shapes = task.batch_shapes(batch)
            keys = jax.random.split(jax.random.key(1), len(shapes))
            data = {
                name: self._random(key, shape)
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }
            ema = config.ema_decay > 0
            return init_state(task.network, optimizer, config.seed, ema=ema), data

        def gradient(state):
            # After one step the first moments equal the gradient, Adam's up to a factor.
            groups = optimizer.moments(state.opt_state).items()
            return {name: jax.tree.leaves(trees) for name, trees in groups}

        with settings("optimizer"):  # told before anything compiles
            gradient(jax.eval_shape(init)[0])
        jitted = exact_jit(step, deterministic=config.deterministic, donate_argnums=0)
        return Program(jitted, jax.jit(init), gradient)

    def _random(self, key, shape):
        # Whole numbers are tokens or labels, and have to stay in their range.
        if shape.dtype != jnp.int32:
            return jax.random.normal(key, shape.shape, shape.dtype)
        data = self.config.data
        values = data.vocab_size if self.unit == "tokens" else data.num_classes
        return jax.random.randint(key, shape.shape, 0, values)


BenchmarkModel = Chain | ConfigModel


def linear(params: Any, x: jax.Array) -> jax.Array:
    """x @ kernel + bias, in the dtype of x."""
    kernel, bias = (leaf.astype(x.dtype) for leaf in params)
    # Tests forbid to broadcast arrays of different ranks, hence the axes in front.
    return x @ kernel + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))


def init_linear(key: jax.Array, inputs: int, outputs: int) -> tuple[jax.Array, jax.Array]:
    """(kernel, bias), float32."""
    # Variance 1 / inputs, so that the product of a normalised input has variance 1.
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5, jnp.zeros(outputs)


def standardise(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 along the last axis."""
    return jax.nn.standardize(x, epsilon=1e-5)


def _sgd(gradient, momentum, params):
    """(params, momentum) after a step, for one layer or for the whole stack."""
    momentum = jax.tree.map(lambda m, d: MOMENTUM * m + d, momentum, gradient)
    return jax.tree.map(lambda p, m: p - LEARNING_RATE * m, params, momentum), momentum
