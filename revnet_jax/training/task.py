"""What a training step asks of a model: a loss of a batch, and what evaluation sums up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import Exactness
from revnet_jax.models import LanguageModel, Lockstep, Model, Network, RevViT, Variables

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class Task(ABC):
    """What a network is to learn: from a batch to a loss, and to what evaluation sums up.

    network: the model; the task alone calls what is not in the `Model` protocol.
    best: the score that the best checkpoint has, and whether it is the "max" or the "min".
    unit: what `units` counts: speeds are in these.
    """

    network: Model
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("eval_loss", "min")
    unit: ClassVar[str] = "examples"

    @abstractmethod
    def loss(
        self,
        variables: Variables,
        batch: Batch,
        key: jax.Array,
        *,
        probes: dict[str, Exactness] | None,
        lockstep: Lockstep | None,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """(the mean over the batch, (new running averages, other means over the batch)).

        key: of all that training draws. probes, lockstep: for `chain`, by way of the network.
        Without running averages, the new ones are `variables.stats`.
        """

    @abstractmethod
    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """Weighted sums over a test batch: of the weights, as "count", and of "loss" and others."""

    @abstractmethod
    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a training batch; a test batch has a "weight" too, 0 where it is filled up."""

    def scores(self, means: Mapping[str, float]) -> dict[str, float]:
        """What evaluation reports, from the means: `eval_loss` (nats), `eval_accuracy`."""
        return {f"eval_{name}": mean for name, mean in means.items()}

    def units(self, batch_size: int) -> int:
        """How many are in a batch."""
        return batch_size

    def of_data(self, record: Mapping[str, Any]) -> Task:
        """This task, knowing what `Data` records; itself where it needs to know nothing."""
        return self


@dataclass(frozen=True)
class Classification(Task):
    """Images and labels: cross entropy.

    label_smoothing: share of the target spread over all classes, in training.
    mixup: each training image is mixed with another of the batch, in a proportion drawn from
      Beta(mixup, mixup) for the batch, and its loss with that of the other's label (Zhang et al.
      2017, arXiv:1710.09412); 0 for none.
    """

    network: Network | RevViT
    label_smoothing: float = 0.0
    mixup: float = 0.0
    best: ClassVar = ("eval_accuracy", "max")

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        key: jax.Array,
        *,
        probes: dict[str, Exactness] | None,
        lockstep: Lockstep | None,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """(the mean over the batch, (new running averages, other means over the batch))."""
        mix_key, model_key = jax.random.split(key)
        image_BHWC, label_B = batch["image"], batch["label"]
        if self.mixup:
            share = jax.random.beta(mix_key, self.mixup, self.mixup)
            image_BHWC = share * image_BHWC + (1 - share) * image_BHWC[::-1]
        logits_BV, stats = self.network.apply(
            variables, image_BHWC, train=True, key=model_key, probes=probes, lockstep=lockstep
        )
        nll = lambda label_B: jnp.mean(cross_entropy(logits_BV, label_B, self.label_smoothing))
        loss = nll(label_B)
        if self.mixup:
            loss = share * loss + (1 - share) * nll(label_B[::-1])
        return loss, (stats, {"train_accuracy": jnp.mean(is_correct(logits_BV, label_B))})

    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """Over what has weight in the batch: the weights, as "count", and what they weigh."""
        logits_BV, _ = self.network.apply(variables, batch["image"], train=False)
        weight_B = batch["weight"]
        return {
            "loss": jnp.sum(weight_B * cross_entropy(logits_BV, batch["label"])),
            "accuracy": jnp.sum(weight_B * is_correct(logits_BV, batch["label"])),
            "count": jnp.sum(weight_B),
        }

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a training batch."""
        images = (batch_size, *self.network.architecture.image_shape)
        return {
            "image": jax.ShapeDtypeStruct(images, jnp.float32),
            "label": jax.ShapeDtypeStruct(images[:1], jnp.int32),
        }


@dataclass(frozen=True)
class NextToken(Task):
    """Text: the likelihood of each token given those before it.

    context: tokens of a sequence. balance: weight of the balance loss of experts.
    bytes_per_token: of the test split, for bits per byte; None before the data are known.
    """

    network: LanguageModel
    context: int
    balance: float = 0.0
    bytes_per_token: float | None = None
    unit: ClassVar[str] = "tokens"

    def of_data(self, record: Mapping[str, Any]) -> NextToken:
        """Knowing what `Data` records of the text."""
        return replace(self, bytes_per_token=record["bytes_per_token"])

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        key: jax.Array,
        *,
        probes: dict[str, Exactness] | None,
        lockstep: Lockstep | None,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """As `Classification.loss`; `train_nll` is in nats a token."""
        nll, aux = self.network.loss(
            variables,
            batch["token"],
            batch["target"],
            key=key if self.network.architecture.dropout else None,
            probes=probes,
            lockstep=lockstep,
        )
        if not self.network.architecture.experts:
            return nll, (variables.stats, {})
        balance = jnp.mean(aux[0])
        metrics = {"train_nll": nll, "train_balance": balance}
        return nll + self.balance * balance, (variables.stats, metrics)

    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """As `Classification.sums`."""
        count = jnp.sum(batch["weight"])
        mean, _ = self.network.loss(variables, batch["token"], batch["target"], batch["weight"])
        return {"loss": mean * count, "count": count}

    def scores(self, means: Mapping[str, float]) -> dict[str, float]:
        """`eval_loss` (nats a token), `eval_perplexity`, and `eval_bits_per_byte` where known."""
        loss = means["loss"]
        found = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        if self.bytes_per_token:
            found["eval_bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def units(self, batch_size: int) -> int:
        """Tokens."""
        return batch_size * self.context

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a training batch."""
        tokens = jax.ShapeDtypeStruct((batch_size, self.context), jnp.int32)
        return {"token": tokens, "target": tokens}


def cross_entropy(
    logits_BV: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Negative log-likelihood in nats, [B].

    label_smoothing: share of the target spread over all classes (Szegedy et al. 2016,
      arXiv:1512.00567, section 7).
    """
    if label_smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits_BV, label_B)
    target_BV = jax.nn.one_hot(label_B, logits_BV.shape[-1], dtype=logits_BV.dtype)
    return optax.softmax_cross_entropy(logits_BV, optax.smooth_labels(target_BV, label_smoothing))


def is_correct(logits_BV: jax.Array, label_B: jax.Array) -> jax.Array:
    """1.0 where the largest logit is the label's, [B]."""
    return (jnp.argmax(logits_BV, axis=-1) == label_B).astype(jnp.float32)
