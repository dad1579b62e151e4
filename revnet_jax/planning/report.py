"""Formats plans as tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnet_jax.planning.largest import SIZES
from revnet_jax.planning.units import size
from revnet_jax.tables import either, markdown

GIB = 2**30
PARTS = {
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer",
    "gradient_bytes": "gradients",
    "activation_bytes": "activations",
}

_GPU_MEMORY = "memory of a GPU: the share that JAX takes; XLA_CLIENT_MEM_FRACTION=0.9 takes more"


def milliseconds(value: float | None) -> str:
    return either(value, lambda ms: f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}")


def plan_table(report: Mapping[str, Any]) -> str:
    """A Markdown table with the plan's settings above it and the recommendation below."""
    limit = report["limit_bytes"]
    room = f"{size(limit)} each" if limit else "of unknown memory"
    units = "" if report["layers"] is None else f"{report['layers']} units, "
    lines = [
        f"{report['topology']}: {report['devices']} x {report['device_kind']}, {room}; "
        f"{units}batch {report['batch_size']}",
        "",
    ]
    is_gpu = report["device_kind"].startswith("NVIDIA")
    names = ("by NVLink", "between hosts") if is_gpu else ("sent", "by DCN")
    networks = dict(zip(("ici_bytes", "dcn_bytes"), names, strict=True))
    # A network has a column only if something crosses it.
    networks = {key: n for key, n in networks.items() if any(r.get(key) for r in report["rows"])}
    header = ["strategy", "fits", "peak", *PARTS.values(), "GFLOP", "moved", *networks.values()]
    header += ["ms at least", "ms in turn", "MFU at most, %"]
    header += [
        f"largest {name}"
        for name in SIZES
        if any(f"largest_{name}" in row for row in report["rows"])
    ]
    lines += markdown([header, *(_cells(row, networks, len(header)) for row in report["rows"])])
    lines += [
        f"{row['strategy']}: {row['error']}" for row in report["rows"] if row["error"] is not None
    ]
    found = report["recommendation"]
    parts = {row["strategy"]: row["parts"] for row in report["rows"] if row.get("parts")}
    lines += [
        "",
        "of one device and step; gradients: at most; activations: all the rest; ms by roofline:",
        "a lower bound, and what is sent after what is computed; MFU at most: the time that",
        "store's arithmetic would take at the chip's peak, as a share of ms at least",
        *[_GPU_MEMORY] * is_gpu,
        "",
        f"take {found['strategy'] or 'none'}: {found['reason']}",
        *(line for name, rows in parts.items() for line in _by_part(name, rows)),
    ]
    return "\n".join(lines)


def _by_part(strategy, rows):
    header = ["part", "ms", "GFLOP", "moved", "kernels", "slowest kernels, ms"]
    cells = [
        [
            row["part"],
            f"{row['ms']:.2f}",
            f"{row['flops'] / 1e9:,.4g}",
            size(row["hbm_bytes"]),
            f"{row['kernels']:,}",
            "; ".join(f"{name} {ms:.2f}" for name, ms in row["slowest"].items()),
        ]
        for row in rows
    ]
    return [
        "",
        f"{strategy}, predicted, kernels in turn, without what is sent:",
        "",
        *markdown([header, *cells]),
    ]


def _cells(row, networks, length):
    if row["error"] is not None:
        return [row["strategy"], *["-"] * (length - 1)]
    cells = [row["strategy"], "yes" if row["fits"] else "no"]
    cells += [either(row[name], size) for name in ("needed_bytes", *PARTS)]
    cells += [f"{row['flops'] / 1e9:,.4g}", either(row["hbm_bytes"], size)]
    cells += [either(row[name], lambda sent: size(sum(sent.values()))) for name in networks]
    cells += [milliseconds(row[name]) for name in ("least_ms", "in_turn_ms")]
    cells += [either(row["utilization"], lambda share: f"{100 * share:.0f}")]
    searched = [row[f"largest_{name}"] for name in SIZES if f"largest_{name}" in row]
    return cells + [_largest_cell(found) for found in searched]


def _largest_cell(found):
    if found["size"] is None:
        return "none" if found["exact"] else "none of those tried"
    # Not exact: the search ended before the next size was compiled.
    return f"{found['size']:,}" if found["exact"] else f"{found['size']:,} or more"


def draw_plan(report: Mapping[str, Any], figure_class: Any) -> Any:
    """Plots a stacked bar of memory per strategy, and a line at the device's limit."""
    rows = [row for row in report["rows"] if row["error"] is None][::-1]  # the first on top
    # Programs that the compiler refused may lack a figure.
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
    # A limit far beyond the bars would make them too short to read.
    if limit and max(left, default=0) > limit / GIB / 4:
        axes.axvline(limit / GIB, color="black", linestyle="--", label="all there is")
    axes.set_xlabel(
        f"memory of one {report['device_kind']}, GiB; {report['topology']}, "
        f"batch {report['batch_size']}"
    )
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure
