"""Compiles a decoder's training step at several depths for an H200, which need not be present.

    scripts/setup.sh dev,gpu_compiler
    .venv/bin/python docs/figures/compile_depths.py

Writes docs/results/depth_lm_124m_h200.jsonl, from which docs/figures/draw.py draws memory and time
against depth: for each depth and strategy a row of the planner, with the time that all kernels of
a step are predicted to take. About ten minutes on two cores.
"""

import datetime
import itertools
import json
import pathlib
import runpy
import sys

import jax

from revnet_jax.config import flatten
from revnet_jax.config.experiments import locate
from revnet_jax.planning.compile import DEFAULT_CACHE_DIR, Compiler
from revnet_jax.planning.plan import plan
from revnet_jax.planning.topology import parse_topology

ROWS = pathlib.Path(__file__).parents[1] / "results" / "depth_lm_124m_h200.jsonl"
DEPTHS = 6, 12, 24, 48
STRATEGIES = "store", "remat", "reverse"
IN_LOOPS = "remat", "reverse"  # under `store` a loop copies what its layers keep into stacks
TOPOLOGY = "h200:1"
BATCH = 64


def row_of(depth: int, strategy: str, compiler: Compiler) -> dict:
    """The planner's row of `depth` layers under a strategy; sizes in bytes, times in ms."""
    config = runpy.run_path(locate("lm_124m"))["get_config"]()
    config.batch_size = config.eval_batch_size = BATCH
    config.model.layers = depth
    config.model.unroll = 1 if strategy in IN_LOOPS else depth
    report = plan(flatten(config), compiler, strategies=[strategy], by_part=True)
    (row,) = report["rows"]
    (total,) = [part["ms"] for part in row.pop("parts") if part["part"] == "all"]
    return {
        "model": "lm_124m",
        "layers": depth,
        "unroll": config.model.unroll,
        "batch": BATCH,
        "tokens": BATCH * config.data.context,
        "topology": report["topology"],
        "limit_bytes": report["limit_bytes"],
        **row,
        "kernels_ms": total,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": "docs/figures/compile_depths.py",
    }


def main():
    cache_dir = DEFAULT_CACHE_DIR.expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    report = lambda line: print(line, file=sys.stderr, flush=True)
    compiler = Compiler(parse_topology(TOPOLOGY), cache_dir, report)
    with ROWS.open("w") as file:
        for depth, strategy in itertools.product(DEPTHS, STRATEGIES):
            print(json.dumps(row_of(depth, strategy, compiler)), file=file, flush=True)


if __name__ == "__main__":
    main()
