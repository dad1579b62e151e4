"""The shape of a decoder: its sizes and options, checked."""

from __future__ import annotations

from dataclasses import dataclass

from revnet_jax.models.transformer.base import check_positive
from revnet_jax.models.transformer.decoder import ACTIVATIONS, BIASES, NORMS, Bias
from revnet_jax.models.transformer.linear import LoRA


@dataclass(frozen=True)
class LanguageModelShape:
    """The shape of a decoder.

    Attributes:
      kv_heads: key-value heads; divides `heads` (grouped-query attention).
      hidden: width inside the feed-forward network.
      reversible: two streams; otherwise the irreversible model with one stream.
      tied: use the embedding as the output kernel too.
      dropout: rate, applied to the outputs of branches and to the embedding.
      experts: number of expert feed-forward networks per layer (mixture of experts). Each token
        goes to `experts_per_token` of them; 0 for one dense network.
      window: sliding-window attention: how many tokens a token reads in each layer, the last of
        them itself; 0 for all earlier tokens.
      end_token: the id of the token that ends each document, and belongs to it. If given, attention
        does not cross from one document to another; None to let tokens read across documents. The
        position of a document in its sequence does not matter, because rotary positions are
        relative.
      head_size: of queries, keys and values; 0 for width / heads. This and what follows is there
        for pretrained models.
      norm: "rms" (RMSNorm) or "layer" (LayerNorm).
      norm_eps: what a norm adds to the variance.
      qk_norm: normalise the query and the key of each head, before they are rotated (Henry et al.
        2020, arXiv:2010.04245), as Qwen3 does.
      bias: which linear layers have one: "none"; "qkv", those to queries, keys and values (Qwen2);
        "attention", the one after the heads too; "all", those of feed-forward networks too (GPT-2).
      activation: of the feed-forward network, "swiglu" or "gelu".
      learned_positions: the number of positions that have a learned embedding, which is added to
        the embedding of the token (GPT-2); 0 for rotary positions.
      rotary_scaling: factor, low, high and context of `scaled_frequency` (Llama 3.1); () for none.
      integrator: how the streams of a reversible model are updated, one of `INTEGRATORS`: see
        `Transformer`.
      integrator_steps: with the integrator "dual", the number of batches, or microbatches, until it
        is the midpoint rule.
      adapter_rank: with the integrator "meft", the width inside its adapters, see `Adapter`.
      lora_rank: rank of the matrices that are added to the kernels of all layers, see `LoRA`; 0 for
        none.
      lora_alpha: the product of these matrices is scaled by lora_alpha / lora_rank.
      frozen_dtype: of the layers' kernels. "int8" keeps them in 8 bits, see `models/int8.py`: they
        are then not trained, only the matrices beside them. "" keeps them like other parameters.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    reversible: bool = True
    tied: bool = False
    dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 2
    rotary_base: float = 10_000.0
    window: int = 0
    end_token: int | None = None
    head_size: int = 0
    norm: str = "rms"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    bias: Bias = "none"
    activation: str = "swiglu"
    learned_positions: int = 0
    rotary_scaling: tuple[float, ...] = ()
    integrator: str = "streams"
    integrator_steps: int = 1000
    adapter_rank: int = 8
    lora_rank: int = 0
    lora_alpha: float = 16.0
    frozen_dtype: str = ""

    @property
    def lora(self) -> LoRA:
        """The adapters of the layers' kernels."""
        scale = self.lora_alpha / max(1, self.lora_rank)
        return LoRA(self.lora_rank, scale)

    @property
    def int8(self) -> bool:
        """Whether the layers' kernels are kept in 8 bits."""
        return self.frozen_dtype == "int8"

    @property
    def size_of_head(self) -> int:
        """`head_size`, or width / heads if that is 0."""
        return self.head_size or self.width // self.heads

    def __post_init__(self):
        sizes = ("vocab_size", "layers", "width", "heads", "kv_heads", "hidden")
        check_positive(self, (*sizes, "integrator_steps", "adapter_rank"))
        # Rotary positions turn one half of a head against the other.
        if not self.head_size and self.width % (2 * self.heads):
            raise ValueError(
                f"got width={self.width} and heads={self.heads}, expected a width that heads of an "
                f"even size make up: a multiple of {2 * self.heads}"
            )
        if self.rotary_base <= 0:
            raise ValueError(f"got rotary_base={self.rotary_base}, expected more than 0")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"got kv_heads={self.kv_heads}, expected a divisor of heads={self.heads}"
            )
        if self.window < 0:
            raise ValueError(f"got window={self.window}, expected 0 (none) or a number of tokens")
        if self.end_token is not None and not 0 <= self.end_token < self.vocab_size:
            raise ValueError(
                f"got end_token={self.end_token}, expected the id of the token that ends "
                f"documents, 0 to {self.vocab_size - 1}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"got dropout={self.dropout}, expected a share in [0, 1)")
        if self.experts < 0:
            raise ValueError(f"got experts={self.experts}, expected 0 (none) or more")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"got experts_per_token={self.experts_per_token}, expected 1 to {self.experts}"
            )
        self._check_options()

    def _check_options(self):
        """Checks the settings for pretrained models."""
        for name, known in (("norm", NORMS), ("bias", BIASES), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"got {name}={getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if self.head_size < 0 or self.head_size % 2:
            raise ValueError(
                f"got head_size={self.head_size}, expected an even size, or 0 for width / heads"
            )
        if self.experts and (self.activation != "swiglu" or self.bias == "all"):
            raise ValueError(
                f"got experts, activation={self.activation!r} and bias={self.bias!r}, expected "
                "swiglu and any bias but all: experts have no others"
            )
        if self.learned_positions < 0 or (self.learned_positions and self.end_token is not None):
            raise ValueError(
                f"got learned_positions={self.learned_positions} and "
                f"end_token={self.end_token}, expected 0, or a number of positions without "
                "separate documents: those could start at any position"
            )
        if self.lora_rank < 0 or (self.lora_rank and self.experts):
            raise ValueError(
                f"got lora_rank={self.lora_rank} and experts={self.experts}, expected 0, or a rank "
                "without experts: those have no adapters"
            )
        if self.frozen_dtype not in ("", "int8") or (self.frozen_dtype and not self.lora_rank):
            raise ValueError(
                f"got frozen_dtype={self.frozen_dtype!r} and lora_rank={self.lora_rank}, expected "
                "'', or int8 with a rank from 1: kernels in 8 bits are not trained, only the "
                "matrices beside them"
            )
        if self.rotary_scaling:
            _check_scaling(self.rotary_scaling, self.learned_positions)


def _check_scaling(scaling, learned_positions):
    if len(scaling) != 4 or min(scaling) <= 0 or scaling[1] >= scaling[2] or learned_positions:
        raise ValueError(
            f"got rotary_scaling={scaling} and learned_positions={learned_positions}, expected (), "
            "or with rotary positions (factor, low, high, context), all more than 0 and low < high"
        )
