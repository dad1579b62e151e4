"""Restores a run's checkpoint and evaluates it on the test split, as training does; prints JSON.

    python scripts/evaluate.py --workdir=/tmp/digits

Changes nothing in the run's folder, so that the run may still be training. With several hosts,
start it on each of them, like train.py.
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax.config import cli

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
WHICH = cli.define_checkpoint_flag()
PROCESSES = cli.define_process_flags()
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data are, if not where they were.")


def main(argv):
    del argv
    from revnet_jax.training import distributed
    from revnet_jax.training.restore import evaluate_run

    # Joins the other hosts before anything asks JAX for its devices.
    distributed.start(**PROCESSES())
    # An error on one host ends all: the others would wait for it in a collective.
    with distributed.shared_fate():
        report = evaluate_run(Path(WORKDIR.value), WHICH.value, DATA_DIR.value)
    if distributed.is_first():
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    cli.run(main, required=("workdir",))
