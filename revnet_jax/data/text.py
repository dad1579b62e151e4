"""Text as token ids: the bytes or characters of a file, or memory-mapped shards."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from revnet_jax.data.dataset import DataError, file_errors, read_file
from revnet_jax.data.pipeline import LAST_STEP, NumpyBatch, check_threads, iterate, rows_of
from revnet_jax.data.shards import WRITTEN, Shards, load_shards
from revnet_jax.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Text:
    """The token ids of a text, in a training and a test split.

    Attributes:
      train: the tokens, 1-D, of unsigned integers.
      test: likewise; the end of the text.
      bytes_per_token: average UTF-8 bytes per token of the test split; with weights, of the tokens
        of weight 1.
      sha256: of the text file, or of tokens.json.
      train_weight: of each token of `train` as a target in the loss, 0 or 1; None if all count
        alike.
      test_weight: likewise, in evaluation.

    Raises DataError unless there are as many weights as tokens.
    """

    train: np.ndarray | Shards
    test: np.ndarray | Shards
    vocabulary: Vocabulary
    bytes_per_token: float
    sha256: str
    train_weight: np.ndarray | Shards | None = None
    test_weight: np.ndarray | Shards | None = None

    def __post_init__(self):
        for tokens in (self.train, self.test):
            if isinstance(tokens, np.ndarray) and not np.issubdtype(tokens.dtype, np.integer):
                raise DataError(f"got tokens of dtype {tokens.dtype}, expected whole numbers")
        for tokens, weights in ((self.train, self.train_weight), (self.test, self.test_weight)):
            if weights is not None and len(weights) != len(tokens):
                raise DataError(
                    f"got {len(weights):,} weights for {len(tokens):,} tokens, expected one each"
                )


_SOME = 2**20  # weights that are read at a time

TEXT_NAMES = ("bytes", "characters", "shards")
NEEDS_PATH = {
    "characters": "the path of a text file",
    "shards": "the folder that tokenize_text.py wrote",
}


@file_errors("a text that can be read")
def load_text(name: str, *, path: str = "", train_share: float = 0.9) -> Text:
    """Reads a text, and checks everything that can be checked before training starts.

    Args:
      name: "bytes" (of any file; without a path, of the English text that comes with Python,
        `pydoc_data/topics.py`, which differs between its versions), "characters" (of a UTF-8 file;
        ids in order of code points) or "shards" (a folder that `scripts/tokenize_text.py` wrote).
      path: the file or folder.
      train_share: share of the text, from its start, that becomes the training split. Not used for
        shards, which are split already.

    Raises DataError for files that are missing or damaged, ValueError for other mistakes.
    """
    if not 0 < train_share < 1:
        raise ValueError(f"got train_share={train_share}, expected a share in (0, 1)")
    if name in NEEDS_PATH and not path:
        raise ValueError(f"got no dir for {name}, expected {NEEDS_PATH[name]}")
    if name == "shards":
        found = load_shards(Path(path))
        return Text(
            found.train,
            found.test,
            found.vocabulary,
            found.bytes_per_token,
            _sha256(read_file(Path(path) / "tokens.json", WRITTEN)),
            found.train_weight,
            found.test_weight,
        )
    if name not in ("bytes", "characters"):
        raise ValueError(f"got name={name!r}, expected one of {', '.join(TEXT_NAMES)}")
    file = Path(path) if path else _embedded()
    content = read_file(file, "a text file")
    if not content:
        raise DataError(f"{file}: got an empty file, expected a text")
    if name == "bytes":
        tokens = np.frombuffer(content, np.uint8)
        # A prompt with other bytes is refused, since the model has not seen them.
        seen = bytes(np.unique(tokens[: int(train_share * len(tokens))]).tolist())
        # Latin-1 makes byte i the character i.
        vocabulary = Vocabulary("bytes", 256, seen.decode("latin-1"))
    else:
        try:
            decoded = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: got bytes that are not UTF-8 ({error.reason} at {error.start}), expected "
                "characters: take data.name=bytes"
            ) from error
        # UTF-32 has one number for each character. `unique` sorts them, and numbers them from 0.
        points = np.frombuffer(decoded.encode("utf-32-le"), np.uint32)
        known, tokens = np.unique(points, return_inverse=True)
        tokens = tokens.astype(np.uint32)
        vocabulary = Vocabulary("characters", len(known), "".join(map(chr, known)))
    split = int(train_share * len(tokens))
    test = tokens[split:]
    per_token = 1.0
    if name == "characters" and len(test):
        lengths = np.asarray([len(character.encode()) for character in vocabulary.characters])
        per_token = float(np.mean(lengths[test]))
    return Text(tokens[:split], test, vocabulary, per_token, _sha256(content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _embedded() -> Path:
    """The path of a text that comes with CPython: half a megabyte of English prose about Python."""
    # The package first: `find_spec` of a submodule raises an error if there is no such package.
    found = importlib.util.find_spec("pydoc_data")
    spec = importlib.util.find_spec("pydoc_data.topics") if found else None
    if spec is None or spec.origin is None:
        raise DataError("this Python comes without pydoc_data.topics: give config.data.dir")
    return Path(spec.origin)


def train_windows(
    text: Text,
    *,
    context: int,
    batch_size: int,
    seed: int,
    start_step: int,
    num_threads: int,
    prefetch: int,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[NumpyBatch]:
    """Returns an endless iterator over random windows of the training split; `close()` it.

    Stateless: a batch is a function of the seed and the step.

    Args:
      context: tokens per window.
      rows: which rows of each global batch to produce; all by default.

    Yields {"token": int32 [b, context], "target": int32 [b, context], the next token of each}, and
    "weight", float32 [b, context], of each target if the text has weights. Their mean over the
    global batch is 1, or 0 if all of its targets have weight 0: see `Task.batch_shapes`.

    Raises ValueError for a text that is not longer than the context.
    """
    rows = rows_of(batch_size, rows)
    check_threads(num_threads, prefetch)
    if seed < 0:
        raise ValueError(f"got seed={seed}, expected 0 or more")
    # A window ends one token before the last, which is a target.
    places = len(text.train) - context
    if context < 1 or places < 1:
        raise ValueError(
            f"got context={context} for {len(text.train):,} tokens of training text, expected 1 to "
            f"{max(0, len(text.train) - 1):,}: take a shorter context or a longer text"
        )

    def make_batch(step: int) -> NumpyBatch:
        # Every process draws the starts of the whole global batch, then reads its own rows.
        starts_B = np.random.default_rng([seed, step]).integers(places, size=batch_size)
        places_BT = starts_B[:, None] + np.arange(context + 1)  # [B, T + 1]: with the last target
        batch = _checked(text.train[places_BT[rows]], text)
        if text.train_weight is None:
            return batch
        return {**batch, "weight": _with_mean_one(text.train_weight[places_BT[:, 1:]])[rows]}

    batches = grain.MapDataset.range(start_step, LAST_STEP).map(make_batch)
    return iterate(batches, num_threads, prefetch)


def eval_windows(
    text: Text,
    *,
    context: int,
    batch_size: int,
    max_windows: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[NumpyBatch]:
    """Returns an iterator over non-overlapping windows of the test split; `close()` it after use.

    Args:
      max_windows: number of windows to stop after; 0 for all, so that every token but the first is
        a target once.

    Yields batches as `train_windows`, with "weight", float32 [b, context]: 0 for padding.
    Raises ValueError if there is nothing to evaluate: too few tokens, or all of weight 0.
    """
    rows = rows_of(batch_size, rows)
    targets = len(text.test) - 1
    if targets < 1:
        raise ValueError(f"got {len(text.test)} tokens of test text, expected two or more")
    if max_windows < 0:
        raise ValueError(f"got max_windows={max_windows}, expected 0 (all) or more")
    num_windows = -(-targets // context)
    num_windows = min(num_windows, max_windows or num_windows)
    _check_some_weight(text.test_weight, min(targets, num_windows * context))

    def make_batch(step: int) -> NumpyBatch:
        windows_B = step * batch_size + rows
        # The last target of a window is the first token of the next one.
        places = windows_B[:, None] * context + np.arange(context + 1)
        # Behind the end of the text the last token stands for the padding.
        there = np.minimum(places, targets)
        batch = _checked(text.test[there], text)
        # The last window may be too long, and the last batch may have rows without a window.
        counts = (places[:, 1:] <= targets) & (windows_B < num_windows)[:, None]
        weight = counts.astype(np.float32)
        if text.test_weight is not None:
            weight *= text.test_weight[there[:, 1:]]
        return {**batch, "weight": weight}

    num_batches = -(-num_windows // batch_size)
    return iterate(grain.MapDataset.range(num_batches).map(make_batch), num_threads, prefetch)


def _check_some_weight(weights: np.ndarray | Shards | None, targets: int) -> None:
    """Raises ValueError if all evaluated targets, those after the first token, have weight 0."""
    # Otherwise the mean loss would be 0 / 0, found at the first evaluation.
    if weights is None:
        return
    starts = range(1, targets + 1, _SOME)  # reads no further than the first that counts
    if not any(weights[np.arange(i, min(i + _SOME, targets + 1))].any() for i in starts):
        raise ValueError(
            f"got weight 0 for all {targets:,} evaluated tokens, expected an answer among them: "
            "evaluate more of the test split (data.eval_batches), or take a larger one"
        )


def _with_mean_one(weights: np.ndarray) -> np.ndarray:
    """Scales weights of 0 and 1 to a mean of 1, in float32; all zeros stay as they are."""
    # On the host, where every process reads the weights of the global batch, because devices would
    # need one more collective operation at the start of each step.
    weights = weights.astype(np.float64)
    return (weights / (weights.mean() or 1)).astype(np.float32)


def _checked(windows: np.ndarray, text: Text) -> NumpyBatch:
    least, largest, size = int(windows.min()), int(windows.max()), text.vocabulary.size
    # Before the cast to int32, in which an id from 2**31 on would be negative.
    if least < 0 or largest >= size:
        raise DataError(
            f"got token id {least if least < 0 else largest}, expected 0 to {size - 1}, the ids of "
            "the vocabulary: shards were made with another tokenizer than tokens.json names"
        )
    windows = windows.astype(np.int32)
    return {"token": windows[:, :-1], "target": windows[:, 1:]}
