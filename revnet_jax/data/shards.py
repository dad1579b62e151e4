"""Token ids on disk: memory-mapped files of uint16 or uint32, listed in tokens.json."""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from revnet_jax.data.dataset import DataError, file_errors, read_file
from revnet_jax.data.vocabulary import Vocabulary, largest_id, load_tokenizer
from revnet_jax.errors import writing
from revnet_jax.files import write_atomically

WRITTEN = "what tokenize_text.py wrote"
_PIECE_BYTES = 2**20
_PIECES = 16  # pieces per call of the tokenizer, which works on them in parallel


class Shards:
    """Concatenated token files, read like one array by index arrays; never loaded whole."""

    def __init__(self, files: Sequence[np.ndarray]):
        self._files = files
        self._ends = np.cumsum([len(file) for file in files])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._files) else 0

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        # "right": the place at the end of a file is the first of the next one that is not empty.
        which = np.searchsorted(self._ends, places, side="right")
        # uint32 holds the ids of both dtypes, and the weights 0 and 1.
        tokens = np.empty(places.shape, np.uint32)
        for i in np.unique(which):
            file, here = self._files[i], which == i
            tokens[here] = file[places[here] - (self._ends[i] - len(file))]
        return tokens


class LoadedShards(NamedTuple):
    """What a folder of shards holds.

    Attributes:
      bytes_per_token: of the test split; if it has weights, of the tokens that are trained on.
      train_weight: 0 or 1 for each token of `train`, whether it is trained on; None for all.
      test_weight: likewise.
    """

    train: Shards
    test: Shards
    vocabulary: Vocabulary
    bytes_per_token: float
    train_weight: Shards | None
    test_weight: Shards | None


def load_shards(folder: Path) -> LoadedShards:
    """Loads a folder of shards.

    Raises DataError if a file is missing, truncated, or not written by `tokenize_files`.
    """
    path = folder / "tokens.json"
    content = read_file(path, WRITTEN)
    try:
        found = json.loads(content.decode())
        dtype = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}[found["dtype"]]
        end = found.get("end_token")  # absent in older files
        vocabulary = Vocabulary(
            "tokenizer",
            _whole(found["vocab_size"]),
            tokenizer_sha256=_string(found["tokenizer_sha256"]),
            end_token=None if end is None else _whole(end),
        )
        sizes = {split: _sizes(found["splits"][split]) for split in ("train", "test")}
        # Shards of text have none.
        answers = {split: _sizes(found["answers"][split]) for split in sizes if "answers" in found}
        for split, files in answers.items():
            # Each file of weights belongs to a file of tokens, and is as long.
            if list(files.values()) != list(sizes[split].values()):
                raise ValueError(f"got {files} for the answers of {sizes[split]}")
        per_token = float(found["test_bytes_per_token"])
        if not 0 < per_token < math.inf:
            raise ValueError(f"got {per_token} bytes per token")
    # OverflowError: an integer too large for a float. RecursionError: deeply nested brackets.
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(f"{path}: {found}; expected {WRITTEN}") from error
    open_all = lambda files, dtype: Shards([_map(folder / n, dtype, files[n]) for n in files])
    train, test = (open_all(files, dtype) for files in sizes.values())
    weights = [open_all(files, np.dtype(np.uint8)) for files in answers.values()] or [None, None]
    return LoadedShards(train, test, vocabulary, per_token, weights[0], weights[1])


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"got {repr(value)[:40]}, expected a whole number")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"got {repr(value)[:40]}, expected a string")
    return value


def _sizes(files: Any) -> dict[str, int]:
    # A path with folders could lead to files elsewhere.
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise TypeError("expected names of files in its folder, with their tokens")
    return {name: _whole(size) for name, size in files.items()}


def _map(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    # One comparison tells both a missing file and one that is cut short.
    got = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    expected = f"{size * dtype.itemsize} bytes"
    if got != expected:
        raise DataError(f"{path}: got {got}, expected {expected}: it is missing or cut short")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


class TokenFiles:
    """Writes tokens to the files of a new folder, and at last tokens.json, which lists them.

    Args:
      inputs: the files that will be tokenized.
      end_token: a token of the tokenizer that ends documents; None for no token.
      shard_tokens: approximate number of tokens per file.

    Attributes:
      end: the ids to append to a document: that of the end token, if any.

    Raises:
      DataError: a file is missing, the tokenizer file is invalid, or `out` holds tokens already.
      ValueError: `test_share` is out of its range, or the tokenizer has no such `end_token`.
      StorageError: the folder or a file cannot be written.
    """

    def __init__(
        self,
        inputs: Sequence[Path],
        tokenizer_file: Path,
        out: Path,
        *,
        test_share: float,
        end_token: str | None,
        shard_tokens: int,
    ):
        if not 0 < test_share < 1:
            raise ValueError(f"got test_share={test_share}, expected a share in (0, 1)")
        if (out / "tokens.json").exists():
            raise DataError(f"{out} holds tokens already: choose another folder")
        self.tokenizer, self._sha256 = load_tokenizer(tokenizer_file)
        self._vocab_size = largest_id(self.tokenizer) + 1
        self.end = [] if end_token is None else [self.tokenizer.token_to_id(end_token)]
        if None in self.end:
            raise ValueError(f"got end_token={end_token!r}, expected a token of {tokenizer_file}")
        # 2**16 ids, 0 to 65,535, fit into two bytes.
        self._dtype = np.dtype(np.uint16 if self._vocab_size <= 2**16 else np.uint32)
        missing = [str(path) for path in inputs if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]}: no such file; expected text to tokenize")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self._out, self._shard_tokens = out, shard_tokens
        self.splits: dict[str, dict[str, int]] = {"train": {}, "test": {}}
        self._answers: dict[str, dict[str, int]] = {"train": {}, "test": {}}

    def append(
        self, split: str, ids: Sequence[int], is_answer: Sequence[bool] | None = None
    ) -> None:
        """Appends tokens to a split.

        Args:
          is_answer: for each token, whether it is trained on; None in all calls for shards of text.
        """
        files = self.splits[split]
        # A file takes whole pieces until it has enough, so sizes are approximate.
        is_new = not files or list(files.values())[-1] >= self._shard_tokens
        name = f"{split}_{len(files):05}.bin" if is_new else list(files)[-1]
        self._write(files, name, np.asarray(ids, self._dtype), is_new)
        if is_answer is not None:
            beside = name.replace(".bin", "_answers.bin")
            self._write(self._answers[split], beside, np.asarray(is_answer, np.uint8), is_new)

    def _write(self, files, name, array, is_new):
        # A new file is truncated: a run that was interrupted may have left one of this name.
        with writing(self._out / name), open(self._out / name, "wb" if is_new else "ab") as file:
            file.write(array.data)
        files[name] = files.get(name, 0) + len(array)

    def describe(self, test_bytes_per_token: float) -> dict[str, Any]:
        """Writes tokens.json, the last file; returns its content."""
        description: dict[str, Any] = {
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer_sha256": self._sha256,
            "end_token": self.end[0] if self.end else None,
            "splits": self.splits,
            "test_bytes_per_token": test_bytes_per_token,
        }
        if self._answers["train"]:
            description["answers"] = self._answers
        # Last, and whole or not at all: until then the folder counts as none, whatever files it
        # holds.
        with writing(self._out / "tokens.json"):
            write_atomically(self._out / "tokens.json", json.dumps(description, indent=2) + "\n")
        return description


