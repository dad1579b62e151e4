"""Compiles programs of the benchmark for an H100 that need not be there: a program of its own.

    python -m tests.benchmark.compile_suite FIRST LAST   # which of the suite's settings

Prints a line of JSON for each strategy of each: its name, seconds, and its error or None.
"""

import functools
import json
import runpy
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from revnet_jax.benchmark import models as benchmark_models
from revnet_jax.benchmark.suites import suites
from revnet_jax.planning.topology import parse_topology, topology_devices
from revnet_jax.training.compiler import exact_jit

CONFIGS = Path(__file__).parents[2] / "configs"


def small(setting):
    """Fewer layers and examples: the kernels of a chain are one loop, whatever its length."""
    layers = 9 if setting.model.name == "revnet" else 8  # reverse+8 stores no more
    return setting._replace(layers=layers, batch=setting.batch // 64 or 1)


def main(first, last):
    targets = topology_devices(parse_topology("h100:1"))
    mesh = Mesh(np.array(targets), ("data",))
    place = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        tree,
    )
    # On the machine with the GPU both would say so.
    jax.default_backend = lambda: "gpu"
    benchmark_models.exact_jit = functools.partial(exact_jit, platform="gpu")
    names = "cifar10_revnet110.py", "lm_124m.py"
    suite = suites(*(runpy.run_path(str(CONFIGS / n))["get_config"]() for n in names))["gpu"]
    for setting in map(small, suite.settings[first:last]):
        model, layers, batch, strategies, *_ = setting
        for strategy in strategies:
            started, error = time.monotonic(), None
            try:
                program = model.program(strategy, layers, batch)
                program.step.lower(*place(jax.eval_shape(program.init))).compile()
            except Exception as caught:
                error = f"{type(caught).__name__}: {str(caught)[:500]}"
            seconds = round(time.monotonic() - started, 1)
            name = f"{model.name}/{model.dtype}/{strategy}"
            print(json.dumps({"program": name, "seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
