"""Checkpoints with checksums: what is restored is what was saved, bit for bit.

Orbax writes asynchronously and commits by an atomic rename. Only this module and `manager.py`
import it. This module adds a manifest with a checksum per array (otherwise a byte flipped on disk
loads silently), a fallback to an older checkpoint, and a comparison of trees before anything is
read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from revnet_jax.errors import file_system, writing
from revnet_jax.files import write_atomically
from revnet_jax.runs import manifest
from revnet_jax.runs.manager import (
    Manager,
    NewestAndBest,
    first_line,
    is_of_machine,
    reason,
    silence_orbax,
    wait_for_others,
)
from revnet_jax.runs.manifest import CheckpointError, Damaged, PyTree


class Conversion(NamedTuple):
    """How leaves of a state are made from a leaf of a checkpoint.

    saved: the leaf as it is in the checkpoint: shape, dtype, and the sharding to read it with.
    convert: maps the array to `{path: array}`, the leaves of the state.
    """

    saved: jax.ShapeDtypeStruct
    convert: Callable[[jax.Array], dict[str, jax.Array]]


class Checkpoints:
    """The checkpoints of one run, in `directory` (local or `gs://`), one subdirectory per step.

    Call every method from every process. Damaged checkpoints are moved, never deleted, to
    `damaged_checkpoints` beside `directory`.

    Args:
      directory: created if missing, except with `read_only`.
      best_metric: name of the metric that ranks checkpoints; None ranks none.
      best_mode: whether the largest or the smallest value is best.
      keep_newest: how many of the newest to keep.
      keep_best: how many of the best to keep. A checkpoint whose metric is missing or not finite is
        never among them.
      report: receives one line for every damaged checkpoint.
      read_only: for evaluation beside a live run: nothing is cleaned up, moved or written.
      write_bytes: how much of the arrays a save writes at a time, more than the largest of them. By
        default up to 96 GB, as orbax does. What is being written is in memory twice.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        best_metric: str | None,
        best_mode: Literal["max", "min"],
        keep_newest: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] = logging.warning,
        read_only: bool = False,
        write_bytes: int | None = None,
    ):
        if best_mode not in ("max", "min"):
            raise ValueError(f"got best_mode={best_mode!r}, expected 'max' or 'min'")
        if keep_newest < 1 or keep_best < 0:
            raise ValueError(f"got {keep_newest=}, {keep_best=}, expected at least 1, 0")
        silence_orbax()
        path = epath.Path(directory)
        self.directory = path if "://" in str(path) else path.resolve()
        # With the sign, larger scores are better in both modes.
        self._best_metric, self._sign = best_metric, 1.0 if best_mode == "max" else -1.0
        self._report, self._read_only = report, read_only
        self._scores: dict[int, float] = {}
        # A killed save leaves a folder of a temporary name, which the next start removes. A reader
        # beside a live run must not: it may be the save in progress.
        options = ocp.CheckpointManagerOptions(
            # The policy holds this very dictionary, in which later scores are noted.
            preservation_policy=NewestAndBest(keep_newest, keep_best, self._scores),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            async_options=ocp.AsyncOptions(barrier_sync_fn=wait_for_others),
        )
        handlers = _handlers(write_bytes)
        with self._explained("opening"):
            self._manager = Manager(self.directory, options=options, handler_registry=handlers)
        # The scores of earlier starts, so that their best checkpoint is not deleted.
        for step in self._manager.all_steps():
            with contextlib.suppress(Damaged):  # it has no score, and restore will report it
                self._note_score(step, self._read_manifest(step)["metrics"])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that is saved or being saved, damaged or not; None if there is none."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until the save in progress is committed. Raises CheckpointError if it failed."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and frees the threads. Raises what `wait` raises."""
        try:
            self.wait()  # says in one line what orbax's `close` would raise as its own error
        except CheckpointError:
            with contextlib.suppress(Exception):
                self._manager.close()
            raise
        self._manager.close()

    def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts an asynchronous save of `state`, and returns whether it did.

        A step that is not later than the newest saved step is not saved again. If it is the newest
        and was saved without metrics, they are added to its checkpoint.

        The state's buffers may be donated or deleted as soon as this returns.

        Cost: waits for the previous save, for one pass over the state on the devices, and for a
        copy to the host. Files are written in the background.

        Raises:
          CheckpointError: the previous save failed, a leaf is not an array, or this is read-only.
        """
        if self._read_only:
            raise CheckpointError(f"got save({step}) on {self.directory}, opened read-only")
        newest = self.latest_step()
        if newest is not None and step <= newest:
            if step == newest and metrics:
                self._add_metrics(step, metrics)
            return False
        self.wait()
        leaves = manifest.by_path(state)
        # Checksums are of the arrays on the devices, before anything copies or writes them, so that
        # they cover the whole way to the disk and back.
        sealed = manifest.make(leaves, metrics or {})
        # Before the save, which asks the policy what to keep.
        self._note_score(step, sealed["metrics"])
        arrays = ocp.args.PyTreeSave(manifest.storable(leaves))
        args = ocp.args.Composite(state=arrays, manifest=ocp.args.JsonSave(sealed))
        with self._explained():
            # force: the training loop decides which steps are saved, and orbax would decide again.
            return self._manager.save(step, args=args, force=True)

    def evaluated(self, step: int) -> bool:
        """Whether the checkpoint of this step has metrics."""
        return bool(self._read_manifest(step)["metrics"])

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.wait()
        # Only the manifest is replaced; the arrays stay as they were saved.
        sealed = self._read_manifest(step)
        if sealed["metrics"]:
            return
        sealed = manifest.with_metrics(sealed, metrics)
        self._note_score(step, sealed["metrics"])
        if jax.process_index() == 0:
            path = self.directory / str(step) / "manifest" / "metadata"  # orbax's file name
            with self._explained():
                write_atomically(path, json.dumps(sealed))

    @contextlib.contextmanager
    def _explained(self, what: str = "saving to") -> Generator[None, None, None]:
        try:
            yield
        except Exception as error:
            advice = "Make it readable" if self._read_only else "Make room, or make it writable"
            raise CheckpointError(
                f"{what} {self.directory} failed: {reason(error)} "
                f"({file_system(self.directory)}). {advice}: the same command goes on from the "
                "newest whole checkpoint"
            ) from error

    def restore(
        self,
        abstract_state: PyTree,
        *,
        which: Literal["newest", "best"] = "newest",
        partial: bool = False,
        converted: Mapping[str, Conversion] | None = None,
    ) -> tuple[int, PyTree] | None:
        """Restores the newest (or best) undamaged checkpoint; returns `(step, state)` or None.

        Leaves get the shardings of `abstract_state` (from `jax.eval_shape`, or a state of arrays).
        A leaf without a sharding is uncommitted, on the default device. A damaged checkpoint is
        reported and the next one in order is tried. Damaged ones are moved aside once an undamaged
        one was found.

        Args:
          partial: the checkpoint may have parts of the state (named by the first key of a leaf's
            path) that `abstract_state` lacks. They are not read.
          converted: by the path of a leaf in the checkpoint, the leaves of the state that are made
            from it. Each is read by itself and dropped once it is converted, so that they are never
            in memory together.

        Cost: one read of the checkpoint and one pass over the state on the devices.

        Raises:
          CheckpointError: the checkpoint holds another architecture, or all are damaged. Nothing is
            moved in that case. Otherwise a second attempt would find an empty directory and train
            from step 0.
        """
        if which not in ("newest", "best"):
            raise ValueError(f"got which={which!r}, expected 'newest' or 'best'")
        self.wait()
        # Beside a live run, checkpoints have come and gone since the manager listed them.
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps if which == "newest" else self._best_first(steps):
            try:
                state = self._read_state(step, abstract_state, partial, converted or {})
            except Damaged as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return step, state
        if not damaged:
            return None
        whats_wrong = "; ".join(f"step {step}: {what}" for step, what in damaged.items())
        raise CheckpointError(
            f"all checkpoints in {self.directory} are damaged ({whats_wrong}); nothing was moved. "
            "Bring the files back from a copy, or start from step 0 in another workdir."
        )

    def _best_first(self, newest_first: list[int]) -> list[int]:
        ranks = dict.fromkeys(newest_first, math.inf)
        for step in newest_first:
            with contextlib.suppress(Damaged):  # it may have been the best, so it stays first
                self._note_score(step, self._read_manifest(step)["metrics"])
                # Whole checkpoints without a score come last.
                ranks[step] = self._scores.get(step, -math.inf)
        if set(ranks.values()) == {-math.inf}:
            self._report(f"no checkpoint in {self.directory} has {self._best_metric}: newest used")
        # The sort is stable, also in reverse: the newest of equals comes first.
        return sorted(newest_first, key=ranks.__getitem__, reverse=True)

    def _note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._best_metric is not None and self._best_metric in metrics:
            self._scores[step] = self._sign * metrics[self._best_metric]

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        as_json = isinstance(args, ocp.args.JsonRestore)
        handler: Any = ocp.JsonCheckpointHandler() if as_json else ocp.PyTreeCheckpointHandler()
        found, problem = None, ""
        try:  # not by the manager, whose barrier would hang if one process fails to read
            found = handler.restore(self.directory / str(step) / item, args=args)
        except Exception as error:
            problem = f"{item} unreadable ({first_line(error)})"
            found = error
        # Processes decide together that a checkpoint is damaged. Each by itself, some would go on
        # to an older one while others restore this one, or end while others wait for them.
        of_machine = isinstance(found, Exception) and is_of_machine(found)
        state = np.asarray([problem != "", of_machine])
        failed, not_read = np.any(multihost_utils.process_allgather(state).reshape(-1, 2), axis=0)
        if not_read:
            what = reason(found) if of_machine else "in another process, which says why"
            raise CheckpointError(
                f"reading {self.directory / str(step)} failed: {what}. Nothing was moved: start "
                "the same command again when this is mended"
            ) from (found if of_machine else None)
        if failed:
            raise Damaged(problem or f"{item} unreadable in another process")
        return found

    def _read_manifest(self, step: int) -> dict[str, Any]:
        return manifest.check_seal(self._read(step, "manifest", ocp.args.JsonRestore()))

    def _read_state(
        self,
        step: int,
        abstract_state: PyTree,
        partial: bool,
        converted: Mapping[str, Conversion],
    ) -> PyTree:
        # The manifest first: another architecture is told before any array is read.
        records = self._read_manifest(step)["leaves"]
        leaves = manifest.by_path(abstract_state)
        wanted = {path: manifest.as_abstract(leaf) for path, leaf in leaves.items()}
        made = {path for c in converted.values() for path in jax.eval_shape(c.convert, c.saved)}
        rest = {path: spec for path, spec in wanted.items() if path not in made}
        expected = rest | {path: conversion.saved for path, conversion in converted.items()}
        # Whole parts may be left out, but in a part that is wanted every leaf has to agree.
        parts = {_part(path) for path in wanted}
        saved = {path: r for path, r in records.items() if _part(path) in parts or not partial}
        manifest.check_same_tree(self.directory / str(step), saved, expected)
        is_partial = partial or bool(converted)
        arrays = self._read_arrays(step, manifest.storable(rest), records, is_partial)
        for path, conversion in converted.items():
            found = self._read_arrays(step, {path: conversion.saved}, records, True)
            # JAX returns before an array is computed, and keeps what it is computed from until
            # then: without waiting, the next leaf would be read beside it.
            arrays |= jax.block_until_ready(conversion.convert(found.pop(path)))
        restored = manifest.from_storable(arrays, wanted, records)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), restored)

    def _read_arrays(
        self, step: int, specs: Mapping[str, Any], records: dict[str, Any], partial: bool
    ) -> dict[str, jax.Array]:
        """Reads these leaves and checks that they are what was saved."""
        # Without a sharding orbax would take the one it has recorded, whose devices may not be
        # here. As numpy arrays, leaves are placed on no device yet.
        plain = ocp.RestoreArgs(restore_type=np.ndarray)
        restore_args = {
            path: ocp.ArrayRestoreArgs(sharding=spec.sharding) if spec.sharding else plain
            for path, spec in specs.items()
        }
        arrays = self._read(
            step, "state", ocp.args.PyTreeRestore(specs, restore_args, partial_restore=partial)
        )
        for path in arrays:
            if not isinstance(arrays[path], jax.Array):
                # A copy, because a buffer shared with numpy must not be donated. In the place of
                # the original, so that only one array is in memory twice.
                arrays[path] = jnp.array(arrays[path])
        manifest.check_saved_arrays(arrays, records)
        return arrays

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        """Moves damaged checkpoints to another folder, so that their steps can be saved again."""
        aside = self.directory.parent / "damaged_checkpoints"
        fate = "left in place (read-only)" if self._read_only else f"moved to {aside}"
        for step, what in damaged.items():
            if not self._read_only:
                self._scores.pop(step, None)
                if jax.process_index() == 0:
                    with writing(aside):
                        _move(self.directory / str(step), aside)
            self._report(f"checkpoint {step} is damaged: {what}; {fate}; step {used} used instead")
        if damaged and not self._read_only:
            # Nobody lists the folder, or saves these steps again, before process 0 has moved them.
            multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()


def _handlers(write_bytes: int | None) -> ocp.handlers.CheckpointHandlerRegistry:
    """What writes and reads the two items of a checkpoint."""
    impl, as_json = None, ocp.JsonCheckpointHandler()  # None keeps orbax's own limit
    if write_bytes is not None:
        impl = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=write_bytes)
    arrays = ocp.PyTreeCheckpointHandler(handler_impl=impl)
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("state", args, arrays)
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("manifest", args, as_json)
    return registry


def _part(path: str) -> str:
    return path.partition("/")[0]


def _move(source: epath.Path, into: epath.Path) -> None:
    """Moves a directory, with a suffix if its name is taken already."""
    into.mkdir(parents=True, exist_ok=True)
    target = into / source.name
    while target.exists():
        target = into / f"{target.name}_again"
    source.rename(target)
