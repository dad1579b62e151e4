"""Trains a model, or goes on with a run that was interrupted (resumes it).

    python scripts/train.py --config=configs/digits.py --workdir=/tmp/digits

Every setting is a flag: --config.model.backprop=store. Prints summary.json at the end.

On several hosts, start it once on each, with the same flags. On Cloud TPU, under Slurm and the like
JAX finds the other processes. Elsewhere, give the address of the first process, the number of
processes, and the id of this one; --workdir is a folder that all of them share:

    python scripts/train.py ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

Exit status: 0 finished; 75 preempted (SIGTERM) after saving a checkpoint, start it again; 1 an
error, explained in one line; 134 another process died without an error, start all of them again.
"""

import json
import signal
import sys
from pathlib import Path

from absl import flags

from revnet_jax.config import ConfigError, cli
from revnet_jax.config.ranges import whole
from revnet_jax.errors import PREEMPTED_STATUS

CONFIG = cli.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command resumes it.")
PROCESSES = cli.define_process_flags()
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and print the config; train nothing.")
NUM_DEVICES = flags.DEFINE_integer(
    "num_devices",
    None,
    "With --dry_run: check config.mesh too, as on this number of devices of all hosts.",
)
cli.limit(NUM_DEVICES, whole(1))
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "With --num_devices: TPU slices they are in.")
cli.limit(NUM_SLICES, whole(1))
PLATFORM = flags.DEFINE_enum(
    "platform", None, ["cpu", "gpu", "tpu"], "With --num_devices: what they are."
)


def main(argv):
    del argv
    # Before training starts there is nothing to save: exit at once. The run then replaces this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED_STATUS))
    # Imported after the flags are parsed: a misspelt flag should fail at once, and JAX takes
    # seconds to import.
    from revnet_jax.training import distributed
    from revnet_jax.training.dry_run import dry_run
    from revnet_jax.training.loop import train

    elsewhere = (NUM_DEVICES, NUM_SLICES, PLATFORM)
    if not DRY_RUN.value and any(flag.present for flag in elsewhere):
        raise ConfigError(
            "got --num_devices, --num_slices or --platform without --dry_run, expected none of "
            "them: a run takes the devices that are there"
        )
    if NUM_DEVICES.value is None and NUM_SLICES.present:
        raise ConfigError("got --num_slices alone, expected --num_devices with it")
    if DRY_RUN.value:
        report = dry_run(CONFIG.value, NUM_DEVICES.value, NUM_SLICES.value, PLATFORM.value)
    elif not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the folder of the run")
    elif "://" in WORKDIR.value:
        raise ConfigError(
            f"got --workdir={WORKDIR.value}, expected a folder: one of the bucket, mounted"
        )
    else:
        # Before anything asks JAX for its devices, which fixes the number of processes.
        distributed.start(**PROCESSES())
        # An error on one host ends all: the others would wait for it in a collective.
        with distributed.shared_fate():
            report = train(CONFIG.value, Path(WORKDIR.value))
    # The first process has the summary; the others return nothing.
    if report:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    cli.run(main, required=("config",))
