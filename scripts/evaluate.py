"""Restores a run and evaluates it on the test split, as the run itself does; prints JSON.

    python scripts/evaluate.py --workdir=/tmp/digits

Changes nothing in the run's folder, which may be one that is still training.
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax import config as configs

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
WHICH = flags.DEFINE_enum("checkpoint", "newest", ["newest", "best"], "Which checkpoint.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data are, if not where they were.")


def main(argv):
    del argv
    from revnet_jax.training.restore import evaluate_run

    print(json.dumps(evaluate_run(Path(WORKDIR.value), WHICH.value, DATA_DIR.value), indent=2))


if __name__ == "__main__":
    configs.run(main, required=("workdir",))
