"""Draws the figures of the README and of the pages, from rows that are committed beside them.

    scripts/setup.sh plots
    .venv/bin/python docs/figures/draw.py

- depth.svg: memory and time of a step against depth, from docs/results/depth_lm_124m_h200.jsonl
  (docs/figures/compile_depths.py makes it) and the measurements in lm_124m_h200.jsonl.
- exactness.svg: the error of the gradient against depth, from what
  notebooks/03_is_the_gradient_right.ipynb printed.

Colours are of middle brightness and the background is transparent, so that a figure can be read on
white and on black. Each file names the digest of the rows that it was drawn from.
"""

import hashlib
import json
import pathlib
import re

from matplotlib import rc_context
from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER.parent / "results"
NOTEBOOK = FOLDER.parents[1] / "notebooks" / "03_is_the_gradient_right.ipynb"
GREY = "#7d8590"
COLOURS = {"store": "#e5534b", "remat": "#c69026", "reverse": "#3d8bfd"}
STYLE = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": GREY,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": GREY,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "svg.hashsalt": "revnet_jax",  # the same rows give the same file
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


def rows_of_depths() -> dict[str, list]:
    """{"compiled": the planner's rows, "measured": rows of the same programs on an H200}."""
    read = lambda name: [json.loads(row) for row in (RESULTS / name).read_text().splitlines()]
    compiled = read("depth_lm_124m_h200.jsonl")
    batch = compiled[0]["batch"]
    measured = [
        {**row, "strategy": row["strategy"].removesuffix("/unroll")}
        for row in read("lm_124m_h200.jsonl")
        if row.get("strategy") in ("reverse", "store/unroll")
        and (row["commit"], row["batch"]) == ("dacb7f3", batch)
    ]
    return {"compiled": compiled, "measured": measured}


def rows_of_errors() -> list[tuple[str, str, int, float]]:
    """(dtype of branches, streams, layers, relative error of the gradient), from the notebook."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    pattern = r"^(float32|bfloat16) +(free floats|on the grid) +(\d+) +(\S+) +\d+ of \d+$"
    found = re.findall(pattern, printed, re.MULTILINE)
    return [(dtype, streams, int(layers), float(error)) for dtype, streams, layers, error in found]


def draw_depth(rows: dict[str, list]) -> Figure:
    """Memory and time of a step against depth, one line for each strategy."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for strategy, colour in COLOURS.items():
        line = [row for row in rows["compiled"] if row["strategy"] == strategy]
        gib = [(row["layers"], row["needed_bytes"] / 2**30) for row in line]
        seconds = [(row["layers"], row["kernels_ms"] / 1e3) for row in line if row["fits"]]
        for axes, points in ((memory, gib), (time, seconds)):
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5)
        _label(memory, gib[-1], f"{strategy}\n{gib[-1][1]:.0f} GiB", colour)
        apart = {"remat": -6, "reverse": 6}  # their lines end at almost the same point
        _label(time, seconds[-1], strategy, colour, apart.get(strategy, 0))
    marks = {"marker": "D", "s": 36, "facecolors": "none", "edgecolors": GREY, "zorder": 3}
    for i, row in enumerate(rows["measured"]):
        label = None if i else "measured on an H200"
        memory.scatter(row["layers"], row["device_gib"], label=label, **marks)
        time.scatter(row["layers"], row["step_ms"] / 1e3, **marks)
    memory.set(title="memory of a training step, GiB", ylim=(0, 75))
    time.set(title="time of a training step, s", ylim=(0, 0.65))
    for axes in (memory, time):
        axes.set(xlabel="layers", xlim=(0, 50))
        axes.set_xticks(sorted({row["layers"] for row in rows["compiled"]}))
        axes.grid(axis="y", alpha=0.25)
    memory.legend(loc="upper left", bbox_to_anchor=(0, 0.94), handletextpad=0.2)
    return figure


def _label(axes, point, text, colour, up=0):
    """Writes beside the last point of a line."""
    style = {"color": colour, "va": "center", "textcoords": "offset points"}  # outside of the grid
    axes.annotate(text, point, (9, up), **style)


def draw_errors(rows: list[tuple[str, str, int, float]]) -> Figure:
    """Relative error of the gradient against depth, on a logarithmic axis with a place for 0."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    zero = 1e-9
    for dtype, style in (("bfloat16", "o-"), ("float32", "s--")):
        for streams, colour in (("free floats", "store"), ("on the grid", "reverse")):
            line = [row[2:] for row in rows if row[:2] == (dtype, streams)]
            layers, errors = zip(*line, strict=True)
            drawn = [max(error, zero) for error in errors]
            axes.plot(layers, drawn, style, color=COLOURS[colour], markersize=4)
            if streams == "free floats":
                _label(
                    axes,
                    (layers[-1], drawn[-1]),
                    f"free floats,\n{dtype} branches",
                    COLOURS[colour],
                )
    _label(axes, (layers[-1], zero), "on the grid,\nboth dtypes", COLOURS["reverse"])
    axes.set(xscale="log", yscale="log", xlabel="layers", xlim=(3.5, 140))
    axes.set_title("relative error of the gradient")
    axes.set_xticks(layers, layers)
    axes.minorticks_off()
    axes.set_yticks([zero, 1e-7, 1e-5, 1e-3, 1e-1], ["0", *(f"1e-{n}" for n in (7, 5, 3, 1))])
    axes.grid(axis="y", alpha=0.25)
    return figure


def digest(rows) -> str:
    """Identifies the rows that a figure was drawn from."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


FIGURES = {
    "depth.svg": (rows_of_depths, draw_depth),
    "exactness.svg": (rows_of_errors, draw_errors),
}


def main():
    with rc_context(STYLE):
        for name, (read, draw) in FIGURES.items():
            rows = read()
            metadata = {"Date": None, "Description": f"drawn from rows {digest(rows)}"}
            draw(rows).savefig(FOLDER / name, transparent=True, metadata=metadata)


if __name__ == "__main__":
    main()
