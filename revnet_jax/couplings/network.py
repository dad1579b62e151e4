"""One small image network for every coupling of the core, with equal numbers of parameters.

Stem convolution -> streams -> one chain of layers at one resolution -> normalisation, ReLU, average
pool, dense. Stem, head and the number of branches are the same in all rows. The hidden width of the
branches is chosen so that the number of parameters is the same too. Normalisation is per example,
without running averages, so that training and evaluation are one function (except bdia's gamma).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import Backprop, Block, Context, Exactness, PlainLayer, chain
from revnet_jax.couplings.rows import ROWS, CouplingRow, group_normalise
from revnet_jax.models.convolutional.conv import conv

KERNEL = (3, 3)


@dataclass(frozen=True)
class CouplingNetwork:
    """A row of the comparison as pure functions.

    Attributes:
      name: one of `ROWS`.
      channels: of the stem; a multiple of 6, so that they divide into two or three streams.
      hidden: width of a branch that reads and writes half of the channels; see `hidden_width`.
      num_branches: in the whole chain; a multiple of 6.
    """

    name: str
    channels: int
    hidden: int
    num_branches: int
    image_shape: tuple[int, int, int]
    num_classes: int
    stem_stride: int = 1

    def __post_init__(self):
        if self.channels % 6 or self.num_branches % 6 or min(self.channels, self.num_branches) < 6:
            raise ValueError(
                f"got channels={self.channels} and num_branches={self.num_branches}, expected "
                "multiples of 6: they are split into two or three streams"
            )

    @property
    def row(self) -> CouplingRow:
        return ROWS[self.name]

    @property
    def num_layers(self) -> int:
        return self.num_branches // self.row.branches

    @property
    def train_backprop(self) -> Backprop:
        """`reverse`, except for the baseline, which has no inverse."""
        return "store" if isinstance(self.row.layer, PlainLayer) else "reverse"

    @property
    def hidden_width(self) -> int:
        """The hidden width that gives a branch the same 9 * hidden * (reads + writes) weights."""
        # A branch that reads and writes a half has reads + writes = channels, so its width is
        # `hidden`.
        return round(self.hidden * self.channels / (self._reads + self._writes))

    @property
    def _reads(self) -> int:
        # Multiplied first: channels are a multiple of 6, so a half or a third of them is whole.
        return self.channels * self.row.reads[0] // self.row.reads[1]

    @property
    def _writes(self) -> int:
        return self.channels * self.row.writes[0] // self.row.writes[1]

    def init(self, key: jax.Array) -> Any:
        """Parameters `{"stem", "chain", "head"}`; those of the chain have a leading axis of layers.

        Equal keys give stem and head equal parameters in every row.
        """
        stem_key, head_key, chain_key = jax.random.split(key, 3)
        # [branches, layers]: each branch of the layer has one tree, stacked over layers.
        keys = jax.random.split(chain_key, (self.row.branches, self.num_layers))
        chain_L = tuple(jax.vmap(self._init_branch)(branch_keys) for branch_keys in keys)
        # `pool` returns the four quadrants of every channel.
        shape = 4 * self.channels, self.num_classes
        dense = jax.random.normal(head_key, shape, jnp.float32) / math.sqrt(4 * self.channels)
        return {
            "stem": _init_conv(stem_key, self.image_shape[-1], self.channels),
            # The velocity half-step of a momentum block has no parameters of its own.
            "chain": (*chain_L, ()) if self.row.at_rest else chain_L,
            "head": {
                "norm": _init_norm(self.channels),
                "kernel": dense,
                # [1, classes], because adding arrays of different rank may be an error (JAX's
                # setting `jax_numpy_rank_promotion`).
                "bias": jnp.zeros((1, self.num_classes), jnp.float32),
            },
        }

    def _init_branch(self, key):
        first, second = jax.random.split(key)
        reads, hidden, writes = self._reads, self.hidden_width, self._writes
        params = {"norm1": _init_norm(reads), "conv1": _init_conv(first, reads, hidden)}
        # The gradient of an energy uses one kernel twice, in place of a second convolution.
        if self.row.energy:
            params["conv1"]["bias"] = jnp.zeros((1, 1, 1, hidden), jnp.float32)
            return params
        params |= {"norm2": _init_norm(hidden), "conv2": _init_conv(second, hidden, writes)}
        if self.name == "affine":  # scales of 1 at first, as in an additive layer
            kernel = params["conv2"]["kernel"]
            params["conv2"]["kernel"] = kernel.at[..., : writes // 2].set(0)
        return params

    def apply(
        self,
        params: Any,
        image_BHWC: jax.Array,
        *,
        backprop: Backprop,
        key: jax.Array | None = None,
        probe: Exactness | None = None,
    ) -> jax.Array:
        """Logits [B, num_classes], float32. One evaluation of the chain.

        Args:
          backprop: evaluation needs "store", because bdia has no inverse for gamma 0.
          key: PRNG key for training; None in evaluation, which is deterministic.
        """
        x_BHWC = conv(image_BHWC, params["stem"]["kernel"], stride=self.stem_stride)
        data_L = self._data(key, len(image_BHWC))
        x = self.streams(x_BHWC)
        layer, chain_L = self.row.layer, params["chain"]
        y, _ = chain(layer, chain_L, x, data_L=data_L, backprop=backprop, probe=probe)
        # [B, H, W, channels] in every row: split streams are put together, and otherwise each
        # stream has all channels.
        joined = jnp.concatenate(y, axis=-1) if self.row.split > 1 else y[self.row.reads_out]
        head = params["head"]
        features_BF = pool(jax.nn.relu(group_normalise(head["norm"], joined)))
        return features_BF @ head["kernel"] + head["bias"]

    def streams(self, x_BHWC: jax.Array) -> tuple[jax.Array, ...]:
        """The input streams of the chain, from the output of the stem."""
        if self.row.split > 1:
            return tuple(jnp.split(x_BHWC, self.row.split, axis=-1))
        if not isinstance(self.row.layer, Block):
            return (x_BHWC,)
        return x_BHWC, (jnp.zeros_like(x_BHWC) if self.row.at_rest else x_BHWC)

    def _data(self, key, batch_size):
        """Per-layer data: bdia's gammas, one per example and half-step."""
        if self.name != "bdia":
            return None
        # [L, half-steps, B, 1, 1, 1]: one gamma for a whole image.
        shape = (self.num_layers, 2, batch_size, 1, 1, 1)
        if key is None:
            # The mean of gamma. The layers are then those of an ordinary residual network.
            return {"gamma": jnp.zeros(shape, jnp.float32)}
        return {"gamma": jax.random.rademacher(key, shape, jnp.float32) / 2}

    def residue_bits(self) -> float | None:
        """Bits per element of the streams that a layer stores under `reverse`, to be invertible.

        None for the baseline, which has no inverse. Evaluated abstractly: nothing is computed.
        """
        if self.train_backprop == "store":
            return None

        def layer(key):
            params = self.init(key)["chain"]
            x_BHWC = jnp.zeros((8, *self.image_shape[:2], self.channels), jnp.float32)
            params, data = jax.tree.map(lambda leaf: leaf[0], (params, self._data(key, 8)))
            y, _, residue, *_ = self.row.layer.forward(
                params, self.streams(x_BHWC), Context(None, data)
            )
            return y, residue

        y, residue = jax.eval_shape(layer, jax.random.key(0))
        stored_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residue))
        return 8 * stored_bytes / sum(stream.size for stream in y)


def pool(x_BHWC: jax.Array) -> jax.Array:
    """Averages each quadrant, [B, 4 * C], so that the head gets some spatial information."""
    B, H, W, C = x_BHWC.shape
    quadrants = x_BHWC.reshape(B, 2, H // 2, 2, W // 2, C)
    # [B, 2, H/2, 2, W/2, C] -> [B, 2, 2, C] -> [B, 4 C]
    return jnp.mean(quadrants, axis=(2, 4)).reshape(B, 4 * C)


def _init_norm(channels):
    shape = (1, 1, 1, channels)  # of the rank of images, for the same reason as the head's bias
    return {"scale": jnp.ones(shape, jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}


def _init_conv(key, in_channels, out_channels):
    """He initialisation, fan-in."""
    init = jax.nn.initializers.he_normal()
    return {"kernel": init(key, (*KERNEL, in_channels, out_channels), jnp.float32)}
