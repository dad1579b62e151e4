"""Formats the benchmark's rows as Markdown tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revnet_jax.tables import either, markdown

MIB, GIB = 2**20, 2**30
BenchmarkRow = dict[str, Any]
NOTES = """\
time, cpu: wall and processor time of a step, medians of ratios within a turn; flops: of matrix
products and convolutions; step: arguments, results and temporaries as compiled; temporaries: of \
these;
RSS: growth of the process in the first step; device: the device's peak; gradient error: relative \
L2,
first step; gradient noise: the same between two runs of that step; mismatches: elements of the \
rebuilt
input that differ, all steps"""


def as_tables(rows: Sequence[BenchmarkRow]) -> str:
    """Markdown tables: the comparison, then the limits; either is left out if it has no rows."""
    compared = [row for row in rows if "axis" not in row]
    limits = [row for row in rows if "axis" in row]
    parts = []
    if compared:
        parts += [_table(COLUMNS, compared, _baselines(compared)), NOTES]
    if limits:
        parts.append(_table(LIMIT_COLUMNS, limits, {}))
    return "\n\n".join(parts)


def draw_benchmark(rows: Sequence[BenchmarkRow], figure_class: Any) -> Any:
    """Plots time beside memory, a group of bars per model and size; limits below, in log scale."""
    compared = [row for row in rows if "axis" not in row]
    # Rows of deterministic kernels are there for their gradients rather than their times.
    compared = [row for row in compared if not row.get("deterministic")] or compared
    limits = [row for row in rows if "axis" in row]
    figure = figure_class(figsize=(9, 3.2 + (2.8 if limits else 0)), layout="constrained")
    axes = figure.subplots(2 if limits else 1, 2, squeeze=False)
    timed = [row for row in compared if row.get("step_ms")]
    _bars(axes[0, 0], timed, lambda row: row.get("time_vs_store"), "time of a step, store = 1")
    _bars(axes[0, 1], compared, lambda row: row["temporary_bytes"] / MIB, "temporaries, MiB")
    axes[0, 1].set_yscale("log")
    if limits:
        label = "largest that fits"
        _bars(axes[1, 0], limits, lambda row: row["largest"], label, ("model", "dtype", "axis"))
        axes[1, 0].set_yscale("log")
        speed = lambda row: row["examples_per_second"]
        _bars(axes[1, 1], limits, speed, "a second, at the limit", ("model", "dtype", "axis"))
        axes[1, 1].set_yscale("log")
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
    return figure


def _bars(axis, rows, value, label, keys=("model", "dtype", "layers", "batch")):
    groups = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    width = 0.8 / max(1, len(strategies))
    for i, strategy in enumerate(strategies):
        mine = [row for row in rows if row["strategy"] == strategy]
        places = [groups.index(tuple(row[key] for key in keys)) + i * width for row in mine]
        axis.bar(places, [value(row) or 0 for row in mine], width, label=strategy)
    middle = 0.4 - width / 2
    names = [f"{group[0]}\n{group[1]}\n{' x '.join(map(str, group[2:]))}" for group in groups]
    axis.set_xticks([i + middle for i in range(len(groups))], names, fontsize=8)
    axis.set_ylabel(label)
    axis.grid(axis="y", alpha=0.3)


def _baselines(rows):
    """The row of `store` at each size."""
    return {_size(row): row for row in rows if row["strategy"] == "store"}


def _size(row):
    # Rows of deterministic kernels are compared with a `store` of such kernels.
    return *(row[key] for key in ("model", "dtype", "layers", "batch")), row.get("deterministic")


def _number(key, form, scale=1.0):
    return lambda row, store: either(row.get(key), lambda value: form.format(value / scale))


def _flops(row, store):
    return either(store, lambda store: f"{row['flops'] / store['flops']:.3f}")


def _deterministic(row, store):
    return "yes" if row.get("deterministic") else "-"


def _text(key):
    return lambda row, store: str(row[key])


COLUMNS = {
    "model": _text("model"),
    "dtype": _text("dtype"),
    "layers": _text("layers"),
    "batch": _text("batch"),
    "strategy": _text("strategy"),
    "ms / step": _number("step_ms", "{:.1f}"),
    "time / store": _number("time_vs_store", "{:.3f}"),
    "time / remat": _number("time_vs_remat", "{:.3f}"),
    "time / twin": _number("time_vs_twin", "{:.3f}"),
    "cpu / store": _number("cpu_vs_store", "{:.3f}"),
    "flops / store": _flops,
    "step, MiB": _number("step_bytes", "{:,.1f}", MIB),
    "temporaries, MiB": _number("temporary_bytes", "{:,.1f}", MIB),
    "RSS, MiB": _number("rss_bytes", "{:,.0f}", MIB),
    "device, MiB": _number("device_bytes", "{:,.0f}", MIB),
    "deterministic": _deterministic,
    "gradient error": _number("gradient_error", "{:.1e}"),
    "gradient noise": _number("gradient_noise", "{:.1e}"),
    "mismatches": _number("mismatches", "{:.0f}"),
    "turns": _text("turns"),
}
LIMIT_COLUMNS = {
    "model": _text("model"),
    "dtype": _text("dtype"),
    "axis": _text("axis"),
    "strategy": _text("strategy"),
    "largest": lambda row, store: f"{row['largest']:,}" + " or more" * (not row.get("exact", True)),
    "layers": _text("layers"),
    "batch": _text("batch"),
    "step, GiB": _number("step_bytes", "{:.2f}", GIB),
    "of, GiB": _number("limit_bytes", "{:.2f}", GIB),
    "deterministic": _deterministic,
    "a second": lambda row, store: (
        _number("examples_per_second", "{:,.1f}")(row, store) + " " + row["unit"]
    ),
}


def _table(columns, rows, baselines):
    lines = [[cell(row, baselines.get(_size(row))) for cell in columns.values()] for row in rows]
    # Leave out columns in which nothing was measured.
    kept = [i for i in range(len(columns)) if any(line[i] != "-" for line in lines)]
    cells = [[line[i] for i in kept] for line in [list(columns), *lines]]
    return "\n".join(markdown(cells, text_columns=("model", "dtype", "strategy", "axis")))


def as_sentence(row: dict[str, Any]) -> str:
    """The result of `benchmark.pipeline.feed` as a sentence."""
    return (
        f"The pipeline prepares {row['pipeline_per_second']:,.0f} {row['unit']} a second on this "
        f"host, by {row['num_threads']} threads; a step takes {row['step_per_second']:,.0f}: "
        f"{row['times_the_need']:.3g} times what is needed."
    )
