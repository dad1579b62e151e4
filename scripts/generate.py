"""Generates text with a trained language model, and prints it as it is generated.

python scripts/generate.py --workdir=WORKDIR --prompt='The for statement'
"""

from pathlib import Path

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import real, whole

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
PROMPT = flags.DEFINE_string("prompt", "\n", "What to go on from.")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 400, "How many tokens to write.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Less is likelier; 0 takes the likeliest.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the likeliest tokens of this share.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
cli.limit(NUM_TOKENS, whole(0))
cli.limit(TEMPERATURE, real("[0, inf)"))
cli.limit(TOP_P, real("(0, 1]"))
cli.limit(SEED, whole(0, 2**32 - 1))
WHICH = cli.define_checkpoint_flag()
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Tokenizer file, for a model of its tokens.")


def main(argv):
    del argv
    from revnet_jax.training.generate import generate_text

    pieces = generate_text(
        Path(WORKDIR.value),
        PROMPT.value,
        num_tokens=NUM_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        which=WHICH.value,
        tokenizer=Path(TOKENIZER.value) if TOKENIZER.value else None,
    )
    first = next(pieces, "")  # invalid arguments raise here, before the prompt is printed
    print(PROMPT.value, end=first, flush=True)
    # Flushed one by one: stdout would otherwise hold them back until a line ends.
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
