"""Says what a config's training step needs of memory and time, in every strategy; trains nothing.

    python scripts/plan.py --config=configs/digits.py
    python scripts/plan.py --config=configs/cifar10_revnet110.py --topology=v5e:2x2 --plot=plan.png

Compiles the real step for this machine, or for TPUs that need not be here (scripts/setup.sh tpu).
That takes seconds to minutes a strategy; the answers are kept in --cache_dir.
"""

import json
import sys
from pathlib import Path

from absl import flags

from revnet_jax import config as configs
from revnet_jax.figures import load_figure_class
from revnet_jax.memory.compile import DEFAULT_CACHE_DIR, Compiler
from revnet_jax.memory.topology import parse_topology
from revnet_jax.memory.units import size

CONFIG = configs.define_config_flag()
TOPOLOGY = flags.DEFINE_string("topology", "local", "What to compile for: local, v5e:2x4, ...")
STRATEGIES = flags.DEFINE_list("strategies", None, "Some of the rows, by name; all by default.")
LARGEST = flags.DEFINE_bool("largest", False, "Also find the largest batch and depth that fit.")
CACHE_DIR = flags.DEFINE_string("cache_dir", str(DEFAULT_CACHE_DIR), "Folder of the answers.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
PLOT = flags.DEFINE_string("plot", None, "Also draw the memory into this PNG file.")

GIB = 2**30
PARTS = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "gradient_bytes": "gradients",
    "activation_bytes": "activations",
}


def main(argv):
    del argv
    from revnet_jax.memory.plan import plan

    topology = parse_topology(TOPOLOGY.value)
    figure_class = load_figure_class("plot", PLOT.value) if PLOT.value else None
    cache_dir = Path(CACHE_DIR.value).expanduser()
    report = plan(
        configs.flatten(CONFIG.value),
        Compiler(topology, cache_dir, report=lambda line: print(line, file=sys.stderr, flush=True)),
        strategies=STRATEGIES.value,
        largest=LARGEST.value,
    )
    print(json.dumps(report, indent=2) if JSON.value else as_table(report))
    if figure_class:
        draw(report, figure_class).savefig(PLOT.value, dpi=100)


def as_table(report):
    """A Markdown table with the plan's settings above it, and the recommendation below."""
    limit = report["limit_bytes"]
    room = f"{size(limit)} each" if limit else "of unknown memory"
    lines = [
        f"{report['topology']}: {report['devices']} x {report['device_kind']}, {room}; "
        f"{report['layers']} units, batch {report['batch_size']}",
        "",
    ]
    header = [
        "strategy",
        "fits",
        "peak",
        *PARTS.values(),
        "GFLOP",
        "moved",
        "ms at least",
        "MFU, %",
    ]
    if any("largest_batch" in row for row in report["rows"]):
        header += ["largest batch", "largest depth"]
    cells = [header, ["---", *["---:"] * (len(header) - 1)]]
    cells += [_cells(row, len(header)) for row in report["rows"]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *padded])} |")
    lines += [
        f"{row['strategy']}: {row['error']}" for row in report["rows"] if row["error"] is not None
    ]
    found = report["recommendation"]
    lines += [
        "",
        "of one device and step; gradients: at most; activations: all the rest; ms: a lower",
        "bound by roofline; MFU: the share of it that store's arithmetic takes at the chip's peak",
        "",
        f"take {found['strategy'] or 'none'}: {found['reason']}",
    ]
    return "\n".join(lines)


def _cells(row, length):
    if row["error"] is not None:
        return [row["strategy"], *["-"] * (length - 1)]
    either = lambda value, text: "-" if value is None else text(value)
    cells = [row["strategy"], "yes" if row["fits"] else "no"]
    cells += [either(row[name], size) for name in ("needed_bytes", *PARTS)]
    cells += [f"{row['flops'] / 1e9:,.4g}", either(row["hbm_bytes"], size)]
    cells += [either(row["least_ms"], lambda ms: f"{ms:.3g}")]
    cells += [either(row["utilization"], lambda share: f"{100 * share:.0f}")]
    return cells + [
        _largest_cell(row[name]) for name in ("largest_batch", "largest_depth") if name in row
    ]


def _largest_cell(found):
    if found["size"] is None:
        return "none"
    return f"{found['size']:,}" if found["exact"] else f"{found['size']:,} or more"


def draw(report, figure_class):
    """A bar per strategy, made of what the memory holds, and a line where it ends."""
    rows = [row for row in report["rows"] if row["error"] is None][::-1]  # the first on top
    rows = [row for row in rows if row["needed_bytes"] is not None]
    figure = figure_class(figsize=(8, 0.45 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for name, label in PARTS.items():
        widths = [row[name] / GIB for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [row["strategy"] for row in rows])
    limit = report["limit_bytes"]
    if limit and max(left, default=0) > limit / GIB / 4:  # else it would hide the bars
        axes.axvline(limit / GIB, color="black", linestyle="--", label="all there is")
    axes.set_xlabel(
        f"memory of one {report['device_kind']}, GiB; {report['topology']}, "
        f"batch {report['batch_size']}"
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


if __name__ == "__main__":
    configs.run(main, required=("config",))
