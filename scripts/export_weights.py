"""Writes a checkpoint as a published model (Llama, Qwen, GPT-2, ViT); prints JSON.

    python scripts/export_weights.py --workdir=WORKDIR --target=DIR

The settings of the run say which family it is. Only a network of one stream has a published
counterpart (config.model.reversible=False), and one that BDIA has trained (integrator=bdia).
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import real

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
TARGET = flags.DEFINE_string("target", "", "A new folder, for config.json and safetensors files.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "The dtype of the files.")
WHICH = cli.define_checkpoint_flag()
SHARD = flags.DEFINE_float("shard_gib", 5.0, "GiB of a file; larger models get several files.")
cli.limit(SHARD, real("(0, 1e6]"))


def main(argv):
    del argv
    import jax

    jax.config.update("jax_platforms", "cpu")  # a device may have less memory than the host
    from revnet_jax.pretrained.exporting import export_weights

    report = export_weights(
        Path(WORKDIR.value),
        Path(TARGET.value),
        dtype=DTYPE.value,
        which=WHICH.value,
        shard_bytes=int(SHARD.value * 2**30),
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    cli.run(main, required=("workdir", "target"))
