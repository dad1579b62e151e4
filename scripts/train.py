"""Trains a model, or goes on with a run that was interrupted.

    python scripts/train.py --config=configs/digits.py --workdir=/tmp/digits

Every setting is a flag: --config.model.backprop=store. Prints summary.json at the end.
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax import config as configs

CONFIG = configs.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print the config; train nothing.")


def main(argv):
    del argv
    # After the flags are parsed: JAX takes seconds to import, a misspelt flag should not.
    from revnet_jax.training.dry_run import dry_run
    from revnet_jax.training.loop import train

    if DRY_RUN.value:
        report = dry_run(CONFIG.value)
    elif WORKDIR.value is None:
        raise configs.ConfigError("--workdir is missing: name the folder of the run")
    else:
        report = train(CONFIG.value, Path(WORKDIR.value))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    configs.run(main, required=("config",))
