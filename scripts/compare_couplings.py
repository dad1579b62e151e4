"""Compares couplings: trains a small network with each one, at equal numbers of parameters.

    python scripts/compare_couplings.py --plot=couplings.png
    python scripts/compare_couplings.py --couplings=additive,affine --seeds=5 --json
    python scripts/compare_couplings.py --data=cifar10 --dir=DIR --num_steps=1000

Prints a table of test accuracy, time, memory and exactness. Takes about 10 minutes on two cores.
"""

import json
import sys

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import whole
from revnet_jax.figures import load_figure_class, save
from revnet_jax.tables import either, markdown

SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each, with seeds 0, 1, ...")
cli.limit(SEEDS, whole(1, 10_000))
DATA = flags.DEFINE_enum("data", "digits", ["digits", "cifar10"], "What is learnt.")
DIR = flags.DEFINE_string("dir", None, "The folder with the files; digits need none.")
NUM_STEPS = flags.DEFINE_integer("num_steps", 200, "Updates of each run.")
cli.limit(NUM_STEPS, whole(1))
COUPLINGS = flags.DEFINE_list("couplings", None, "Some of the rows, by name; all by default.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
PLOT = flags.DEFINE_string("plot", "", "Also draw accuracy and memory into this PNG file.")

# Couplings are compared at equal size: the share by which parameters may differ.
PARAMETER_TOLERANCE = 0.02
MIB = 2**20


def main(argv):
    del argv
    figure_class = load_figure_class("plot", PLOT.value) if PLOT.value else None
    # Imported after the flags are checked, because JAX takes seconds to import.
    import jax

    from revnet_jax.couplings.comparison import compare_couplings
    from revnet_jax.couplings.rows import ROWS
    from revnet_jax.devices import describe_device

    report = {
        "command": " ".join(["scripts/compare_couplings.py", *sys.argv[1:]]),
        "jax": jax.__version__,
        "device": describe_device(jax.devices()[0]),
        **compare_couplings(
            tuple(ROWS) if COUPLINGS.value is None else COUPLINGS.value,
            data=DATA.value,
            dir=DIR.value,
            seeds=SEEDS.value,
            num_steps=NUM_STEPS.value,
        ),
    }
    print(json.dumps(report, indent=2) if JSON.value else as_table(report))
    if figure_class:
        save(draw(report, figure_class), PLOT.value)


def as_table(report):
    """A Markdown table, with the settings above it and the shape of each row's network below."""
    spread, rows = report["parameter_spread"], report["rows"]
    equal = "within" if spread <= PARAMETER_TOLERANCE else "NOT within"
    lines = [
        f"{report['data']}: {report['seeds']} seeds, {report['num_steps']} steps of "
        f"{report['batch_size']} images, {report['channels']} channels, "
        f"{report['num_branches']} branches",
        f"parameters differ by {100 * spread:.2f} %, {equal} {100 * PARAMETER_TOLERANCE:.0f} %",
        "",
    ]
    header = ["coupling", "parameters", "test accuracy, %", "ms / step", "reverse, MiB"]
    header += ["store, MiB", "residue, bits", "mismatches"]
    lines += markdown([header, *map(_cells, rows)])
    lines += [
        "",
        "accuracy: mean +- standard deviation over seeds; ms / step: median, rows taking turns;",
        "MiB: temporary memory of the compiled gradient; residue: per element of the streams, a "
        "layer",
        "",
    ]
    width = max(len(row["coupling"]) for row in rows)
    for row in rows:
        shape = f"{row['layers']} layers, hidden width {row['hidden']}"
        lines.append(f"{row['coupling']:{width}}  {shape}: {row['note']}")
    return "\n".join(lines)


def _cells(row):
    memory = row["temporary_bytes"]
    # A single seed has no deviation.
    std = "" if row["accuracy_std"] is None else f" +- {100 * row['accuracy_std']:.1f}"
    return [
        row["coupling"],
        f"{row['num_params']:,}",
        f"{100 * row['accuracy_mean']:.1f}{std}",
        f"{row['median_step_ms']:.0f}",
        either(memory["reverse"], lambda n: f"{n / MIB:.1f}"),
        f"{memory['store'] / MIB:.1f}",
        either(row["residue_bits_per_element"], lambda bits: f"{bits:g}"),
        either(row["mismatches"], str),
    ]


def draw(report, figure_class):
    """Plots accuracy (a dot per seed, a line at the mean) beside memory under each strategy."""
    rows = report["rows"][::-1]  # the first on top
    figure = figure_class(figsize=(9, 0.45 * len(rows) + 1.6), layout="constrained")
    accuracy, memory = figure.subplots(1, 2, sharey=True)
    for i, row in enumerate(rows):
        percent = [100 * a for a in row["accuracies"]]
        accuracy.plot(percent, [i] * len(percent), "o", color="tab:blue", alpha=0.5)
        accuracy.plot(100 * row["accuracy_mean"], i, "|", color="black", markersize=18)
        for strategy, offset, color in (("store", 0.2, "0.7"), ("reverse", -0.2, "tab:blue")):
            temporary_bytes = row["temporary_bytes"][strategy]
            # The legend lists a label as often as it is given: one row gives it.
            label = strategy if i == len(rows) - 1 else None
            # A coupling without an inverse has no bar for `reverse`, and a text says so.
            width = (temporary_bytes or 0) / MIB
            memory.barh(i + offset, width, 0.38, color=color, label=label)
            text = f" {width:.1f}" if temporary_bytes else " no inverse"
            memory.text(width, i + offset, text, va="center", fontsize=8)
    accuracy.set_yticks(range(len(rows)), [row["coupling"].replace("_", " ") for row in rows])
    accuracy.set_xlabel(f"test accuracy, % (a dot per seed, mean), {report['data']}")
    accuracy.grid(axis="x", alpha=0.3)
    memory.set_xlabel(f"temporary memory of the gradient, MiB, batch {report['batch_size']}")
    memory.margins(x=0.15)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


if __name__ == "__main__":
    cli.run(main, required=())
