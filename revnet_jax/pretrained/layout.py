"""How tensors of published models lie in the parameters of ours.

Dims: D stream width, N heads, G key-value heads, R query heads per key-value head, K head size, F
hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from revnet_jax.config import language_model
from revnet_jax.models import LanguageModelShape
from revnet_jax.pretrained.description import Description

View = Callable[[np.ndarray], np.ndarray]
NOTHING = r"(?!)"  # a pattern that matches nothing
NO_DECODER_HAS = {"experts": 0, "window": 0}  # settings that no published decoder has otherwise


class Tensor(NamedTuple):
    """A tensor of a published model, and the part of our parameters that has the same elements.

    Attributes:
      name: of the tensor.
      shape: of the tensor.
      path: of our parameter, such as "layers/0/qkv/kernel".
      part: from the parameter (of one layer) to the view of it that has the tensor's elements, in
        the order of the tensor. Both directions use it: import writes into the view, export reads
        it.
      layer: which entry of the parameter's leading axis; None if it has no axis of layers.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    part: View
    layer: int | None = None

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """The view of our whole parameter that has the tensor's elements, in its order."""
        return self.part(leaf if self.layer is None else leaf[self.layer])


def data_of_decoder(found: Description) -> dict[str, Any]:
    """The settings of the text of a decoder."""
    vocab_size, end_token = found.whole("vocab_size"), found.end_token()
    return {"name": "shards", "vocab_size": vocab_size, "end_token": end_token}


class PublishedFamily(NamedTuple):
    """A family of published models: its config.json and its tensors, both ways.

    Attributes:
      model_type: its name in config.json.
      fixed: settings of `config.model` that all its models share.
      settings: from its config.json to the other settings of `config.model`.
      describe: from our settings of a run (`config.model`, `config.data`) to its config.json.
      tensors: all tensors of a model of this shape.
      data: from its config.json to settings of `config.data`.
      base: returns all settings with their defaults.
      class_name: of decoders: their class in transformers, which config.json names too.
      biases: of decoders: values of `config.model.bias` that they can have.
      context: of decoders: the field of config.json with the longest sequence.
      prefix: of the names of its tensors, without which some files are published.
      ignored: a pattern of tensors that hold no weights.
      head: of classifiers: a pattern of the tensors that depend on the classes.
    """

    model_type: str
    fixed: Mapping[str, Any]
    settings: Callable[[Description], dict[str, Any]]
    describe: Callable[[Any, Any], dict[str, Any]]
    tensors: Callable[[Any], Iterable[Tensor]]
    data: Callable[[Description], dict[str, Any]] = data_of_decoder
    base: Callable[[], ConfigDict] = language_model
    class_name: str = ""
    biases: tuple[str, ...] = ()
    context: str = ""
    prefix: str = ""
    ignored: str = NOTHING
    head: str = NOTHING


def as_it_is(leaf: np.ndarray) -> np.ndarray:
    """The parameter itself."""
    return leaf


def transposed(kernel: np.ndarray) -> np.ndarray:
    """A kernel [in, out] as PyTorch's linear layers have it, [out, in]."""
    return kernel.T


def one_of(part: int) -> View:
    """One of the two kernels [in, parts, out] of a SwiGLU, as [out, in]: gate or value."""
    return lambda kernel: kernel[:, part].T


def of_heads(a: LanguageModelShape, which: str) -> View:
    """Queries, keys or values ("q", "k", "v") of our kernel or bias that makes all three.

    Ours has the axes [D, G, R + 2, K], each key-value head beside its query heads: R queries, the
    key, the value. A bias has no D. Returns [G, R, K, D], or [G, K, D] for keys and values.
    """
    R = a.heads // a.kv_heads
    # A slice keeps the axis of the R query heads, a number drops it.
    index: Any = {"q": slice(R), "k": R, "v": R + 1}[which]

    def part(leaf):
        # [D, outputs] or [outputs] becomes [..., G, R + 2, K]. Splitting an axis, indexing and
        # moving axes all give views, so that an import can write through them.
        split = leaf.reshape(*leaf.shape[:-1], a.kv_heads, R + 2, a.size_of_head)
        found = split[..., index, :]
        # PyTorch has inputs last.
        return np.moveaxis(found, 0, -1) if leaf.ndim == 2 else found

    return part
