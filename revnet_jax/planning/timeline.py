"""Draws memory over a forward and a backward pass under each strategy, from compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from revnet_jax.config import flatten, settings
from revnet_jax.core import STRATEGIES, trees
from revnet_jax.errors import UserError
from revnet_jax.families import build_task, family_of
from revnet_jax.models import Sweep, Variables
from revnet_jax.models.task import Task
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.planning.variants import variants
from revnet_jax.programs.buffers import assignment, compiled_for_gpu
from revnet_jax.programs.liveness import liveness
from revnet_jax.tables import markdown
from revnet_jax.training.compiler import exact_jit

MIB = 2**20


class Timeline(NamedTuple):
    """Temporary memory under one strategy, in bytes at every executed instruction.

    Attributes:
      live_bytes: memory that holds values yet to be read.
      allocated_bytes: the same, with arrays that loops write or read slice by slice counted whole,
        as the compiler allocates them.
      turn: the instruction at which the backward pass through the chains starts.
      compiled_bytes: the compiler's own figure, `memory_analysis().temp_size_in_bytes`.
    """

    backprop: str
    live_bytes: np.ndarray
    allocated_bytes: np.ndarray
    turn: int
    compiled_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The maximum of `live_bytes`."""
        return int(max(self.live_bytes))


def timeline(config: ConfigDict, backprop: str, device: jax.Device | None = None) -> Timeline:
    """Compiles the gradient of the config's loss and follows its buffers; runs nothing.

    The gradient is of one batch, without clipping or gradient accumulation (microbatches).

    Args:
      device: to compile for, which need not be present; by default the first local device.

    Raises ConfigError for settings that cannot be used, ValueError for a compiler that does not
    report its buffers, or if the compiled program has no loop over a chain.
    """
    device = device or jax.devices()[0]
    config = config.copy_and_resolve_references()
    config.model.backprop = backprop
    task = build_task(config, platform=device.platform)
    trainable = Trainable(config.optimizer.trainable)
    lowered = lowered_gradient(task, config.batch_size, device, trainable)
    # NVIDIA's compiler gives no buffers with a program, but writes them where it is asked to.
    if device.platform == "gpu":
        compiled, program = compiled_for_gpu(lowered)
    else:
        compiled = lowered.compile()
        program = assignment(compiled)
    memory: Any = compiled.memory_analysis()
    return Timeline(backprop, *liveness(program), memory.temp_size_in_bytes)


def timelines(
    config: ConfigDict,
    layers: int,
    strategies: Sequence[str] = (),
    device: jax.Device | None = None,
) -> list[Timeline]:
    """A timeline for each strategy, with `layers` layers in every chain.

    Args:
      strategies: by default those of store, remat and reverse that the network supports.
      device: as in `timeline`.

    Cost: one compilation each. Raises ConfigError for settings that cannot be used, UserError for
    an unknown strategy.
    """
    config = with_layers(config, layers)
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"got strategy {name!r}, expected some of {', '.join(STRATEGIES)}")
    known = [name for name in variants(flatten(config)) if name in ("store", "remat", "reverse")]
    return [timeline(config, name, device) for name in strategies or known]


def with_layers(config: ConfigDict, layers: int) -> ConfigDict:
    """The config with `layers` layers, three or more, in the chain of each of its stages."""
    if layers < 3:
        raise UserError(f"got {layers} layers, expected 3 or more: fewer may make no loop")
    config = config.copy_and_resolve_references()
    # Replaced, because stored layers, or a strategy for each chain, may not fit the new depth.
    config.model.update({"backprop": "store", "stored_layers": 0})
    if "unroll" in config.model:
        config.model.unroll = 1  # a program without a loop has no layer of it to look at
    config.model.update(family_of(config).depth.equal(config, layers))
    return config


def batch_shape(config: ConfigDict, device: jax.Device) -> tuple[int, ...]:
    """The shape of the first array of a batch, for a title.

    Args:
      device: as in `timeline`. Settings may suit its platform alone, such as the attention kernel.
    """
    task = build_task(config, platform=device.platform)
    return next(iter(task.batch_shapes(config.batch_size).values())).shape


def lowered_gradient(
    task: Task, batch_size: int, device: jax.Device, trainable: Trainable
) -> jax.stages.Lowered:
    """Lowers the gradient of the loss in what is trained, as a training step computes it."""
    on_device = jax.sharding.SingleDeviceSharding(device)
    # Shapes alone: no array is made, so that the device need not exist.
    shapes = lambda init, *args: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device),
        jax.eval_shape(init, *args),
    )

    def loss_fn(trained, probes, frozen, stats, batch, key):
        variables = Variables(trees.join(trained, frozen), stats)
        return task.loss(variables, batch, key, sweep=Sweep(probes))

    key = shapes(lambda: jax.random.key(0))
    params, stats = shapes(task.network.init, key)
    with settings("optimizer"):
        trainable.check(params)
    trained, frozen = trainable.divide(params)
    # In probes too, as in training: their cotangents are the exactness check.
    gradient = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    # The CPU program never runs: compile it with little optimization of machine code.
    # Others get plain `jax.jit`, since `exact_jit` takes options for this machine's backend.
    on_cpu = device.platform == "cpu"
    program = exact_jit(gradient, quickly=True) if on_cpu else jax.jit(gradient)
    probes = shapes(task.network.probes)
    batch = shapes(lambda: task.batch_shapes(batch_size))
    return program.lower(trained, probes, frozen, stats, batch, key)


def timeline_table(lines: Sequence[Timeline]) -> str:
    """A Markdown table of each timeline's peak beside the compiler's figure."""
    cells = [["backprop", "peak drawn, MiB", "compiler, MiB", "drawn / compiler"]]
    for line in lines:
        peak, compiled = line.peak_bytes / MIB, line.compiled_bytes / MIB
        cells.append([line.backprop, f"{peak:,.2f}", f"{compiled:,.2f}", f"{peak / compiled:.3f}"])
    return "\n".join(markdown(cells))


def timeline_report(lines: Sequence[Timeline]) -> list[dict[str, Any]]:
    """The figures of `timeline_table` for JSON, with the number of instructions."""
    return [
        {
            "backprop": line.backprop,
            "peak_bytes": line.peak_bytes,
            "compiled_bytes": line.compiled_bytes,
            "instructions": len(line.live_bytes),
            "backward_starts_at": line.turn,
        }
        for line in lines
    ]


def draw_timelines(lines: Sequence[Timeline], title: str, figure_class: Any) -> Any:
    """Plots a panel for each strategy, all with the same scale of bytes."""
    figure = figure_class(figsize=(3.1 * len(lines), 3.2), layout="constrained")
    axes = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axis, line in zip(axes, lines, strict=True):
        time = np.arange(len(line.live_bytes))
        axis.fill_between(time, line.live_bytes / MIB, step="post", alpha=0.7, label="live")
        axis.step(time, line.allocated_bytes / MIB, where="post", color="0.6", linewidth=0.6)
        axis.axvline(line.turn, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{line.backprop}: {line.peak_bytes / MIB:,.1f} MiB", xlabel="instruction")
        axis.margins(x=0)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("temporary memory, MiB")
    figure.suptitle(
        f"{title}\nblue: live; grey: as allocated; dotted: the backward pass starts", fontsize=9
    )
    return figure
