"""Likelihoods of texts under a trained language model, and greedy answers, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from revnet_jax.data.vocabulary import vocabulary_from
from revnet_jax.errors import UserError
from revnet_jax.models.task import NextToken
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.generate import codec_of_run, generate
from revnet_jax.training.restore import Which, all_fsdp, restore_run
from revnet_jax.training.sharding import batch_parts, on_mesh, put_batch

_SHORTEST = 16  # tokens: sequences are padded to this length, or more


class Score(NamedTuple):
    """The log-likelihood of tokens in nats, and whether greedy decoding gives them."""

    nats: float
    is_greedy: bool


class Window(NamedTuple):
    """A sequence of `tokens`, whose last `scored` tokens are scored."""

    tokens: Sequence[int]
    scored: int


class Scorer:
    """Scores texts with a checkpoint of a run, in batches. For one process.

    Args:
      tokenizer: as in `generate_text`.
      batch_size: sequences per batch, rounded up to a multiple of the devices.

    Attributes:
      prefix: the token before a text that begins with nothing: the one that ends documents; None
        if there is none.
      context: the most tokens that the model looks back on.

    Raises UserError for a run that is not of a language model, without a checkpoint, or with
    another tokenizer.
    """

    def __init__(
        self,
        workdir: Path,
        which: Which = "newest",
        *,
        tokenizer: Path | None = None,
        batch_size: int = 16,
    ):
        self._codec = codec_of_run(workdir, tokenizer)
        run = restore_run(workdir, which)
        assert isinstance(run.task, NextToken)
        self._network, self._variables = run.task.network, run.variables
        self.context = run.task.context
        # Shards may record an end token that the config does not name (-1).
        end = run.config.data.end_token
        recorded = vocabulary_from(run.data["vocabulary"], workdir / "config.json").end_token
        self.prefix: int | None = recorded if end < 0 else end
        self._mesh = all_fsdp()
        parts = batch_parts(self._mesh)
        self._batch_size = -(-batch_size // parts) * parts
        log_likelihoods = self._network.log_likelihoods
        self._log_likelihoods = exact_jit(
            on_mesh(lambda variables, batch: log_likelihoods(variables, **batch), self._mesh)
        )

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Scores each second text after the first of its pair.

        A space at the end of the first counts as the start of the second, as tokenizers have it.
        """
        documents = []
        for before, after in pairs:
            kept = before.rstrip()
            before, after = kept, before[len(kept) :] + after
            first = self._codec.encode(before) if before else self._prefix()
            # Encoded together, as in training: tokenizers may join text across the border.
            whole = self._codec.encode(before + after)
            after_tokens = whole[len(first) :] if before else whole
            documents.append((first + after_tokens, len(first)))
        return self._score(documents)

    def texts(self, texts: Sequence[str]) -> list[Score]:
        """Scores whole texts, after the token that ends the document before."""
        return self._score([(self._prefix() + self._codec.encode(text), 1) for text in texts])

    def answer(
        self,
        prompt: str,
        *,
        until: Sequence[str] = (),
        num_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Generates text until one of some strings, which is left out, or the end of a document.

        Args:
          num_tokens: the most tokens to generate. If they would not fit into the context with the
            prompt, the prompt's start is cut off.
          temperature: see `sample`. 0 is greedy decoding.
        """
        token_T = self._codec.encode(prompt) if prompt else self._prefix()
        token_T = token_T[-max(1, self.context - num_tokens) :]
        decode, text = self._codec.decoder(token_T), ""
        for token in generate(
            self._network,
            self._variables,
            token_T,
            context=self.context,
            num_tokens=num_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            few_shapes=True,
        ):
            if token == self.prefix:
                break
            text += decode(token)
            # In all of the text, because a stop may begin in one token and end in another.
            found = [text.index(stop) for stop in until if stop in text]
            if found:
                return text[: min(found)]
        return text

    def _prefix(self) -> list[int]:
        if self.prefix is None:
            raise UserError(
                "got a text with nothing before it, expected one token at least: the model has no "
                "token that ends documents (config.data.end_token) to begin with"
            )
        return [self.prefix]

    def _score(self, documents: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
        """Scores the tokens of each document from a position on."""
        windows = [
            (number, window)
            for number, document in enumerate(documents)
            for window in windows_of(*document, self.context)
        ]
        windows.sort(key=lambda pair: len(pair[1].tokens))  # little padding, few lengths
        nats, is_greedy = np.zeros(len(documents)), np.ones(len(documents), bool)
        for start in range(0, len(windows), self._batch_size):
            some = windows[start : start + self._batch_size]
            found = self._of_batch([window for _, window in some])
            for (number, _), score in zip(some, found, strict=True):
                nats[number] += score.nats
                is_greedy[number] &= score.is_greedy
        return [Score(float(x), bool(y)) for x, y in zip(nats, is_greedy, strict=True)]

    def _of_batch(self, windows: Sequence[Window]) -> list[Score]:
        longest = max(len(window.tokens) for window in windows) - 1
        # A power of two, so that few lengths are compiled.
        length = min(self.context, max(_SHORTEST, 1 << (longest - 1).bit_length()))
        # Padding comes after the tokens that count, which do not look ahead.
        tokens = np.zeros((self._batch_size, length + 1), np.int32)
        for row, window in enumerate(windows):
            tokens[row, : len(window.tokens)] = window.tokens
        batch = {"token_BT": tokens[:, :-1], "target_BT": tokens[:, 1:]}  # [B, T] from [B, T + 1]
        nats, is_likeliest = jax.device_get(
            self._log_likelihoods(self._variables, put_batch(batch, self._mesh))
        )
        scores = []
        for row, window in enumerate(windows):
            last = len(window.tokens) - 1
            # Targets are the tokens from the second on: `last` of them, before the padding.
            part = slice(last - window.scored, last)
            scores.append(
                Score(nats[row, part].sum(dtype=np.float64), is_likeliest[row, part].all())
            )
        return scores


def windows_of(tokens: Sequence[int], first: int, context: int) -> Iterator[Window]:
    """Cuts a document into windows that score each token from position `first` on once.

    A full window begins with the token before those that it scores, so that the first of them has
    one token of context. The last window is filled up with the tokens before it. These are the
    disjoint windows of lm-evaluation-harness, for rolling likelihoods with a context of one token.
    """
    position = first
    while position < len(tokens):
        # Full windows do not overlap: the first score in one has a single token to go by. The last
        # window reaches back to fill the context.
        end = min(len(tokens), position + context)
        # One token more than the context: the first is only read, and the last only scored.
        yield Window(tokens[max(0, end - 1 - context) : end], end - position)
        position = end
