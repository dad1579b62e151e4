"""Which settings may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from revnet_jax.config import ConfigError, flatten
from revnet_jax.optimizers.build import SCHEDULES_WITHOUT_END

# Settings that may differ between the hosts of one run. All others must agree.
PER_HOST = ("data.dir", "data.verify_images", "data.num_threads", "data.prefetch")
# Settings of memory and speed. The arithmetic stays the same, at most in another order.
COST = (
    "deterministic",
    "memory_limit_gib",
    "mesh.data",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "model.attention",
    "model.backprop",
    "model.check_exactness",
    "model.feed_forward_chunks",
    "model.keep_operands",
    "model.loss_chunk",
    "model.stored_layers",
    "model.unroll",
)
# Settings of how long a run is, and how often it is logged, evaluated and saved.
WATCHED = (
    "checkpoint_every_steps",
    "data.eval_batches",  # its product with eval_batch_size is kept: `_check_evaluated_windows`
    "eval_batch_size",
    "eval_every_steps",
    "log_every_steps",
    "num_steps",  # where the schedule allows it: `_check_num_steps`
    "on_mismatch",
    "profile.num_steps",
    "profile.start_step",
    "schedule.decay_steps",  # before the decay begins: `check_decay`
    "tracker",
)
MAY_CHANGE = frozenset((*PER_HOST, *COST, *WATCHED))


class Change(NamedTuple):
    """The value of a setting before a run is resumed, and after."""

    was: Any
    now: Any


def changed_settings(config: ConfigDict, before: ConfigDict, workdir: Path) -> dict[str, Change]:
    """The settings, by dotted key, that differ between `config` and the config `before`.

    Raises ConfigError, in one line that names them all, if some of them must not change.
    """
    now, was = flatten(config), flatten(before)
    # A setting that only one of the two has counts as None in the other.
    changes = {
        key: Change(was.get(key), now.get(key))
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    }
    refused = [
        f"config.{key}: got {change.now!r}, expected {change.was!r}"
        for key, change in changes.items()
        if key not in MAY_CHANGE
    ]
    if refused:
        raise ConfigError(
            f"{workdir} holds a run of another config: {'; '.join(refused)}. Choose another "
            "--workdir, or the config of that run to resume it"
        )
    if "num_steps" in changes:
        _check_num_steps(config, changes["num_steps"], workdir)
    _check_evaluated_windows(config, before, workdir)
    return changes


def _check_num_steps(config: ConfigDict, change: Change, workdir: Path) -> None:
    if config.schedule.name not in (*SCHEDULES_WITHOUT_END, "wsd"):
        raise ConfigError(
            f"config.num_steps: got {change.now}, expected {change.was}: under the schedule "
            f"{config.schedule.name} every step's learning rate depends on num_steps, so those "
            f"made in {workdir} would have had others. Go on from its weights in another --workdir "
            f"with --config.init_from={workdir}; runs of the schedules "
            f"{' and '.join(SCHEDULES_WITHOUT_END)} can be made longer or shorter, and those of "
            "wsd before their decay begins"
        )


def check_decay(config: ConfigDict, before: ConfigDict, step: int, workdir: Path) -> None:
    """Raises ConfigError if a run of the schedule wsd changes its decay after it has begun.

    Until then the learning rate depends on neither num_steps nor decay_steps.

    Args:
      before: the config that the run in `workdir` was last started with.
      step: of the checkpoint to resume from.
    """
    if config.schedule.name != "wsd":
        return
    now, was = ((c.num_steps, c.schedule.decay_steps) for c in (config, before))
    # The steps up to which the peak is held, now and before.
    first, first_was = now[0] - now[1], was[0] - was[1]
    # Up to the earlier of them, the steps made are the same under both.
    if now != was and step > min(first, first_was):
        raise ConfigError(
            f"config.num_steps: got {now[0]} with schedule.decay_steps={now[1]}, expected {was[0]} "
            f"with {was[1]}: {workdir} has a checkpoint of step {step}, and the decay of wsd can "
            f"be changed only before it begins, at step {first_was} as it was and {first} as it "
            "would be. Go on from its weights in another --workdir with "
            f"--config.init_from={workdir}"
        )


def _check_evaluated_windows(config: ConfigDict, before: ConfigDict, workdir: Path) -> None:
    """Raises ConfigError if the number of evaluated sequences would change.

    All scores of a run must be on the same sequences, because they rank its checkpoints.
    """
    if "eval_batches" not in config.data:
        return
    got, expected = (c.data.eval_batches * c.eval_batch_size for c in (config, before))
    if got != expected:
        raise ConfigError(
            f"config.data.eval_batches: got {config.data.eval_batches} of {config.eval_batch_size} "
            f"sequences, expected {before.data.eval_batches} of {before.eval_batch_size}, as in "
            f"{workdir}, or others of the same product: a run is scored on the same sequences"
        )
