"""Predicts memory and time of a config's training step under every strategy; trains nothing.

    python scripts/plan.py --config=configs/digits.py
    python scripts/plan.py --config=configs/cifar10_revnet110.py --topology=v5e:2x2 --plot=plan.png
    python scripts/plan.py --config=configs/lm_1b.py --topology=4xh100:8 --config.mesh.fsdp=8
    python scripts/plan.py --config=configs/lm_124m.py --topology=h100:1 --by_part
    python scripts/plan.py --config=configs/lm_1b.py --scaling=v5e:4x4,v5e:16x16,2xv5e:16x16

Compiles the real step for this machine, or for GPUs and TPUs that need not be present (extras
gpu_compiler and tpu of scripts/setup.sh). That takes seconds to minutes per strategy; the results
are cached in --cache_dir. docs/planning.md explains the columns.
"""

import json
import sys
from pathlib import Path

from absl import flags

from revnet_jax.config import ConfigError, cli, flatten
from revnet_jax.figures import load_figure_class, save
from revnet_jax.planning.compile import DEFAULT_CACHE_DIR, Compiler
from revnet_jax.planning.topology import parse_topology

CONFIG = cli.define_config_flag()
TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "What to compile for: local, h100:1, 4xh100:8, v5e:2x4, 4xv5e:16x16."
)
SCALING = flags.DEFINE_list(
    "scaling", None, "Topologies, the fewest devices first: compare one strategy on all of them."
)
STRATEGIES = flags.DEFINE_list("strategies", None, "Some of the rows, by name; all by default.")
LARGEST = flags.DEFINE_list("largest", [], "Also find the largest batch, depth, context that fit.")
BY_PART = flags.DEFINE_bool("by_part", False, "Also say which part of the model takes how long.")
CACHE_DIR = flags.DEFINE_string("cache_dir", str(DEFAULT_CACHE_DIR), "Folder of the answers.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
PLOT = flags.DEFINE_string("plot", "", "Also draw the memory into this PNG file.")


def main(argv):
    del argv
    # Imported after the flags are checked, because JAX takes seconds to import.
    from revnet_jax.planning import report as plan_report
    from revnet_jax.planning import scaling
    from revnet_jax.planning.plan import plan

    if SCALING.value and (TOPOLOGY.present or LARGEST.value or BY_PART.value):
        raise ConfigError(
            "got --scaling with --topology, --largest or --by_part, expected it alone: it names "
            "topologies"
        )
    names = SCALING.value or [TOPOLOGY.value]
    cache_dir = Path(CACHE_DIR.value).expanduser()
    # Progress goes to stderr: stdout has the table, or JSON alone.
    report = lambda line: print(line, file=sys.stderr, flush=True)
    # Names, and the picture's file, are checked before minutes of compiling.
    compilers = [Compiler(parse_topology(name), cache_dir, report) for name in names]
    figure_class = load_figure_class("plot", PLOT.value) if PLOT.value else None
    config, strategies = flatten(CONFIG.value), STRATEGIES.value
    if SCALING.value:
        table, draw = scaling.scaling_table, scaling.draw_scaling
        found = scaling.scaling(config, compilers, strategies=strategies)
    else:
        table, draw = plan_report.plan_table, plan_report.draw_plan
        options = {"largest": LARGEST.value, "by_part": BY_PART.value}
        found = plan(config, compilers[0], strategies=strategies, **options)
    print(json.dumps(found, indent=2) if JSON.value else table(found))
    if figure_class:
        save(draw(found, figure_class), PLOT.value)


if __name__ == "__main__":
    cli.run(main, required=("config",))
