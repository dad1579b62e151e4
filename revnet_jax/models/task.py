"""Tasks: the loss of a batch for training, and the weighted sums that evaluation adds up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from revnet_jax.models import ConvNet, LanguageModel, Model, Sweep, Variables, VisionTransformer

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


class Task(ABC):
    """What a network is trained for: its loss on a batch, and its scores in evaluation.

    Attributes:
      network: the model. Only the task calls methods that are not in the `Model` protocol.
      best: the score that ranks checkpoints, and whether the best has the "max" or the "min" of it.
      unit: what `units` counts; speeds are reported in units per second.
    """

    # Frozen subclasses make it read-only, which a type checker notes: no task assigns it anew.
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
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Returns (mean loss over the batch, (new running averages, other means over the batch)).

        Args:
          batch: may have a "weight" (see `batch_shapes`).
          key: PRNG key of everything random in training.
          sweep: what the backward sweep does beside gradients; passed on to the network.

        A task without running averages returns `variables.stats`.
        """

    @abstractmethod
    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """Weighted sums over a test batch of "loss" and others, and the total weight as "count"."""

    @abstractmethod
    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch. A test batch has a "weight" too, 0 for padding.

        So do training batches of a text with weights (`Text`), which say which targets count. Their
        mean over the whole batch is 1, or 0 if no target counts. So the loss is the mean of weight
        times loss over all targets, and that of a part of the batch likewise: the mean over equal
        parts is then that of the batch, however the targets that count are spread over the parts.
        """

    def scores(self, means: Mapping[str, float]) -> dict[str, float]:
        """Turns means over the test split into scores: `eval_loss` (nats), `eval_accuracy`."""
        return {f"eval_{name}": mean for name, mean in means.items()}

    def units(self, batch_size: int) -> int:
        """The number of units (see `unit`) in a batch of this size."""
        return batch_size

    def of_data(self, record: Mapping[str, Any]) -> Task:
        """Returns this task with what it needs from the record of the data; by default, itself."""
        return self


@dataclass(frozen=True)
class Classification(Task):
    """Image classification by cross entropy.

    Attributes:
      label_smoothing: share of the target that is spread over all classes, in training.
      mixup: each training image is mixed with another of the batch, and its loss with the loss for
        the other's label. The proportion is drawn from Beta(mixup, mixup), once per batch (Zhang et
        al. 2017, arXiv:1710.09412). 0 turns it off.
    """

    network: ConvNet | VisionTransformer  # ty: ignore[incompatible-attribute-override]
    label_smoothing: float = 0.0
    mixup: float = 0.0
    best: ClassVar = ("eval_accuracy", "max")

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        key: jax.Array,
        *,
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Cross entropy in nats and the batch's accuracy: see `Task.loss`."""
        mix_key, model_key = jax.random.split(key)
        image_BHWC, label_B = batch["image"], batch["label"]
        if self.mixup:
            share = jax.random.beta(mix_key, self.mixup, self.mixup)
            # An image and the one as far from the end are mixed: batches are shuffled already.
            image_BHWC = share * image_BHWC + (1 - share) * image_BHWC[::-1]
        logits_BV, stats = self.network.apply(
            variables, image_BHWC, train=True, key=model_key, sweep=sweep
        )
        nll = lambda label_B: jnp.mean(cross_entropy(logits_BV, label_B, self.label_smoothing))
        loss = nll(label_B)
        if self.mixup:
            loss = share * loss + (1 - share) * nll(label_B[::-1])
        # With mixup, by the label of the first image alone.
        return loss, (stats, {"train_accuracy": jnp.mean(is_correct(logits_BV, label_B))})

    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """Weighted sums of loss and accuracy, and the total weight as "count"."""
        logits_BV, _ = self.network.apply(variables, batch["image"], train=False)
        weight_B = batch["weight"]
        return {
            "loss": jnp.sum(weight_B * cross_entropy(logits_BV, batch["label"])),
            "accuracy": jnp.sum(weight_B * is_correct(logits_BV, batch["label"])),
            "count": jnp.sum(weight_B),
        }

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch."""
        images = (batch_size, *self.network.shape.image_shape)
        return {
            "image": jax.ShapeDtypeStruct(images, jnp.float32),
            "label": jax.ShapeDtypeStruct(images[:1], jnp.int32),
        }


@dataclass(frozen=True)
class NextToken(Task):
    """Language modelling: the likelihood of each token given the tokens before it.

    Attributes:
      context: tokens in a sequence.
      balance: weight of the load-balancing loss of a mixture of experts.
      bytes_per_token: mean over the test split, for bits per byte; None if it is not known: before
        the data are loaded, or with a user's `Source`, which has no text.
    """

    network: LanguageModel  # ty: ignore[incompatible-attribute-override]
    context: int
    balance: float = 0.0
    bytes_per_token: float | None = None
    unit: ClassVar[str] = "tokens"

    def of_data(self, record: Mapping[str, Any]) -> NextToken:
        """Returns this task with the bytes per token of a text, which `Data` recorded."""
        return replace(self, bytes_per_token=record.get("bytes_per_token"))

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        key: jax.Array,
        *,
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Negative log-likelihood in nats per token, plus the balance loss: see `Task.loss`."""
        weight_BT = batch.get("weight")
        nll, aux = self.network.loss(
            variables,
            batch["token"],
            batch["target"],
            weight_BT,
            # Not the sum of the weights of this part of the batch: see `Task.batch_shapes`.
            None if weight_BT is None else weight_BT.size,
            key=key if self.network.is_random else None,
            sweep=sweep,
        )
        stats = self.network.next_stats(variables.stats)
        if not self.network.shape.experts:
            return nll, (stats, {})
        balance = jnp.mean(aux[0])  # one for each layer
        metrics = {"train_nll": nll, "train_balance": balance}
        return nll + self.balance * balance, (stats, metrics)

    def sums(self, variables: Variables, batch: Batch) -> Sums:
        """The weighted sum of the loss, and the total weight as "count"."""
        count = jnp.sum(batch["weight"])
        mean, _ = self.network.loss(
            variables,
            batch["token"],
            batch["target"],
            batch["weight"],
            jnp.where(count == 0, 1, count),  # a batch without answers adds zeros, not NaN
        )
        # Evaluation adds up sums of batches, and `loss` has returned a mean.
        return {"loss": mean * count, "count": count}

    def scores(self, means: Mapping[str, float]) -> dict[str, float]:
        """`eval_loss` (nats per token), `eval_perplexity`, and `eval_bits_per_byte` if known."""
        loss = means["loss"]
        # Above 709 `math.exp` raises an error.
        found = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}
        if self.bytes_per_token:
            found["eval_bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return found

    def units(self, batch_size: int) -> int:
        """The number of tokens in a batch."""
        return batch_size * self.context

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch."""
        tokens = jax.ShapeDtypeStruct((batch_size, self.context), jnp.int32)
        return {"token": tokens, "target": tokens}


def cross_entropy(
    logits_BV: jax.Array, label_B: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Negative log-likelihood in nats, [B].

    Args:
      label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016,
        arXiv:1512.00567, section 7).
    """
    # No array of targets as large as the logits, unless they are smoothed.
    if label_smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits_BV, label_B)
    target_BV = jax.nn.one_hot(label_B, logits_BV.shape[-1], dtype=logits_BV.dtype)
    return optax.softmax_cross_entropy(logits_BV, optax.smooth_labels(target_BV, label_smoothing))


def is_correct(logits_BV: jax.Array, label_B: jax.Array) -> jax.Array:
    """Returns 1.0 where the largest logit is that of the label, else 0.0, [B]."""
    return (jnp.argmax(logits_BV, axis=-1) == label_B).astype(jnp.float32)
