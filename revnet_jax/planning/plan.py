"""Plans: the memory and time of every strategy for a config on given devices, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh

from revnet_jax.errors import UserError
from revnet_jax.planning.chips import Chip, chip_of, step_seconds
from revnet_jax.planning.compile import CompiledStep, Compiler, NotCompiled
from revnet_jax.planning.largest import SIZES, largest_that_fits
from revnet_jax.planning.topology import LOCAL
from revnet_jax.planning.units import size
from revnet_jax.planning.variants import chosen, deeper, has_depth, model_depth, variants
from revnet_jax.programs.traffic import Traffic
from revnet_jax.training.sharding import AXES, batch_parts, mesh_sizes

MAX_MULTIPLE = 4096  # a search for the largest size stops at this multiple of the config's

PlanRow = dict[str, Any]
_NO_PARTS = "by_part for {}, expected a GPU: kernel speeds were measured on GPUs only"


def plan(
    config: Mapping[str, Any],
    compiler: Compiler,
    *,
    strategies: Sequence[str] | None = None,
    largest: Sequence[str] = (),
    by_part: bool = False,
) -> dict[str, Any]:
    """Compiles the config's training step under every strategy: memory, time by roofline, advice.

    Args:
      config: settings by dotted key.
      strategies: as in `variants`, such as `reverse+8/lockstep`, which stores eight layers and
        updates within the backward pass; by default all that the network has.
      largest: some of `SIZES`. Each row gets the largest batch, depth or context that fits, as
        `largest_batch` and so on. Each search takes three to six more compilations; contexts are
        multiples of the config's.
      by_part: add `parts` to each row, the time of each part of the model (see `by_part.by_part`).

    Returns the plan's settings, a list of rows, the strategies left out with the reasons, and a
    recommendation. Bytes and flops are of one device. `least_ms` (communication overlaps with
    computation), `in_turn_ms` (no overlap) and `utilization` (at `least_ms`) are null for devices
    not in `CHIPS`.

    Raises UserError for an unknown strategy or size, for settings that cannot be trained under any
    strategy, for by_part on TPU topologies, and if nothing could be compiled. A line of the
    compiler's `report` says where this machine's devices have no parts, or no limit to search.
    """
    topology = compiler.topology
    sizes = [name for name in SIZES if name != "context" or "data.context" in config]
    for name in largest:
        if name not in sizes:
            raise UserError(f"got largest={name!r}, expected some of {', '.join(sizes)}")
    layers = model_depth(config) if has_depth(config) or "depth" in largest else None
    if by_part and not (topology.is_gpu or topology.name == LOCAL):
        raise UserError(f"got {_NO_PARTS.format(topology.name)}")
    overrides = chosen(list(strategies) if strategies else None, variants(config))
    settings = {name: {**config, **each} for name, each in overrides.items()}
    left_out = refused(settings, compiler)
    steps = compiler.steps({name: settings[name] for name in settings if name not in left_out})
    compiled = {name: step for name, step in steps.items() if isinstance(step, CompiledStep)}
    if not compiled:
        errors = [step.error for step in steps.values() if isinstance(step, NotCompiled)]
        raise UserError(errors[0])
    any_step = next(iter(compiled.values()))
    chip = chip_of(any_step.device_kind)
    # MFU counts the model's own arithmetic: that of the strategy that computes no product twice.
    stored = compiled.get("store") or compiled.get("store/lockstep")
    rows = [
        _failed(name, step)
        if isinstance(step, NotCompiled)
        else row_of(name, step, chip, stored.flops if stored else None)
        for name, step in steps.items()
    ]
    if by_part:
        _add_parts(rows, compiled, any_step.device_kind, compiler.report)
    if largest:
        _add_largest(rows, largest, settings, any_step, compiler)
    return {
        "topology": compiler.topology.name,
        "devices": any_step.num_devices,
        "device_kind": any_step.device_kind,
        "limit_bytes": any_step.limit_bytes,
        "batch_size": config["batch_size"],
        "layers": layers,
        "rows": rows,
        "left_out": left_out,
        "recommendation": recommend(rows, any_step.limit_bytes),
    }


def _add_parts(rows, compiled, device_kind, report):
    """Adds the `parts` of each row, None where the devices have none."""
    # What this machine's devices are is known only now, when the rest of the plan is made.
    if not any(step.parts or step.out_of_memory for step in compiled.values()):
        report(f"left out {_NO_PARTS.format(device_kind)}")
    for row in rows:
        step = compiled.get(row["strategy"])
        row["parts"] = step and step.parts


def _add_largest(rows, largest, settings, any_step, compiler):
    """Adds the largest sizes of each row that was compiled."""
    # Without a limit, every size would fit.
    if any_step.limit_bytes is None:
        compiler.report(
            f"left out the largest {', '.join(largest)}: {any_step.device_kind} does not report "
            "its memory: --config.memory_limit_gib says how much there is"
        )
        return
    for row in rows:
        if row["error"] is None:
            name = row["strategy"]
            for searched in largest:
                found = _largest(searched, name, settings[name], compiler, any_step)
                row[f"largest_{searched}"] = found._asdict()


def refused(settings: Mapping[str, Mapping[str, Any]], compiler: Compiler) -> dict[str, str]:
    """Reports what is planned otherwise, and returns the strategies that cannot be trained.

    Args:
      settings: by strategy, then by dotted key.

    Raises UserError if no strategy can be trained.
    """
    found = compiler.refusals(settings)
    if len(found) == len(settings):
        raise UserError(next(iter(found.values())))
    # One line for all strategies that share a reason.
    for error in dict.fromkeys(found.values()):
        names = [name for name in found if found[name] == error]
        compiler.report(f"left out {', '.join(names)}: {error}")
    if compiler.topology.is_gpu and any(each["deterministic"] for each in settings.values()):
        compiler.report(
            "config.deterministic has no effect: XLA would ask a GPU for such kernels, and "
            f"{compiler.topology.name} is compiled for without one"
        )
    return found


def recommend(rows: Sequence[PlanRow], limit_bytes: int | None) -> dict[str, str | None]:
    """The cheapest strategy that fits, and why, in one sentence."""
    room = "an unknown memory" if limit_bytes is None else size(limit_bytes)
    known = [row for row in rows if row["error"] is None]
    fitting = [row for row in known if row["fits"]]
    if not fitting:
        # A program that ran out of memory may have no figure.
        said = [row for row in known if row["needed_bytes"] is not None]
        least = min(said, key=lambda row: row["needed_bytes"], default=None)
        asks = f" ({least['strategy']} asks for {size(least['needed_bytes'])})" if least else ""
        reason = f"none fits into {room}{asks}: smaller batches or more devices might"
        return {"strategy": None, "reason": reason}
    # Without a predicted time, arithmetic decides, then memory.
    cost = lambda row: (row["least_ms"] or 0, row["flops"], row["needed_bytes"])
    best = min(fitting, key=cost)
    needs = f"{size(best['needed_bytes'])} of {room}"
    too_large = [row["strategy"] for row in known if not row["fits"]]
    others = f"; {', '.join(too_large)} would not fit" if too_large else ""
    by = "fastest by roofline" if best["least_ms"] else "least arithmetic"
    why = f"{by} of those that fit" if len(fitting) > 1 else "it fits"
    return {"strategy": best["strategy"], "reason": f"{why}: it needs {needs}{others}"}


def _failed(name, step):
    return {"strategy": name, "error": step.error, "fits": None}


def row_of(
    name: str, step: CompiledStep, chip: Chip | None, model_flops: int | None = None
) -> PlanRow:
    """The row of a compiled strategy.

    Args:
      model_flops: FLOPs of `store`, without any recomputation, for the utilization (MFU).
    """
    # FLOPs are counted for all devices together; traffic and memory are of one device.
    flops = step.flops // step.num_devices
    seconds = step_seconds(chip, flops=flops, **step.traffic) if chip and step.traffic else None
    utilization = None
    if chip and seconds and model_flops is not None:
        # MFU = FLOPs of `store` / (seconds x FLOP/s of all devices).
        utilization = model_flops / (seconds.overlapped * chip.peak_flops * step.num_devices)
    return {
        "strategy": name,
        "error": None,
        "fits": step.fits,
        "needed_bytes": step.needed_bytes,
        **_memory(step),
        "flops": flops,
        **(step.traffic or dict.fromkeys(Traffic._fields)),
        "least_ms": seconds and 1000 * seconds.overlapped,
        "in_turn_ms": seconds and 1000 * seconds.in_turn,
        "utilization": utilization,
        "compile_seconds": step.compile_seconds,
    }


def _memory(step: CompiledStep) -> dict[str, int | None]:
    """Splits the needed memory into weights, optimizer, gradients, activations; None if unknown.

    `gradient_bytes` is an upper bound: the gradients that may exist at once, limited to what the
    weights and the optimizer leave, because a compiler may free one gradient before it computes the
    next. Activations are the rest.
    """
    if step.needed_bytes is None:
        return dict.fromkeys(
            ("weights_bytes", "optimizer_bytes", "gradient_bytes", "activation_bytes")
        )
    # The compiler's size of the arguments includes a TPU's padding; the arrays' own sizes do not.
    kept = step.weights_bytes + step.optimizer_bytes
    padding = 1.0
    if step.argument_bytes is not None:
        padding = max(1.0, (step.argument_bytes - step.batch_bytes) / kept)
    weights, optimizer = (int(padding * n) for n in (step.weights_bytes, step.optimizer_bytes))
    rest = max(0, step.needed_bytes - weights - optimizer)
    gradient = min(int(padding * step.gradient_bytes), rest)
    return {
        "weights_bytes": weights,
        "optimizer_bytes": optimizer,
        "gradient_bytes": gradient,
        "activation_bytes": rest - gradient,
    }


def _largest(searched, strategy, settings, compiler, step):
    """The largest batch, number of layers or context that fits."""

    def needed_bytes(changes):
        name = f"{strategy}, " + ", ".join(f"{key} {value}" for key, value in changes.items())
        (result,) = compiler.steps({name: {**settings, **changes}}).values()
        if isinstance(result, NotCompiled):
            compiler.report(f"{name} counts as too large: {result.error}")
            return None
        # An out-of-memory error gives a rounded figure, which may be no more than the limit. Such a
        # figure is dropped, because the search would take the size as one that fits.
        known = result.fits or (result.needed_bytes or 0) > step.limit_bytes
        return result.needed_bytes if known else None

    def search(changes, start, multiple):
        return largest_that_fits(
            lambda n: needed_bytes(changes(n)),
            start,
            limit_bytes=step.limit_bytes,
            step=multiple,
            most=MAX_MULTIPLE * start,
        )

    if searched == "batch":
        changes = lambda n: {"batch_size": n}
        # Every part of a microbatch has as many examples as the others: see `check_split`.
        multiple = _batch_parts(settings, step.num_devices) * settings["microbatches"]
        return search(changes, settings["batch_size"], multiple)
    if searched == "context":
        changes = lambda n: {"data.context": n}
        # Multiples stay divisible by what divides the config's context: chunks, the sequence axis.
        return search(changes, settings["data.context"], settings["data.context"])
    # Depth goes in multiples of the config's, so that stages keep their proportions.
    times = search(lambda n: deeper(settings, n), 1, 1)
    return times._replace(size=times.size and times.size * model_depth(settings))


def _batch_parts(settings, num_devices):
    """How many parts the config's mesh splits a batch into."""
    given = {axis: settings[f"mesh.{axis}"] for axis in AXES}
    # Sizes of axes without devices: this process must not ask JAX for any.
    return batch_parts(AbstractMesh(mesh_sizes(num_devices, **given), AXES))
