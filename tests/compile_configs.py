"""Compiles a step of experiments for a chip that need not be there: a program of its own.

    python -m tests.compile_configs TOPOLOGY NAME/DTYPE/BACKPROP ...

Prints a line of JSON for each: its name, the seconds that it took, and its error or None. Compilers
read their settings from the environment, once: see `Topology.environment`.
"""

import json
import runpy
import sys
import time
from pathlib import Path

from revnet_jax.planning.topology import parse_topology, topology_devices
from revnet_jax.training.program import step_program

CONFIGS = Path(__file__).parents[1] / "configs"


def small(config):
    """The same kernels in fewer layers: those of a chain are one loop, whatever its length."""
    if "units" in config.model:
        config.model.units = (3,) * len(config.model.units)  # a transition and a chain of two
    else:
        config.model.layers = 2
    return config


def lower(name, targets):
    experiment, dtype, backprop = name.split("/")
    config = small(runpy.run_path(str(CONFIGS / f"{experiment}.py"))["get_config"]())
    config.batch_size = config.eval_batch_size = 2 * len(targets)
    config.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    config.model.update({"compute_dtype": dtype, "backprop": backprop})
    program = step_program(config, targets)
    return program.step.lower(program.state, program.batch)


def main(topology, names):
    targets = topology_devices(parse_topology(topology))
    compiled = set()
    for name in names:
        started, error = time.monotonic(), None
        try:
            lowered = lower(name, targets)
            text = lowered.as_text()
            if text not in compiled:  # ResNet-110 is ResNet-32 when both are as small
                lowered.compile()
                compiled.add(text)
        except Exception as caught:
            error = f"{type(caught).__name__}: {str(caught)[:500]}"
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"program": name, "seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
