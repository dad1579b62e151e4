"""Imports the weights of a published model as a run (Llama, Qwen, GPT-2, ViT); prints JSON.

    python scripts/import_weights.py --source=DIR --workdir=WORKDIR

DIR holds config.json, safetensors files and perhaps tokenizer.json. WORKDIR is then like the folder
of a run: evaluate.py, generate.py and --config.init_from take it (scripts/setup.sh pretrained).
"""

import json
import sys
from pathlib import Path

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import whole

SOURCE = flags.DEFINE_string("source", "", "Folder of the published model.")
WORKDIR = flags.DEFINE_string("workdir", "", "A new folder, for config.json and a checkpoint.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "The dtype of kernels, embeddings and arithmetic."
)
CONTEXT = flags.DEFINE_integer(
    "context", 0, "Tokens of a sequence of a decoder, at most the model's own; 0: 1024 at most."
)
CLASSES = flags.DEFINE_integer(
    "num_classes", 0, "Classes of a new head of a classifier; 0: the published head."
)
cli.limit(CONTEXT, whole(0))
cli.limit(CLASSES, whole(0))


def main(argv):
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")  # a device may have less memory than the host
    from revnet_jax.pretrained.importing import import_weights

    report = import_weights(
        Path(SOURCE.value),
        Path(WORKDIR.value),
        dtype=DTYPE.value,
        context=CONTEXT.value,
        num_classes=CLASSES.value,
    )
    # No error: token ids suffice to train and to evaluate.
    if report.get("tokenizer") is False:
        print(
            f"note: {SOURCE.value} has no tokenizer.json: generate.py cannot turn text into tokens "
            f"with {WORKDIR.value}",
            file=sys.stderr,
        )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    cli.run(main, required=("source", "workdir"))
