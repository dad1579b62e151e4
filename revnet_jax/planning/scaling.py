"""Predicts weak scaling of a config's training step: the same batch per device on more devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from revnet_jax.errors import UserError
from revnet_jax.planning.chips import chip_of
from revnet_jax.planning.compile import Compiler, NotCompiled
from revnet_jax.planning.plan import PlanRow, refused, row_of
from revnet_jax.planning.report import GIB, milliseconds
from revnet_jax.planning.topology import Topology
from revnet_jax.planning.units import size
from revnet_jax.planning.variants import chosen, model_of, variants
from revnet_jax.tables import either, markdown

NETWORKS = ("ici_bytes", "dcn_bytes")


def scaling(
    config: Mapping[str, Any], compilers: Sequence[Compiler], *, strategies: Sequence[str] | None
) -> dict[str, Any]:
    """Compiles the config's training step for the topology of each compiler, one after the other.

    Args:
      config: settings by dotted key; its batch is for the first topology, and grows with the number
        of devices. `mesh.data` grows with the number of slices, so that each slice holds a whole
        copy of the weights.
      strategies: the name of one variant; by default "reverse/lockstep", or "remat/lockstep" for a
        model that is not invertible.

    Returns settings and a list of rows. A row has the columns of a plan, and the throughput per
    device relative to the first topology: `efficiency`, by `least_ms`, and `in_turn_efficiency`,
    by `in_turn_ms`.

    Raises UserError for more than one strategy, an unknown one, settings that cannot be used, and
    a batch that is not a multiple of the first topology's devices.
    """
    (name, overrides), batch = _strategy(config, strategies), config["batch_size"]
    first = compilers[0].topology.num_devices
    if batch % first:
        raise UserError(
            f"config.batch_size: got {batch}, expected a multiple of the {first} devices of "
            f"{compilers[0].topology.name}: the batch of a device stays the same"
        )
    settings = grown(config, batch // first, compilers[0].topology)
    # Checked on the first topology alone: what fails on a larger one is a row of its own.
    refused({name: {**settings, **overrides}}, compilers[0])
    rows = []
    for compiler in compilers:
        settings = grown(config, batch // first, compiler.topology)
        compiler.report(f"{compiler.topology.name}:")
        (step,) = compiler.steps({name: {**settings, **overrides}}).values()
        rows.append(_row(name, step, compiler.topology, settings["batch_size"]))
    compiled = [row for row in rows if row["error"] is None]
    if not compiled:
        raise UserError(rows[0]["error"])
    for row in compiled:
        for name_ms, efficiency in (
            ("least_ms", "efficiency"),
            ("in_turn_ms", "in_turn_efficiency"),
        ):
            known = rows[0].get(name_ms) and row[name_ms]
            # The work of a device is the same in all rows, so throughputs relate as 1 / time.
            row[efficiency] = rows[0][name_ms] / row[name_ms] if known else None
    return {"strategy": name, "batch_per_device": batch // first, "rows": rows}


def grown(config: Mapping[str, Any], batch_per_device: int, topology: Topology) -> dict[str, Any]:
    """The settings with batch and mesh sized for a topology."""
    batch, data = batch_per_device * topology.num_devices, config["mesh.data"]
    return {
        **config,
        "batch_size": batch,
        # Evaluation's batch has to divide over the devices, too.
        "eval_batch_size": batch,
        # -1 already takes all devices that are left.
        "mesh.data": data if data == -1 else data * topology.slices,
    }


def _strategy(config, names):
    if names and len(names) > 1:
        raise UserError(f"got strategies {', '.join(names)}, expected one of them with --scaling")
    default = "reverse/lockstep" if model_of(config).invertible else "remat/lockstep"
    return next(iter(chosen(list(names or [default]), variants(config)).items()))


def _row(name, step, topology, batch_size) -> PlanRow:
    if isinstance(step, NotCompiled):
        row = {"strategy": name, "error": step.error, "fits": None}
    else:
        row = row_of(name, step, chip_of(step.device_kind))
        row |= {"device_kind": step.device_kind, "limit_bytes": step.limit_bytes}
    return {
        "topology": topology.name,
        "devices": topology.num_devices,
        "slices": topology.slices,
        "batch_size": batch_size,
        **row,
    }


def scaling_table(report: Mapping[str, Any]) -> str:
    """A Markdown table: a row per topology, a column per kind of collective on each network."""
    rows = report["rows"]
    sent = [
        (network, kind)
        for network in NETWORKS
        for kind in dict.fromkeys(kind for row in rows for kind in row.get(network) or ())
    ]
    header = ["topology", "devices", "batch", "fits", "peak"]
    # By the kind of device, since the name of the first topology may be "local".
    on_gpus = any(row["error"] is None and row["device_kind"].startswith("NVIDIA") for row in rows)
    between = " between hosts" if on_gpus else " by DCN"
    header += [kind + between * (network == "dcn_bytes") for network, kind in sent]
    header += ["ms at least", "ms in turn", "efficiency, %", "in turn, %"]
    return "\n".join(
        [
            f"{report['strategy']}, {report['batch_per_device']} examples a device",
            "",
            *markdown([header, *(_cells(row, sent, len(header)) for row in rows)]),
            *(f"{row['topology']}: {row['error']}" for row in rows if row["error"] is not None),
            "",
            "of one device and step; sent: bytes, by kind; ms by roofline: a lower bound, and what",
            "is sent after what is computed; efficiency: throughput a device over the first row's",
        ]
    )


def _cells(row, sent, length):
    cells = [row["topology"], f"{row['devices']:,}", f"{row['batch_size']:,}"]
    if row["error"] is not None:
        return cells + ["-"] * (length - len(cells))
    cells += ["yes" if row["fits"] else "no", either(row["needed_bytes"], size)]
    cells += [either((row[network] or {}).get(kind), size) for network, kind in sent]
    cells += [milliseconds(row[name]) for name in ("least_ms", "in_turn_ms")]
    percent = lambda share: f"{100 * share:.1f}"
    return cells + [either(row[name], percent) for name in ("efficiency", "in_turn_efficiency")]


def draw_scaling(report: Mapping[str, Any], figure_class: Any) -> Any:
    """Plots memory, and the time of a step, over the number of devices."""
    rows = [row for row in report["rows"] if row["error"] is None]
    figure = figure_class(figsize=(9, 3.5), layout="constrained")
    memory, time = figure.subplots(1, 2)
    _lines(memory, rows, {"needed_bytes": "needed", "limit_bytes": "all there is"}, 1 / GIB)
    memory.set_ylabel("memory of a device, GiB")
    _lines(time, rows, {"least_ms": "at least", "in_turn_ms": "sent after computed"}, 1)
    time.set_ylabel("ms a step, by roofline")
    for axis in (memory, time):
        axis.set_xscale("log", base=2)
        devices = [row["devices"] for row in rows]
        axis.set_xticks(devices, [row["topology"] for row in rows], rotation=45, ha="right")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
    figure.suptitle(f"{report['strategy']}, {report['batch_per_device']} examples a device")
    return figure


def _lines(axis, rows, names, scale):
    for name, label in names.items():
        known = [row for row in rows if row[name] is not None]
        axis.plot(
            [row["devices"] for row in known],
            [scale * row[name] for row in known],
            marker="o",
            label=label,
        )
