"""Measures time, memory and exact gradients of a training step under every strategy.

    python scripts/benchmark.py --plot=benchmark.png                 # two cores, under 10 minutes
    python scripts/benchmark.py --models=mlp --strategies=store,reverse --seconds=20
    python scripts/benchmark.py --suite=gpu --jsonl=benchmark.jsonl  # one GPU, under 5 minutes
    python scripts/benchmark.py --suite=gpu --minutes=40             # with largest batches, depths
    python scripts/benchmark.py --suite=exact                        # its gradients alone

    python scripts/benchmark.py --config=FILE --config.data.dir=DIR  # a pipeline, on one host

The `laptop` suite compares step times; strategies take turns. The `gpu` suite first checks that
every model's rebuilt inputs and gradients are exact, by deterministic kernels (the `exact` suite;
--deterministic=false takes the fastest), then compares time and memory, then finds the largest
batch and depth that each strategy can train, all within --minutes. With --config, the script
measures how fast this host prepares batches and how fast its devices train on them. Prints a
Markdown table; --json prints JSON lines instead.
"""

import json
import os
import re
import runpy
import sys

from absl import flags

from revnet_jax.config import ConfigError, cli
from revnet_jax.config.experiments import locate
from revnet_jax.config.ranges import real
from revnet_jax.errors import UserError, writing
from revnet_jax.figures import load_figure_class, save

CONFIG = cli.define_config_flag()
SUITE = flags.DEFINE_enum("suite", "laptop", ["laptop", "exact", "gpu"], "What is measured.")
MODELS = flags.DEFINE_list("models", None, "Some of the suite's models, by name; all by default.")
STRATEGIES = flags.DEFINE_list("strategies", None, "Some strategies, by name; all by default.")
LAYERS = flags.DEFINE_list("layers", None, "Other numbers of layers than the suite's.")
BATCH = flags.DEFINE_list("batch", None, "Other batch sizes than the suite's.")
SECONDS = flags.DEFINE_float("seconds", None, "For each model and size, instead of the suite's.")
LIMIT_GIB = flags.DEFINE_float("limit_gib", None, "Pretend that the device has this much memory.")
MINUTES = flags.DEFINE_float(
    "minutes", None, "Skip what may take longer than is left; gpu: 5 by default, laptop: no end."
)
cli.limit(SECONDS, real("[0, inf)"))
cli.limit(LIMIT_GIB, real("(0, 1e6]"))
cli.limit(MINUTES, real("[0, inf)"))
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", None, "Kernels of a GPU that sum in a fixed order; by default as the suite."
)
JSON = flags.DEFINE_bool("json", False, "Print JSON lines rather than tables.")
JSONL = flags.DEFINE_string("jsonl", None, "Also append the JSON lines to this file, row by row.")
PLOT = flags.DEFINE_string("plot", "", "Also draw time and memory into this PNG file.")

# The configs that suites measure, in the order of the arguments of `suites`.
MEASURED = "cifar10_revnet110", "lm_124m"


def main(argv):
    del argv
    # Files are checked now: a suite takes minutes, and its results would be lost.
    figure_class = load_figure_class("plot", PLOT.value) if PLOT.value else None
    if JSONL.value:
        cli.check_output("jsonl", JSONL.value)
    # Imported after the flags are checked, because JAX takes seconds to import.
    import jax

    from revnet_jax.benchmark import report
    from revnet_jax.benchmark.pipeline import feed
    from revnet_jax.benchmark.suites import run_suite, select, suites
    from revnet_jax.devices import describe_device

    if CONFIG.value is not None:
        # These would be ignored here, so they are refused.
        for_suites = (SUITE, MODELS, STRATEGIES, LAYERS, BATCH, LIMIT_GIB, MINUTES, DETERMINISTIC)
        for_suites += (JSONL, PLOT)
        if given := [f"--{flag.name}" for flag in for_suites if flag.present]:
            raise ConfigError(f"got {', '.join(given)} with --config, expected one of both")
        row = feed(CONFIG.value, 10.0 if SECONDS.value is None else SECONDS.value)
        print(json.dumps(row) if JSON.value else report.as_sentence(row))
        return
    measured_configs = [runpy.run_path(locate(name))["get_config"]() for name in MEASURED]
    suite = select(
        suites(*measured_configs)[SUITE.value],
        models=MODELS.value,
        strategies=STRATEGIES.value,
        layers=whole_numbers("layers", LAYERS.value),
        batch=whole_numbers("batch", BATCH.value),
        seconds=SECONDS.value,
        deterministic=DETERMINISTIC.value,
    )
    limit_bytes = None if LIMIT_GIB.value is None else int(LIMIT_GIB.value * 2**30)
    # In each row, so that a file with rows of many runs says how each was made.
    common = {
        "suite": SUITE.value,
        "jax": jax.__version__,
        "device": describe_device(jax.devices()[0]),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
    }
    rows = []
    if JSONL.value:
        append(JSONL.value, "")  # fails before anything is measured
    for row in run_suite(suite, limit_bytes=limit_bytes, minutes=MINUTES.value):
        rows.append(row)
        line = json.dumps(row | common)
        if JSONL.value:
            # At once: a run that is stopped keeps the rows it has.
            append(JSONL.value, line + "\n")
        if JSON.value:
            print(line, flush=True)
    measured = [row for row in rows if "error" not in row]
    if not JSON.value:
        print(report.as_tables(measured))
    if figure_class:
        save(report.draw_benchmark(measured, figure_class), PLOT.value)
    if len(measured) < len(rows):
        # After what was measured has been printed: the exit status tells of the rest.
        raise UserError(f"{len(rows) - len(measured)} of {len(rows)} rows failed, as told above")


def append(path, text):
    """Appends text to a file."""
    with writing(path), open(path, "a") as file:
        file.write(text)


def whole_numbers(name, texts):
    """The numbers of a list flag; None if the flag is not given."""
    if texts is None:
        return None
    # Six digits at most: larger numbers would fail in the compiler, with its error.
    if not all(re.fullmatch("[0-9]{1,6}", text) and int(text) for text in texts):
        raise ConfigError(f"got --{name}={','.join(texts)}, expected numbers from 1 to 999,999")
    return [int(text) for text in texts]


if __name__ == "__main__":
    cli.run(main, required=())
