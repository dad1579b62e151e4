"""Compares runs: final metrics of each config, over its seeds. Imports no JAX."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revnet_jax.config import flatten, image_classification, language_model, vision_transformer
from revnet_jax.config.saved import todays
from revnet_jax.errors import UserError
from revnet_jax.tables import markdown

# Settings by which runs of one experiment may differ: seed, data loading, logging and profiling.
SAME = ("seed", "data.dir", "data.verify_images", "data.num_threads", "data.prefetch")
SAME += ("profile.start_step", "profile.num_steps", "log_every_steps", "checkpoint_every_steps")
SAME += ("tracker",)


@dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      settings: by dotted key.
      rows: the rows of metrics.jsonl.
      summary: the content of summary.json, {} before the run has ended.
    """

    workdir: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        return self.rows[-1]["step"]

    def final(self, metric: str) -> float | None:
        """The last value of a metric in the rows, else that in the summary, else None."""
        values = [row[metric] for row in self.rows if metric in row]
        value = values[-1] if values else self.summary.get(metric)
        return None if value is None or metric == "step" else float(value)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in settings of `SAME`, such as their seeds.

    Attributes:
      settings: those that differ between groups.
    """

    settings: dict[str, Any]
    runs: list[Run]

    @property
    def label(self) -> str:
        """The settings of the group, such as "learning_rate=0.1, backprop=store"."""
        # Only the last part of a key is shown, unless two settings share it.
        last = [key.rpartition(".")[2] for key in self.settings]
        short = lambda key: key if last.count(name := key.rpartition(".")[2]) > 1 else name
        return ", ".join(f"{short(key)}={value}" for key, value in self.settings.items()) or "all"


def find_runs(paths: Sequence[str], report: Callable[[str], None]) -> list[Run]:
    """Reads the runs in `paths`, each a workdir or a folder of workdirs.

    Args:
      report: takes a line for each run inside such a folder that has no metrics yet.

    Raises UserError for a path without runs, a named run without metrics, and damaged files.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        inside = list(_workdirs(path))
        if not inside:
            raise UserError(f"got {path}, expected the --workdir of a run, or a folder of several")
        for workdir in inside:
            try:
                # By its resolved path, so that a run named twice counts once.
                runs[workdir.resolve()] = read_run(workdir)
            except NoMetricsError as error:
                if workdir == path:
                    raise
                report(f"left out {error}")
    if not runs:
        raise UserError(f"got no run with metrics in {', '.join(paths)}, expected one at least")
    return list(runs.values())


# What a damaged file raises. OverflowError: a step of Infinity. RecursionError: nested brackets.
_NOT_JSON = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


class NoMetricsError(UserError):
    """A run has not logged a step yet."""


def _workdirs(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        if "config.json" in files:
            # os.walk goes on into what is left in this list: a run holds no other runs.
            folders.clear()
            yield Path(folder)
        # Runs are found in the same order on every file system.
        folders.sort()


def read_run(workdir: Path) -> Run:
    """Reads a run from its workdir. An incomplete last row, of a killed or live run, is ignored.

    Raises UserError for a missing config, missing metrics, and a damaged row.
    """
    record = _json(workdir / "config.json")
    if not isinstance(record.get("config"), dict):
        raise UserError(f"{workdir / 'config.json'}: got no config, expected the file of a run")
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}; expected the metrics of a run") from error
    rows = []
    for number, line in enumerate(lines, 1):
        # A row ends with its newline, so this one is still being written, or was cut off.
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except _NOT_JSON as error:
            raise UserError(
                f"{path}, line {number}: got {line.decode(errors='replace').strip()[:40]!r}, "
                "expected a row of metrics: remove the line, or the run"
            ) from error
    if not rows:
        raise NoMetricsError(f"{workdir}: got no metrics, expected a run that has logged a step")
    summary = workdir / "summary.json"
    settings = dict(_flat(todays(record["config"])))
    return Run(workdir, settings, rows, _json(summary) if summary.exists() else {})


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, *_NOT_JSON) as error:
        raise UserError(f"cannot read {path}: {error}; expected the JSON of a run") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def grouped(runs: Sequence[Run]) -> list[RunGroup]:
    """Groups runs by their settings (except `SAME`), sorted by the settings that differ.

    A setting that some runs lack, as those from before there was such a choice, divides none if the
    others have its default: that is what came before.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in SAME)
    values = lambda key: {json.dumps(run.settings.get(key)) for run in runs}
    absent = json.dumps(None)
    differing = [
        key
        for key in keys
        if len(values(key)) > 1
        and not (len(had := values(key) - {absent}) == 1 and had <= _defaults(key))
    ]
    groups: dict[str, RunGroup] = {}
    for run in runs:
        # JSON identifies a group, because settings may be lists, which cannot be keys.
        settings = {key: run.settings.get(key) for key in differing}
        groups.setdefault(json.dumps(settings), RunGroup(settings, [])).runs.append(run)
    # Numbers before text, because Python cannot compare the two.
    number = lambda x: isinstance(x, int | float)
    order = lambda x: (0, x, "") if number(x) else (1, 0, str(x))
    return sorted(groups.values(), key=lambda g: [order(x) for x in g.settings.values()])


def _defaults(key: str) -> set[str]:
    """The defaults that a setting has in the package, as JSON; empty for a user's own."""
    families = (image_classification(), vision_transformer(), language_model())
    return {json.dumps(known[key]) for known in map(flatten, families) if key in known}


