"""Text generation from a trained language model, token by token."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from revnet_jax.data.vocabulary import Codec, codec, vocabulary_from
from revnet_jax.errors import UserError, tell
from revnet_jax.families import family_of
from revnet_jax.models import LanguageModel, Variables
from revnet_jax.models.task import NextToken
from revnet_jax.runs.workdir import load_config, load_record
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.restore import Which, restore_run

_PIECE = 256  # tokens of a prompt per call of the model (chunked prefill)


def generate_text(
    workdir: Path,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    which: Which = "newest",
    tokenizer: Path | None = None,
) -> Iterator[str]:
    """Yields the text that the model of a run generates after a prompt, piece by piece.

    Args:
      prompt: if it is longer than the context, the model reads only its end, and a line on stderr
        says so.
      temperature: see `sample`.
      top_p: see `sample`.
      tokenizer: the tokenizer file of the training data, if they were made with one; None for
        the one in `workdir`, which imported weights have there.

    Raises UserError, before anything is computed, for a run that is not of a language model, an
    empty prompt or one with unknown tokens, another tokenizer, and settings out of range.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"got seed={seed}, expected 0 to 2**32 - 1")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or num_tokens < 0:
        raise UserError(
            f"got temperature={temperature}, top_p={top_p}, num_tokens={num_tokens}, expected "
            "temperature 0 or more, top_p in (0, 1], num_tokens 0 or more"
        )
    encode, decoder = codec_of_run(workdir, tokenizer)
    token_T = encode(prompt)
    if not token_T:
        raise UserError(f"got prompt {prompt!r}, expected one token at least")
    run = restore_run(workdir, which)
    assert isinstance(run.task, NextToken)
    if len(token_T) > run.task.context:
        tell(
            f"note: got a prompt of {len(token_T):,} tokens for a context of "
            f"{run.task.context:,}: the model reads its last {run.task.context:,}"
        )
    decode = decoder(token_T)
    for token in generate(
        run.task.network,
        run.variables,
        token_T,
        context=run.task.context,
        num_tokens=num_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        yield decode(token)


def codec_of_run(workdir: Path, tokenizer: Path | None = None) -> Codec:
    """Returns the conversion of text to tokens, and back, that a run was trained with.

    Args:
      tokenizer: as in `generate_text`.

    Raises UserError for a run that is not of a language model, or another tokenizer.
    """
    config, record = load_config(workdir), load_record(workdir)["data"]
    if family_of(config).data != "text":
        raise UserError(f"{workdir} holds a run of {config.model.family}, expected a decoder")
    if "vocabulary" not in record:
        raise UserError(
            f"{workdir} has no vocabulary, expected a run on a text, or weights imported with "
            "their tokenizer.json: bring it beside their config.json, and import them again"
        )
    vocabulary = vocabulary_from(record["vocabulary"], workdir / "config.json")
    if vocabulary.kind == "tokenizer" and (workdir / "tokenizer.json").exists():
        tokenizer = tokenizer or workdir / "tokenizer.json"
    return codec(vocabulary, tokenizer)


def generate(
    model: LanguageModel,
    variables: Variables,
    token_T: Sequence[int],
    *,
    context: int,
    num_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    few_shapes: bool = False,
) -> Iterator[int]:
    """Samples tokens after a prompt, with a KV cache (cache of attention keys and values).

    Args:
      context: number of tokens that the model can look back on. When the cache is full, it is
        filled again with the later half of them, so each token is evaluated about twice in a long
        text.
      temperature: see `sample`.
      top_p: see `sample`.
      seed: of the sampling.
      few_shapes: read prompts in pieces whose lengths are powers of two, so that prompts of any
        length share a few compiled programs.
    """
    advance = _advance(model, temperature, top_p)
    empty_cache = functools.partial(model.empty_cache, 1, context)
    keys = functools.partial(jax.random.fold_in, jax.random.key(seed))
    seen = list(token_T)[-context:]
    cache, position, unread = empty_cache(), 0, seen
    for i in range(num_tokens):
        # The cache is full. Half of it is read again, so this is due every context / 2 tokens.
        if position + len(unread) > context:
            unread = seen[-max(1, context // 2) :]
            cache, position = empty_cache(), 0
        # Earlier pieces fill the cache; only the token sampled after the last one is used.
        for piece in _pieces(unread, few_shapes):
            token_BT = jnp.asarray([piece], jnp.int32)  # [1, T]
            token, cache = advance(variables, cache, token_BT, position, keys(i))
            position += len(piece)
        unread = [int(token)]
        seen = [*seen, *unread][-context:]
        yield unread[0]


@functools.lru_cache(4)  # so that another prompt compiles nothing again
def _advance(model, temperature, top_p):
    """`(variables, cache, token_BT, position, key) -> (the next token, cache)`, jitted."""

    def next_token(variables, cache, token_BT, position, key):
        logits_BV, cache = model.extend(variables, cache, token_BT, position)
        return sample(logits_BV[0], key, temperature=temperature, top_p=top_p), cache

    return exact_jit(next_token, donate_argnums=1)  # donates the cache, to update it in place


def _pieces(tokens, few_shapes):
    """Yields parts of the tokens of at most _PIECE, which limits the size of attention scores."""
    while tokens:
        most = min(_PIECE, len(tokens))
        # The largest power of two that fits: 1 to 256, so at most nine lengths are compiled.
        size = 1 << (most.bit_length() - 1) if few_shapes else most
        yield tokens[:size]
        tokens = tokens[size:]


def sample(logits_V: jax.Array, key: jax.Array, *, temperature: float, top_p: float) -> jax.Array:
    """Samples a token from softmax(logits / temperature). Temperature 0 is greedy decoding.

    Args:
      top_p: nucleus sampling: draws only from the most likely tokens, as many as it takes for their
        probabilities to sum to at least `top_p` (Holtzman et al. 2019, arXiv:1904.09751).
    """
    if temperature == 0:
        return jnp.argmax(logits_V)
    order_V = jnp.argsort(-logits_V)
    # Minus the maximum before the division: at a tiny temperature values overflow only to -inf.
    sorted_V = (logits_V[order_V] - jnp.max(logits_V)) / temperature
    probability_V = jax.nn.softmax(sorted_V)
    # The probability of all likelier tokens: 0 for the first, which is thus always kept.
    before_V = jnp.cumsum(probability_V) - probability_V
    return order_V[jax.random.categorical(key, jnp.where(before_V < top_p, sorted_V, -jnp.inf))]
