"""Tokenizes text into shards of token ids, for training with --config.data.name=shards.

    python scripts/tokenize_text.py --input=a.txt,b.txt --tokenizer=tokenizer.json --out=DIR
    python scripts/tokenize_text.py --answers --input=a.jsonl --tokenizer=tokenizer.json \\
        --end_token='<|endoftext|>' --out=DIR

With --answers an input has a line {"prompt": "...", "answer": "..."} for each document, and the
loss counts the tokens of answers and the end token after them.

The tokenizer is a file of the `tokenizers` library (scripts/setup.sh text).
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax.config import cli, settings
from revnet_jax.config.ranges import real

INPUT = flags.DEFINE_list("input", [], "UTF-8 files, one after the other.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "The tokenizer's file.")
OUT = flags.DEFINE_string("out", "", "A folder for the shards.")
TEST_SHARE = flags.DEFINE_float(
    "test_share", 0.01, "Of the text (with --answers: the lines), at its end, for the test split."
)
cli.limit(TEST_SHARE, real("(0, 1)"))
END_TOKEN = flags.DEFINE_string(
    "end_token", None, "To be put after each file (with --answers: each line): <|endoftext|>."
)
ANSWERS = flags.DEFINE_bool("answers", False, "Read prompts and answers; train on answers only.")


def main(argv):
    del argv
    from revnet_jax.data.answers import tokenize_answers
    from revnet_jax.data.shards import tokenize_files

    tokenize = tokenize_answers if ANSWERS.value else tokenize_files
    inputs = [Path(name) for name in INPUT.value]
    # Makes a ValueError, as of an unknown end token, an error of one line.
    with settings("data"):
        written = tokenize(
            inputs,
            Path(TOKENIZER.value),
            Path(OUT.value),
            test_share=TEST_SHARE.value,
            end_token=END_TOKEN.value,
        )
    print(json.dumps(written, indent=2))


if __name__ == "__main__":
    cli.run(main, required=("input", "tokenizer", "out"))
