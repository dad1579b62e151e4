"""A reversible vision transformer, and an irreversible one with the same parameters.

Dosovitskiy et al. 2020 (arXiv:2010.11929); reversible: Mangalam et al. 2022 (arXiv:2302.04869).
Branch f is attention, branch g an MLP of two layers. What the head reads of the streams (see
`Transformer`) is normalised first.

Dims: B batch, H height, W width, C channels, T patches and class token, D stream width, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from revnet_jax.models.bridge import PureModule
from revnet_jax.models.dtypes import at_least_float32, narrowed
from revnet_jax.models.model import ModelOptions, Sweep, Variables
from revnet_jax.models.partition import Rules, gather, on_batch
from revnet_jax.models.transformer.attention import AttentionKernel, attend
from revnet_jax.models.transformer.base import (
    Transformer,
    check_positive,
    draw_factors,
    drop,
    init_layers_of,
)

INTEGRATORS = ("streams", "bdia", "midpoint")  # those of a vision transformer

# Sharding of the weights: heads and hidden units over "tensor", the other axis over "fsdp".
RULES = (
    # First, because "out" of the layers matches it too.
    (r"head/out/kernel$", ("fsdp", None)),
    (r"embed/kernel$", (None, "fsdp")),
    (r"(qkv|up)/kernel$", ("fsdp", "tensor")),
    (r"(qkv|up)/bias$", ("tensor",)),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
)


@dataclass(frozen=True)
class VisionTransformerShape:
    """The shape of a vision transformer.

    Attributes:
      image_shape: (height, width, channels).
      patch: side of a patch in pixels; divides height and width.
      hidden: width inside the MLP.
      pool: what the head reads: "token" for a class token, "mean" for the mean over patches.
      reversible: two streams; otherwise the irreversible model with one stream.
      dropout: rate, applied to the outputs of branches and to the embedding.
      gelu: "tanh" for the approximation by tanh, "erf" for the exact function.
      integrator: what the two streams stand for, one of `INTEGRATORS`: see `Transformer`.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    patch: int
    layers: int
    width: int
    heads: int
    hidden: int
    pool: Literal["token", "mean"] = "token"
    reversible: bool = True
    dropout: float = 0.0
    gelu: Literal["tanh", "erf"] = "tanh"
    integrator: str = "streams"

    def __post_init__(self):
        check_positive(self, ("num_classes", "patch", "layers", "width", "heads", "hidden"))
        if any(size % self.patch for size in self.image_shape[:2]):
            raise ValueError(
                f"got patch={self.patch} for images of {self.image_shape[:2]}, expected a divisor"
            )
        if self.width % self.heads:
            raise ValueError(
                f"got heads={self.heads}, expected a divisor of the width {self.width}"
            )
        if self.pool not in ("token", "mean"):
            raise ValueError(f"got pool={self.pool!r}, expected one of token, mean")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"got gelu={self.gelu!r}, expected one of tanh, erf")
        if self.integrator not in INTEGRATORS:
            raise ValueError(
                f"got integrator={self.integrator!r}, expected one of {', '.join(INTEGRATORS)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"got dropout={self.dropout}, expected a share in [0, 1)")


class VisionTransformer(Transformer):
    """An image classifier as pure functions: `init(key)` and `apply(variables, image, ...)`.

    Args:
      options: how it computes.
      attention: the kernel, see `attend`.
    """

    rules: Rules = RULES

    def __init__(
        self,
        shape: VisionTransformerShape,
        options: ModelOptions = ModelOptions(),
        *,
        attention: AttentionKernel = "chunked",
    ):
        super().__init__(
            layers=shape.layers,
            reversible=shape.reversible,
            options=options,
            integrator=shape.integrator,
        )
        self.shape = a = shape
        common = {"width": a.width, "dtype": self.compute_dtype}
        pure = lambda make, **settings: PureModule(lambda rngs: make(**settings, rngs=rngs))
        self._f = pure(SelfAttention, heads=a.heads, kernel=attention, **common)
        self._g = pure(Mlp, hidden=a.hidden, gelu=a.gelu, **common)
        self._stem = pure(Patches, shape=a, dtype=self.compute_dtype)
        self._head = pure(ViTHead, num_classes=a.num_classes, **common)

    def init(self, key: jax.Array) -> Variables:
        """Initialises the variables; those of layers have a leading axis of one per layer."""
        stem_key, head_key, layers_key = jax.random.split(key, 3)
        params = {
            "stem": self._stem.init(stem_key)[0],
            "layers": init_layers_of((self._f, self._g), layers_key, self.shape.layers),
            "head": self._head.init(head_key)[0],
        }
        return Variables(narrowed(params, self.param_dtype), {})

    def apply(
        self,
        variables: Variables,
        image_BHWC: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, Any]:
        """(logits [B, num_classes] float32, an empty dictionary: there are no running averages).

        Args:
          train: whether to apply dropout, and to draw the factors of "bdia".
          key: for what is random in training; None for none of it.
          sweep: see `ConvNet.apply`.
        """
        rate = self.shape.dropout
        is_bdia = self.integrator == "bdia"
        keys = factors_L = None
        # A pair of keys for each layer; the last pair is for the embedding and for the factors.
        if train and (rate or is_bdia) and key is not None:
            keys = jax.random.split(key, (self.shape.layers + 1, 2))

        def branch(module, i):
            def apply(params, x_BTD, context):
                params = gather(RULES, f"layers/{i}", params, self.compute_dtype)
                u_BTD, _ = module.apply(params, {}, on_batch(x_BTD))
                return on_batch(drop(u_BTD, rate, context.data[0], i)), ()

            return apply

        with jax.named_scope("stem"):
            stem = gather(RULES, "stem", variables.params["stem"], self.compute_dtype)
            x_BTD, _ = self._stem.apply(stem, {}, image_BHWC)
        if keys is not None and is_bdia:
            factors_L = draw_factors(keys[-1, 1], self.shape.layers, x_BTD)
        training = factors_L is not None
        x_BTD, _ = self._run(
            self._layer(branch(self._f, 0), branch(self._g, 1), training=training),
            variables.params["layers"],
            drop(x_BTD, rate, None if keys is None else keys[-1], 0),
            data_L=(None if keys is None else keys[:-1], factors_L),
            sweep=sweep,
        )
        by_token = self.shape.pool == "token"
        with jax.named_scope("head"):
            head = gather(RULES, "head", variables.params["head"], self.compute_dtype)
            x_BD = x_BTD[:, 0] if by_token else jnp.mean(x_BTD, axis=1)
            return self._head.apply(head, {}, x_BD)[0], {}


def _linear(inputs, outputs, *, dtype, rngs, kernel_init=None):
    kernel_init = kernel_init or nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


def _norm(width, dtype, rngs):
    wide = at_least_float32(dtype)
    # flax's own default, which the published network has.
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=wide, rngs=rngs)


