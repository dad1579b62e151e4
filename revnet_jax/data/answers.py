"""Prompts with their answers as shards of tokens, where only the answers are trained on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from revnet_jax.data.dataset import DataError, file_errors
from revnet_jax.data.shards import TokenFiles

_EXPECTED = 'expected a line such as {"prompt": "...", "answer": "..."}'
_LINES = 1024  # lines per call of the tokenizer, which works on them in parallel


class Example(NamedTuple):
    """A line of the input: what the model is given, and what it should write then."""

    prompt: str
    answer: str


@file_errors("files that can be read, and a folder that can be written")
def tokenize_answers(
    inputs: Sequence[Path],
    tokenizer_file: Path,
    out: Path,
    *,
    end_token: str | None,
    test_share: float = 0.01,
    shard_tokens: int = 2**27,
) -> dict[str, Any]:
    """Writes the tokens of prompts and answers to `out`; returns the content of its tokens.json.

    A document is a prompt, its answer and the end token. The answer and the end token are trained
    on: beside each file of tokens lies one that has a byte per token, 1 if it is trained on, else
    0. Prompt and answer are tokenized each by itself, because generation begins with the tokens of
    a prompt alone.

    Args:
      inputs: files of JSON lines, objects with the strings "prompt" and "answer". The answer must
        not be empty. Other keys are ignored.
      end_token: a token of the tokenizer, which ends each answer.
      test_share: share of the lines, the last ones, that become the test split; at least one line.
      shard_tokens: approximate number of tokens per output file.

    Raises:
      DataError: a file cannot be read, a line is not as expected, there are fewer than two lines,
        or as `TokenFiles` does. Nothing has been written then.
      ValueError: there is no `end_token`, or as `TokenFiles` does.
    """
    if end_token is None:
        raise ValueError(
            "got no end_token with answers, expected a token that ends them: without one a model "
            "does not learn to stop"
        )
    # Lines are read twice: here for their number, which the split needs, and so that mistakes are
    # found before anything is written.
    lines = sum(1 for _ in read_examples(inputs))
    if lines < 2:
        raise DataError(
            f"got {lines} lines in {', '.join(map(str, inputs))}, expected two at least, one of "
            "them for the test split"
        )
    files = TokenFiles(
        inputs,
        tokenizer_file,
        out,
        test_share=test_share,
        end_token=end_token,
        shard_tokens=shard_tokens,
    )
    # The last lines are the test split; each split has one line at least.
    train_lines = lines - min(lines - 1, max(1, round(test_share * lines)))
    test_bytes = test_trained = 0
    # One iterator for both splits: the second slice goes on where the first has ended.
    examples = read_examples(inputs)
    for split, left in (("train", train_lines), ("test", lines - train_lines)):
        of_split = itertools.islice(examples, left)
        while some := list(itertools.islice(of_split, _LINES)):
            ids, is_answer = _tokenized(some, files)
            files.append(split, ids, is_answer)
            if split == "test":
                # End tokens are trained on, so they count as tokens, although they have no bytes.
                test_bytes += sum(len(example.answer.encode()) for example in some)
                test_trained += sum(is_answer)
    return files.describe(test_bytes / test_trained)


def read_examples(inputs: Sequence[Path]) -> Iterator[Example]:
    """Yields the lines of files. Raises DataError, which names file and line, for any other."""
    for path in inputs:
        if not path.is_file():
            raise DataError(f"{path}: no such file; {_EXPECTED}")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield _example(line)
                # RecursionError: deeply nested brackets.
                except (ValueError, RecursionError) as error:
                    problem = " ".join(str(error).split())[:200]
                    raise DataError(f"{path}, line {number}: {problem}; {_EXPECTED}") from error


def _example(line: bytes) -> Example:
    """Raises ValueError unless the line is that of an example."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"got bytes that are not UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"got {line.decode()[:40]!r}, which is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"got {line.decode()[:40]!r}, which is no object")
    for name in Example._fields:
        if not isinstance(found.get(name), str):
            got = f"{name} {str(found[name])[:40]!r}, no string" if name in found else f"no {name}"
            raise ValueError(f"got {got}")
        found[name].encode()  # fails for half of a surrogate pair, which is no character
    if not found["answer"]:
        raise ValueError("got an empty answer")
    return Example(found["prompt"], found["answer"])


def _tokenized(examples: Sequence[Example], files: TokenFiles) -> tuple[list[int], list[bool]]:
    """(the ids of the documents of these examples, whether each is part of an answer)."""
    # Prompts and answers by turns, so that one call tokenizes all of them in parallel.
    texts = [text for example in examples for text in example]
    found = files.tokenizer.encode_batch(texts, add_special_tokens=False)
    ids, is_answer = [], []
    for prompt, answer in zip(found[::2], found[1::2], strict=True):
        ends = [*answer.ids, *files.end]
        ids += [*prompt.ids, *ends]
        is_answer += [False] * len(prompt.ids) + [True] * len(ends)
    return ids, is_answer
