"""Draws memory through a forward and a backward pass, under each strategy; trains nothing.

    python scripts/timeline.py --config=configs/digits.py --out=timeline.png
    python scripts/timeline.py --config=configs/cifar10_revnet38.py --layers=8 --out=FILE.png --json

Compiles the gradient of the config's network with --layers layers in each chain, and follows the
compiled program buffer by buffer. Prints the peaks beside the compiler's own figures.
"""

import json

from absl import flags

from revnet_jax import config as configs
from revnet_jax.figures import load_figure_class

CONFIG = configs.define_config_flag()
LAYERS = flags.DEFINE_integer("layers", 4, "In each chain.", lower_bound=3)
STRATEGIES = flags.DEFINE_list("strategies", [], "Some of them; by default the basic three.")
OUT = flags.DEFINE_string("out", None, "The PNG file to draw into.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")


def main(argv):
    del argv
    figure_class = load_figure_class("out", OUT.value)
    from revnet_jax.memory import timeline
    from revnet_jax.training.build import build_task

    config = CONFIG.value
    lines = timeline.timelines(config, LAYERS.value, STRATEGIES.value)
    shapes = build_task(config).batch_shapes(config.batch_size).values()
    shape = "x".join(map(str, next(iter(shapes)).shape))
    title = f"{config.model.family}, {LAYERS.value} layers a chain, batch {shape}"
    timeline.draw(lines, title, figure_class).savefig(OUT.value, dpi=120)
    report = {"title": title, "timelines": timeline.as_report(lines)}
    print(json.dumps(report, indent=2) if JSON.value else timeline.as_table(lines))


if __name__ == "__main__":
    configs.run(main, required=("config", "out"))