class Patches(nnx.Module):
    """The embedding: a linear map of each patch, a class token in front, learned positions added.

    There is a class token only if `pool` is "token".
    """

    def __init__(self, *, shape: VisionTransformerShape, dtype, rngs: nnx.Rngs):
        height, width, channels = shape.image_shape
        self.patch = patch = shape.patch
        self.embed = _linear(patch * patch * channels, shape.width, dtype=dtype, rngs=rngs)
        # As published: a token of zeros, and positions of standard deviation 0.02.
        tokens = height // patch * (width // patch)
        self.has_token = shape.pool == "token"
        if self.has_token:
            tokens += 1
            self.token = nnx.Param(jnp.zeros((1, 1, shape.width)))
        positions = jax.random.normal(rngs.params(), (1, tokens, shape.width))
        self.position = nnx.Param(0.02 * positions)

    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        """Embeds images: [B, T, D], in the dtype of the positions."""
        B, H, W, C = image_BHWC.shape
        p = self.patch
        # [B, H/p, p, W/p, p, C] -> [B, H/p, W/p, p, p, C]: the pixels of a patch side by side.
        x = image_BHWC.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        # `param_dtype` does not narrow the positions (see `is_narrowed`), so that streams stay in
        # float32.
        x_BTD = self.embed(x.reshape(B, -1, p * p * C)).astype(self.position[...].dtype)
        if self.has_token:
            token = jnp.broadcast_to(self.token[...], (B, 1, x_BTD.shape[-1]))
            x_BTD = jnp.concatenate([token, x_BTD], axis=1)
        return x_BTD + self.position[...]


class SelfAttention(nnx.Module):
    """Layer normalisation, then self-attention of every token to all tokens."""

    def __init__(self, *, width: int, heads: int, kernel: AttentionKernel, dtype, rngs: nnx.Rngs):
        self.heads, self.kernel = heads, kernel
        self.norm = _norm(width, dtype, rngs)
        self.qkv = _linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = _linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        # The q, k and v of a head lie next to each other, so that sharding over "tensor" gives
        # every device whole heads.
        qkv = self.qkv(self.norm(x_BTD)).reshape(B, T, self.heads, 3, D // self.heads)
        mixed = attend(*jnp.unstack(qkv, axis=3), causal=False, kernel=self.kernel)
        return self.out(mixed.reshape(B, T, D))


class Mlp(nnx.Module):
    """Layer normalisation, then two linear layers with a GELU between them."""

    def __init__(self, *, width: int, hidden: int, gelu: str, dtype, rngs: nnx.Rngs):
        self.approximate = gelu == "tanh"
        self.norm = _norm(width, dtype, rngs)
        self.up = _linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = _linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up = jax.nn.gelu(self.up(self.norm(x_BTD)), approximate=self.approximate)
        return self.down(up)


class ViTHead(nnx.Module):
    """Layer normalisation, then a linear layer whose kernel is initialised with zeros."""

    def __init__(self, *, width: int, num_classes: int, dtype, rngs: nnx.Rngs):
        self.norm = _norm(width, dtype, rngs)
        zeros = nnx.initializers.zeros
        self.out = _linear(width, num_classes, dtype=dtype, rngs=rngs, kernel_init=zeros)

    def __call__(self, x_BD: jax.Array) -> jax.Array:
        return self.out(self.norm(x_BD)).astype(x_BD.dtype)
