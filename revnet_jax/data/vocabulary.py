"""Vocabularies: what token ids stand for, and the conversion of text to ids and back."""

from __future__ import annotations

import codecs
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from revnet_jax.data.dataset import DataError, read_file

_LOOK_BACK = 16  # tokens of context when decoding one token at a time


class Vocabulary(NamedTuple):
    """What token ids stand for.

    Attributes:
      kind: whether ids are bytes, characters, or token ids of a `tokenizers` file.
      size: all ids are smaller than this.
      characters: for kind "characters", the character of each id; for kind "bytes", the bytes that
        occur in the training text, as Latin-1 (a model has not seen others).
      tokenizer_sha256: of the tokenizer's file.
      end_token: the id of the token that ends each document; None if there is none.
    """

    kind: Literal["bytes", "characters", "tokenizer"]
    size: int
    characters: str = ""
    tokenizer_sha256: str = ""
    end_token: int | None = None

    def check_same_ids(self, other: Vocabulary, where: str) -> None:
        """Raises DataError unless ids mean the same in both vocabularies.

        Args:
          where: what `other` belongs to, for the error message.
        """
        # Which bytes a text has, and which token ends it, does not change what ids mean.
        mine, theirs = (
            v._replace(characters="" if v.kind == "bytes" else v.characters, end_token=None)
            for v in (self, other)
        )
        if mine != theirs:
            raise DataError(
                f"got a vocabulary of {self.size} {self.kind}{_version(self)}, expected that of "
                f"{where}, {other.size} {other.kind}{_version(other)}: take the data or tokenizer "
                "file it was trained with"
            )


def vocabulary_from(record: Mapping[str, Any], file: Path = Path("config.json")) -> Vocabulary:
    """Rebuilds a vocabulary from its `_asdict()`; raises DataError for any other mapping.

    Args:
      file: where the record is from, for the error message.
    """
    try:
        return Vocabulary(**record)
    except TypeError as error:
        raise DataError(
            f"{file}: got a vocabulary that cannot be read ({error}), expected what training "
            "recorded there: bring the file back as it was"
        ) from error


class Codec(NamedTuple):
    """Converts text to ids and back.

    Attributes:
      encode: text to ids; raises DataError for characters or bytes that the model has not seen.
      decoder: makes an incremental decoder from the ids of a prompt. It is called with one id after
        another and returns the text that the id completes, "" while a character is incomplete.
    """

    encode: Callable[[str], list[int]]
    decoder: Callable[[Sequence[int]], Callable[[int], str]]


def codec(vocabulary: Vocabulary, tokenizer: Path | None = None) -> Codec:
    """Returns the codec of a vocabulary.

    Args:
      tokenizer: the file of the `tokenizers` library that the vocabulary was made with; None for
        other kinds.

    Raises DataError if the file is missing, cannot be read, or is not the one of the vocabulary.
    """
    if vocabulary.kind == "tokenizer":
        return _of_tokenizer(vocabulary, tokenizer)
    if tokenizer is not None:
        raise DataError(
            f"got tokenizer file {tokenizer} for a model of {vocabulary.kind}, expected none"
        )
    known = {character: i for i, character in enumerate(vocabulary.characters)}

    def encode(text):
        content = _utf8(text)
        symbols = content.decode("latin-1") if vocabulary.kind == "bytes" else text
        for symbol in symbols:
            if symbol not in known:
                what = f"byte {ord(symbol)}" if vocabulary.kind == "bytes" else repr(symbol)
                raise DataError(
                    f"got {what} in the prompt {text!r}, which the training text does not have: "
                    f"expected some of {vocabulary.characters!r}"
                )
        return (
            list(symbols.encode("latin-1"))
            if vocabulary.kind == "bytes"
            else [known[symbol] for symbol in symbols]
        )

    def decoder(prompt):
        del prompt
        if vocabulary.kind == "characters":
            return lambda i: vocabulary.characters[i]
        # Bytes of one character come one after another. What is not UTF-8 becomes U+FFFD.
        incremental = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: incremental.decode(bytes([i]))

    return Codec(encode, decoder)


def load_tokenizer(path: Path) -> tuple[Any, str]:
    """Loads (the tokenizer in a file, the file's sha256); raises DataError if that fails."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(
            "tokenizer files need the tokenizers library, which is not installed: run "
            "scripts/setup.sh text"
        ) from error
    content = read_file(path, "a tokenizer file")
    try:
        tokenizer = Tokenizer.from_str(content.decode())
        if not tokenizer.get_vocab():
            raise ValueError("got a tokenizer without tokens")
        # Published files may have truncation or padding switched on, which would lose or add text.
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: {error}; expected a tokenizer file, tokenizer.json") from error
    return tokenizer, hashlib.sha256(content).hexdigest()


def largest_id(tokenizer: Any) -> int:
    """The largest token id. Added tokens may leave gaps, so it can exceed the number of tokens."""
    return max(tokenizer.get_vocab().values())


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"got prompt {text!r}, expected UTF-8") from error


def _of_tokenizer(vocabulary, path):
    if path is None:
        raise DataError("got no --tokenizer, expected the file its tokens were made with")
    tokenizer, sha256 = load_tokenizer(path)
    found = Vocabulary("tokenizer", largest_id(tokenizer) + 1, tokenizer_sha256=sha256)
    found.check_same_ids(vocabulary, "the checkpoint")

    def decoder(prompt):
        # The text of a token depends on the tokens before it, but only on a few.
        read = functools.partial(tokenizer.decode, skip_special_tokens=False)
        ids, held = list(prompt)[-_LOOK_BACK:], 0
        said = read(ids)

        def decode(i):
            nonlocal ids, held, said
            ids.append(i)
            text = read(ids)
            # An incomplete UTF-8 character, which has at most four bytes: wait for the rest.
            if text.endswith("\N{REPLACEMENT CHARACTER}") and held < 3:
                held += 1
                return ""
            # The text of the shorter window is decoded anew, because it may begin in another way
            # than the end of the longer window: some decoders drop a leading space.
            new, ids, held = text[len(said) :], ids[-_LOOK_BACK:], 0
            said = read(ids)
            return new

        return decode

    def encode(text):
        _utf8(text)
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Codec(encode, decoder)


def _version(vocabulary):
    return f" ({vocabulary.tokenizer_sha256[:8]})" if vocabulary.tokenizer_sha256 else ""