@file_errors("files that can be read, and a folder that can be written")
def tokenize_files(
    inputs: Sequence[Path],
    tokenizer_file: Path,
    out: Path,
    *,
    test_share: float = 0.01,
    end_token: str | None = None,
    shard_tokens: int = 2**27,
) -> dict[str, Any]:
    """Writes the tokens of UTF-8 files to `out`; returns the content of its tokens.json.

    The text is cut, at line ends if possible, into pieces of about a megabyte. Each piece is
    tokenized by itself, on all cores. tokens.json is written last.

    Args:
      test_share: share of the text, at its end, that becomes the test split.
      end_token: a token of the tokenizer to append to each file; None for no token.
      shard_tokens: approximate number of tokens per output file.

    Raises:
      DataError: a file cannot be read, the tokenizer file is invalid, the text is too short for two
        splits, or `out` holds tokens already.
      ValueError: `test_share` is out of its range, or the tokenizer has no such `end_token`.
      StorageError: `out` or a file in it cannot be written.
    """
    files = TokenFiles(
        inputs,
        tokenizer_file,
        out,
        test_share=test_share,
        end_token=end_token,
        shard_tokens=shard_tokens,
    )
    first_test_byte = int((1 - test_share) * sum(path.stat().st_size for path in inputs))
    position = test_bytes = 0
    pieces = _pieces(inputs, first_test_byte)
    for piece, ids in _tokenized(files.tokenizer, pieces, files.end):
        # A piece is in the split that its first byte is in.
        split = "train" if position < first_test_byte else "test"
        position += len(piece.encode())
        test_bytes += len(piece.encode()) if split == "test" else 0
        files.append(split, ids)
    # Without bytes the test split would be the end of a document alone, and have no bits per byte.
    if not test_bytes or not files.splits["train"]:
        raise DataError(
            f"{inputs[0]}{', ...' * (len(inputs) > 1)}: got {position:,} bytes of text, expected "
            "enough for two splits: take more text, or a larger test_share"
        )
    return files.describe(test_bytes / sum(files.splits["test"].values()))


def _tokenized(tokenizer, pieces, end):
    """Yields (piece, its ids), tokenizing several pieces at a time.

    A piece that is None marks the end of a file, and becomes "" with the ids `end`.
    """
    while some := list(itertools.islice(pieces, _PIECES)):
        texts = ["" if piece is None else piece for piece in some]
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        for piece, text, encoding in zip(some, texts, found, strict=True):
            yield text, end if piece is None else encoding.ids


def _pieces(inputs: Sequence[Path], first_test_byte: int) -> Iterator[str | None]:
    """Yields the pieces of one file after another, and None after each file.

    A piece of a single line is cut where the test split begins: pieces of a text without line ends
    may be longer than that split.
    """
    position = 0
    # A piece is 2 % of a small text at most, so that it can be split into training and test.
    size = min(_PIECE_BYTES, 1 + sum(path.stat().st_size for path in inputs) // 100)
    for path in inputs:
        try:
            # A character that is cut goes to the next piece.
            decode = codecs.getincrementaldecoder("utf-8")().decode
            with open(path, "rb") as file:
                # Up to a line end, but at most as much again, because a file may have no line ends.
                while content := file.read(size) + file.readline(size):
                    if piece := decode(content):
                        before = piece.encode()[: max(0, first_test_byte - position)]
                        position += len(piece.encode())
                        if before and position > first_test_byte and "\n" not in piece:
                            # Without the bytes of a character that is cut.
                            yield (head := before.decode(errors="ignore"))
                            piece = piece[len(head) :]
                        yield piece
            decode(b"", final=True)  # raises an error if the last character is cut
            yield None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: got bytes that are not UTF-8 ({error.reason})") from error
