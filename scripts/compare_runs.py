r"""Compares runs: final metrics of each config, with mean and spread over its seeds.

    python scripts/compare_runs.py runs/sweep
    python scripts/compare_runs.py runs/a runs/b --metrics=eval_loss --out=curves.png

The arguments are workdirs, or folders of workdirs. Runs that differ only in their seed share a row,
and the first columns are the settings that differ between rows. A sweep is a loop over flags:

    for lr in 0.05 0.1; do for seed in 0 1 2; do
      scripts/train.sh --config=configs/digits.py --workdir=runs/sweep/$lr-$seed \
        --config.schedule.learning_rate=$lr --config.seed=$seed
    done; done
"""

import json
import sys

from absl import flags

from revnet_jax.config import cli
from revnet_jax.errors import UserError
from revnet_jax.figures import load_figure_class, save
from revnet_jax.runs import comparison as runs

METRICS = flags.DEFINE_list("metrics", None, "Which; by default train_loss and those of tests.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
OUT = flags.DEFINE_string("out", "", "Also draw the metrics over steps into this PNG file.")


def main(argv):
    if not argv[1:]:
        raise UserError("got no run, expected workdirs, or a folder of them: see --help")
    figure_class = load_figure_class("out", OUT.value) if OUT.value else None
    # What is left out is told on stderr: stdout has the table, or JSON alone.
    found = runs.find_runs(argv[1:], lambda line: print(line, file=sys.stderr))
    metrics, groups = runs.chosen_metrics(found, METRICS.value), runs.grouped(found)
    rows = runs.compare_runs(groups, metrics)
    print(json.dumps(rows, indent=2) if JSON.value else runs.runs_table(rows, metrics))
    if figure_class:
        save(runs.draw_runs(groups, metrics, figure_class), OUT.value)


if __name__ == "__main__":
    cli.run(main, required=(), arguments=True)
