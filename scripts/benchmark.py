"""Measures a training step under every strategy: time, memory, and whether the gradient is right.

    python scripts/benchmark.py --plot=benchmark.png                 # two cores, under 10 minutes
    python scripts/benchmark.py --models=mlp --strategies=store,reverse --seconds=20
    python scripts/benchmark.py --suite=gpu --jsonl=benchmark.jsonl  # one GPU, under 8 minutes

    python scripts/benchmark.py --config=FILE --config.data.dir=DIR  # a pipeline, on one host

`laptop` compares the time of a step, strategies taking turns; `gpu` also finds the largest batch
and depth that each strategy survives. With a config, measures how fast this host prepares batches,
next to how fast its devices train on them. Prints a Markdown table; --json prints JSON lines
instead.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from absl import flags

from revnet_jax import config as configs
from revnet_jax.figures import load_figure_class

CONFIG = configs.define_config_flag()
SUITE = flags.DEFINE_enum("suite", "laptop", ["laptop", "gpu"], "What is measured.")
MODELS = flags.DEFINE_list("models", None, "Some of the suite's models, by name; all by default.")
STRATEGIES = flags.DEFINE_list("strategies", None, "Some strategies, by name; all by default.")
LAYERS = flags.DEFINE_list("layers", None, "Other numbers of layers than the suite's.")
BATCH = flags.DEFINE_list("batch", None, "Other batch sizes than the suite's.")
SECONDS = flags.DEFINE_float("seconds", None, "For each model and size, instead of the suite's.")
LIMIT_GIB = flags.DEFINE_float("limit_gib", None, "Pretend that the device has this much memory.")
JSON = flags.DEFINE_bool("json", False, "Print JSON lines rather than tables.")
JSONL = flags.DEFINE_string("jsonl", None, "Also append the JSON lines to this file, row by row.")
PLOT = flags.DEFINE_string("plot", None, "Also draw time and memory into this PNG file.")

CIFAR_CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_revnet110.py"


def main(argv):
    del argv
    figure_class = load_figure_class("plot", PLOT.value) if PLOT.value else None
    import jax

    from revnet_jax.memory import benchmark_report as report
    from revnet_jax.memory.benchmark_pipeline import feed
    from revnet_jax.memory.benchmark_suites import run, select, suites

    if CONFIG.value is not None:
        for_suites = (SUITE, MODELS, STRATEGIES, LAYERS, BATCH, LIMIT_GIB, JSONL, PLOT)
        if given := [f"--{flag.name}" for flag in for_suites if flag.present]:
            raise configs.ConfigError(f"got {', '.join(given)} with --config, expected one of both")
        row = feed(CONFIG.value, 10.0 if SECONDS.value is None else SECONDS.value)
        print(json.dumps(row) if JSON.value else report.as_sentence(row))
        return
    config = runpy.run_path(str(CIFAR_CONFIG))["get_config"]()
    suite = select(
        suites(config)[SUITE.value],
        models=MODELS.value,
        strategies=STRATEGIES.value,
        layers=whole_numbers("layers", LAYERS.value),
        batch=whole_numbers("batch", BATCH.value),
        seconds=SECONDS.value,
    )
    limit_bytes = None if LIMIT_GIB.value is None else int(LIMIT_GIB.value * 2**30)
    common = {
        "suite": SUITE.value,
        "jax": jax.__version__,
        "device": describe_device(jax.devices()[0]),
        "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
    }
    rows = []
    for row in run(suite, limit_bytes=limit_bytes):
        rows.append(row)
        line = json.dumps(row | common)
        if JSONL.value:
            with open(JSONL.value, "a") as file:
                file.write(line + "\n")
        if JSON.value:
            print(line, flush=True)
    if not JSON.value:
        print(report.as_tables(rows))
    if figure_class:
        report.draw(rows, figure_class).savefig(PLOT.value, dpi=100)


def whole_numbers(name, texts):
    """The numbers of a flag that is a list; None where it is not given."""
    if texts is None:
        return None
    if not all(text.isdecimal() and int(text) for text in texts):
        raise configs.ConfigError(f"got --{name}={','.join(texts)}, expected numbers from 1")
    return [int(text) for text in texts]


def describe_device(device):
    """'2 CPU cores', or an accelerator's name."""
    return f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind


if __name__ == "__main__":
    configs.run(main, required=())
