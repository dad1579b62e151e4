"""Draws memory over a forward and a backward pass under each strategy; trains nothing.

    python scripts/timeline.py --config=configs/digits.py --out=timeline.png
    python scripts/timeline.py --config=configs/cifar10_revnet38.py --layers=8 --out=FILE.png --json
    python scripts/timeline.py --config=configs/lm_124m.py --topology=h100:1 --out=FILE.png

Compiles the gradient of the config's loss with --layers layers in each chain, and follows the
buffers of the compiled program. Prints the peaks beside the compiler's own figures.
"""

import json
import os

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import whole
from revnet_jax.figures import load_figure_class, save
from revnet_jax.planning.topology import (
    LOCAL,
    Topology,
    TopologyError,
    parse_topology,
    topology_devices,
)

CONFIG = cli.define_config_flag()
LAYERS = flags.DEFINE_integer("layers", 4, "In each chain.")
cli.limit(LAYERS, whole(3, 100_000))
STRATEGIES = flags.DEFINE_list("strategies", [], "Some of them; by default the basic three.")
TOPOLOGY = flags.DEFINE_string("topology", LOCAL, "What to compile for: local, or a GPU as h100:1.")
OUT = flags.DEFINE_string("out", "", "The PNG file to draw into.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")


def one_device(name: str) -> Topology:
    """Parses the name of one GPU, or of this machine: the TPU compiler reports no buffers."""
    topology = parse_topology(name)
    if name != LOCAL and not (topology.is_gpu and topology.num_devices == 1):
        raise TopologyError(f"got topology {name!r}, expected {LOCAL} or one GPU, as h100:1")
    return topology


def main(argv):
    del argv
    figure_class = load_figure_class("out", OUT.value)
    topology = one_device(TOPOLOGY.value)
    if topology.is_gpu:  # else JAX finds this machine's devices as usual
        os.environ.update(topology.environment)
        # If the config file has imported JAX, the variable comes too late: set the option as well.
        import jax

        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    from revnet_jax.planning import timeline

    config = CONFIG.value
    device = topology_devices(topology)[0]
    shape = "x".join(map(str, timeline.batch_shape(config, device)))
    title = f"{config.model.family}, {LAYERS.value} layers a chain, batch {shape}"
    title += f", {device.device_kind}" if topology.is_gpu else ""
    lines = timeline.timelines(config, LAYERS.value, STRATEGIES.value, device)
    report = {"title": title, "timelines": timeline.timeline_report(lines)}
    print(json.dumps(report, indent=2) if JSON.value else timeline.timeline_table(lines))
    save(timeline.draw_timelines(lines, title, figure_class), OUT.value, dpi=120)


if __name__ == "__main__":
    cli.run(main, required=("config", "out"))