def chosen_metrics(runs: Sequence[Run], names: Sequence[str] | None) -> list[str]:
    """`names`, or by default train_loss and all eval metrics. UserError for an unknown name."""
    logged = {name for run in runs for row in run.rows for name in row}
    numbers = (n for run in runs for n, x in run.summary.items() if isinstance(x, int | float))
    known = sorted(logged.union(numbers) - {"steps"})  # every row has a column of its own for them
    for name in names or []:
        if name not in known:
            raise UserError(f"got metric {name!r}, expected some of {', '.join(known)}")
    default = ["train_loss", *(name for name in sorted(logged) if name.startswith("eval_"))]
    return list(names or default)


def compare_runs(groups: Sequence[RunGroup], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each group: settings, number of runs, fewest and most steps, metrics.

    A metric has its mean and its spread, the sample standard deviation. The spread is null for a
    single run, and both are null if no run has the metric.
    """
    rows = []
    for group in groups:
        steps = [run.steps for run in group.runs]
        row: dict[str, Any] = {
            "settings": group.settings,
            "runs": len(group.runs),
            "steps": [min(steps), max(steps)],
            "workdirs": [str(run.workdir) for run in group.runs],
        }
        for metric in metrics:
            found = [x for run in group.runs if (x := run.final(metric)) is not None]
            # stdev is defined from two values on, and fails for infinities.
            spread = statistics.stdev(found) if len(found) > 1 and _finite(found) else None
            mean = math.fsum(found) / len(found) if found else None
            row[metric] = {"mean": mean, "spread": spread}
        rows.append(row)
    return rows


def _finite(values):
    return all(map(math.isfinite, values))


def runs_table(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Formats rows as a Markdown table."""
    keys = list(rows[0]["settings"])
    cells = [[*keys, "runs", "steps", *metrics]]
    for row in rows:
        first, last = row["steps"]
        steps = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        settings = [str(row["settings"][key]) for key in keys]
        cells.append([*settings, str(row["runs"]), steps, *(_cell(row[name]) for name in metrics)])
    return "\n".join(markdown(cells, text_columns=len(cells[0])))


def _cell(value):
    if value["mean"] is None:
        return "-"
    spread = "" if value["spread"] is None else f" ± {value['spread']:.2g}"
    return f"{value['mean']:.5g}{spread}"


def draw_runs(groups: Sequence[RunGroup], metrics: Sequence[str], figure_class: Any) -> Any:
    """Draws a panel for each metric, with a curve for each run in the colour of its group."""
    logged = {name for group in groups for run in group.runs for row in run.rows for name in row}
    shown = [name for name in metrics if name in logged]
    if not shown:
        raise UserError(f"got {', '.join(metrics)} to draw, expected a metric of metrics.jsonl")
    figure = figure_class(figsize=(4.5 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, metric in zip(axes, shown, strict=True):
        for color, group in enumerate(groups):
            for number, run in enumerate(group.runs):
                points = [(row["step"], float(row[metric])) for row in run.rows if metric in row]
                label = group.label if number == 0 else None
                steps, values = zip(*points, strict=True) if points else ((), ())
                marker = "o" if len(points) == 1 else None  # one point makes no line
                style = {"color": f"C{color % 10}", "alpha": 0.8, "linewidth": 1, "marker": marker}
                axis.plot(steps, values, label=label, **style)
        axis.set(xlabel="step", title=metric)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure
