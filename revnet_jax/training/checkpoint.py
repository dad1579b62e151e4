"""Checkpoints that are checked: what is restored is what was saved, bit for bit.

The only module that imports orbax, which writes asynchronously and commits by an atomic rename.
Added here is what it leaves out: a manifest with a checksum per array (otherwise a byte flipped on
disk loads silently), falling back to an older checkpoint, and comparing trees before any read.

A state is any pytree of arrays. It is stored flat, as `{path: array}`, so restoring needs nothing
but an abstract state with the same paths; typed PRNG keys are stored as their words.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import logging as std_logging
import math
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from revnet_jax.errors import UserError

PyTree = Any
ABSTRACT = jax.ShapeDtypeStruct
# What a reader may raise although the checkpoint is good: no reason to condemn it.
NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be saved or restored; the message says got, expected and what to do."""


class _Damaged(Exception):
    """This checkpoint cannot be read back as it was written; an older one may."""


class _NewestAndBest:
    """Orbax preservation policy: the newest and the best-scored steps; everything else is deleted.

    Orbax's own `BestN` keeps every step saved without metrics, sorts NaN anywhere, and takes scores
    from a file which, when damaged, keeps the whole directory from opening.
    """

    def __init__(self, keep_newest: int, keep_best: int, scores: dict[int, float]):
        self.keep_newest, self.keep_best, self.scores = keep_newest, keep_best, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [info.step for info in checkpoints]  # oldest first
        scored = sorted((s for s in steps if s in self.scores), key=lambda s: (self.scores[s], s))
        kept = {*steps[-self.keep_newest :], *scored[max(0, len(scored) - self.keep_best) :]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, in `directory` (local or `gs://`), one subdirectory per step.

    Call every method from every process. Damaged checkpoints are moved, never deleted, to
    `damaged_checkpoints` beside `directory`.

    Args:
      directory: created if missing, except with `read_only`.
      save_every_steps: `save` writes at its multiples, and when preemption is announced.
      best_metric: name of the metric that ranks checkpoints; None ranks none.
      best_mode: whether the largest or the smallest value is best.
      keep_newest, keep_best: how many checkpoints to keep of each kind. One saved without the
        metric, or with a value that is not finite, is never best.
      report: receives one line for every damaged checkpoint.
      read_only: for evaluation beside a live run: nothing is cleaned up, moved or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        save_every_steps: int,
        best_metric: str | None,
        best_mode: Literal["max", "min"],
        keep_newest: int = 2,
        keep_best: int = 1,
        report: Callable[[str], None] = logging.warning,
        read_only: bool = False,
    ):
        if best_mode not in ("max", "min"):
            raise ValueError(f"got best_mode={best_mode!r}, expected 'max' or 'min'")
        if save_every_steps < 1 or keep_newest < 1 or keep_best < 0:
            raise ValueError(
                f"got {save_every_steps=}, {keep_newest=}, {keep_best=}: expected at least 1, 1, 0"
            )
        _quiet_orbax()
        path = epath.Path(directory)
        self.directory = path if "://" in str(path) else path.resolve()
        self.best_metric, self._sign = best_metric, 1.0 if best_mode == "max" else -1.0
        self._report, self._read_only = report, read_only
        self._scores: dict[int, float] = {}
        interval = policies.FixedIntervalPolicy(save_every_steps)
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.AnySavePolicy(
                [interval, policies.PreemptionCheckpointingPolicy()]
            ),
            preservation_policy=_NewestAndBest(keep_newest, keep_best, self._scores),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        for step in self._manager.all_steps():
            with contextlib.suppress(_Damaged):  # restore will report it; it has no score
                self._note_score(step, self._read_manifest(step)["metrics"])

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step saved or being saved, damaged or not; None when there is none."""
        return self._manager.latest_step()

    def reached_preemption(self, step: int) -> bool:
        """Whether the machine is about to be taken away: `save` at this step, `wait`, and stop."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until the save in progress is committed. Raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(_save_failed(self.directory, error)) from error

    def close(self) -> None:
        """Waits for the save in progress and frees the threads. Raises what `wait` raises."""
        self.wait()
        self._manager.close()

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: Mapping[str, float] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Starts to save `state` and returns whether it did; never at or before the newest step.

        The state's buffers may be donated or deleted as soon as this returns. `force` saves off the
        interval too (the last step of a run).

        Cost: one pass over the state on the devices, a copy to the host, and the wait for both and
        for the previous save; files are written in the background.

        Raises:
          CheckpointError: the previous save failed, a leaf is not an array, or this is read-only.
        """
        if self._read_only:
            raise CheckpointError(
                f"got save({step}) on {self.directory}, which is opened read-only"
            )
        newest = self.latest_step()
        if newest is not None and step <= newest:
            return False
        if not force and not self._manager.should_save(step):
            return False
        self.wait()
        leaves = {path: _as_array(path, leaf) for path, leaf in _by_path(state).items()}
        arrays = _storable(leaves)
        manifest = _make_manifest(leaves, arrays, metrics)
        self._note_score(step, manifest["metrics"])
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), manifest=ocp.args.JsonSave(_seal(manifest))
        )
        try:
            return self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise CheckpointError(_save_failed(self.directory, error)) from error

    def restore(
        self, abstract_state: PyTree, *, which: Literal["newest", "best"] = "newest"
    ) -> tuple[int, PyTree] | None:
        """Restores the newest (or best) whole checkpoint: `(step, state)`; None if there is none.

        Leaves get the shardings of `abstract_state` (from `jax.eval_shape`, or a state of arrays);
        one without comes uncommitted, on the default device. A damaged checkpoint is reported and
        the next in order used; once one was found whole, the damaged ones are moved aside.

        Cost: one read of the checkpoint and one pass over the state on the devices.

        Raises:
          CheckpointError: the checkpoint holds another architecture, or all are damaged. Nothing is
            moved then, so that a second attempt cannot find an empty directory and start afresh.
        """
        self.wait()
        self._manager.reload()
        damaged: dict[int, str] = {}
        for step in self._in_order(which):
            try:
                state = self._read_state(step, abstract_state)
            except _Damaged as error:
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

    def restore_best(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """`restore` of the best checkpoint; of the newest, with a report, when none has a score."""
        return self.restore(abstract_state, which="best")

    def _in_order(self, which: str) -> list[int]:
        """Steps in the order in which to try them."""
        if which not in ("newest", "best"):
            raise ValueError(f"got which={which!r}, expected 'newest' or 'best'")
        newest_first = sorted(self._manager.all_steps(), reverse=True)
        if which == "newest" or not newest_first:
            return newest_first
        # One whose manifest is damaged may have been the best: it comes first, to be reported.
        rank = {step: -math.inf for step in newest_first}
        for step in newest_first:
            try:
                self._note_score(step, self._read_manifest(step)["metrics"])
                rank[step] = self._scores.get(step, -math.inf)
            except _Damaged:
                rank[step] = math.inf
        if all(score == -math.inf for score in rank.values()):
            self._report(f"no checkpoint in {self.directory} has {self.best_metric}: newest used")
        return sorted(newest_first, key=lambda step: rank[step], reverse=True)

    def _note_score(self, step: int, metrics: Mapping[str, float | None]) -> None:
        value = metrics.get(self.best_metric) if self.best_metric else None
        if value is not None:
            self._scores[step] = self._sign * value

    def _read_manifest(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        try:
            return _unseal(self._manager.restore(step, args=args)["manifest"])
        except NOT_DAMAGE as error:
            raise CheckpointError(_cannot_read(self.directory, step, error)) from error
        except Exception as error:
            raise _Damaged(f"manifest unreadable ({_first_line(error)})") from error

    def _read_state(self, step: int, abstract_state: PyTree) -> PyTree:
        manifest = self._read_manifest(step)
        wanted = {path: _as_abstract(leaf) for path, leaf in _by_path(abstract_state).items()}
        _check_same_tree(self.directory / str(step), manifest["leaves"], wanted)
        arrays, recorded = self._read_arrays(step, _storable(wanted)), manifest["leaves"]
        for path, checksum in _checksums(arrays).items():
            if checksum != recorded[path]["checksum"]:
                raise _Damaged(f"array {path} has another checksum than when it was saved")
        leaves = [
            _from_storable(spec, arrays.get(path), recorded[path]) for path, spec in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _read_arrays(self, step: int, specs: dict[str, ABSTRACT]) -> dict[str, jax.Array]:
        for spec in specs.values():
            if spec.sharding is not None:
                spec.sharding.shard_shape(spec.shape)  # Raises the caller's mistake before reading.
        restore_args = {path: _restore_args(spec) for path, spec in specs.items()}
        args = ocp.args.PyTreeRestore(specs, restore_args=restore_args)
        problem, arrays = None, {}
        with _hushed_asyncio():
            try:
                arrays = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
            except NOT_DAMAGE as error:
                raise CheckpointError(_cannot_read(self.directory, step, error)) from error
            except Exception as error:
                problem = _first_line(error)
            if problem:  # Let what was abandoned end now, while it is quiet.
                time.sleep(0.05)
                gc.collect()
        for path, array in arrays.items():
            got, expected = _describe(array), _describe(specs[path])
            if got != expected:
                problem = f"array {path} is {got} instead of {expected}"
        if not _on_every_process(problem is None):
            raise _Damaged(problem or "unreadable in another process")
        # jnp.array copies: a numpy buffer that is merely aliased must not be donated.
        return {p: a if isinstance(a, jax.Array) else jnp.array(a) for p, a in arrays.items()}

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        """Moves damaged checkpoints out of the way, so that their steps can be saved again."""
        for step, what in damaged.items():
            fate = "left in place (read-only)"
            if not self._read_only:
                aside = self._move_aside(step)
                self._scores.pop(step, None)
                fate = f"moved to {aside}"
            self._report(f"checkpoint {step} is damaged: {what}; {fate}; step {used} used instead")
        if damaged and not self._read_only:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()

    def _move_aside(self, step: int) -> epath.Path:
        root = self.directory.parent / "damaged_checkpoints"
        names = (str(step) if n == 0 else f"{step}_{n}" for n in range(10**6))
        aside = next(root / name for name in names if not (root / name).exists())
        if jax.process_index() == 0:
            root.mkdir(parents=True, exist_ok=True)
            (self.directory / str(step)).rename(aside)
        return aside


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as `params/w`; paths come in the tree's own order."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/") or ".": leaf for p, leaf in found}
    if len(leaves) != len(found):
        raise CheckpointError(
            "got a state with two leaves of the same path: rename a key with a '/'"
        )
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_array(path: str, leaf: Any) -> jax.Array:
    try:
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
    except TypeError as error:
        raise CheckpointError(
            f"got a {type(leaf).__name__} at {path}, expected an array: keep it out of the state"
        ) from error


def _as_abstract(leaf: Any) -> ABSTRACT:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return ABSTRACT(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _words(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, ABSTRACT):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _storable(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What orbax is given for these leaves (arrays or abstract): keys as words, nothing empty.

    Orbax refuses arrays of size 0; they hold nothing that would have to be stored.
    """
    return {path: _words(leaf) for path, leaf in leaves.items() if leaf.size}


def _from_storable(spec: ABSTRACT, array: jax.Array | None, recorded: dict[str, Any]) -> jax.Array:
    if array is None:
        array = jnp.zeros(_words(spec).shape, _words(spec).dtype)
    elif not _is_key(spec):
        return array
    place = lambda x: jax.random.wrap_key_data(x, impl=recorded["key_impl"]) if _is_key(spec) else x
    # Not device_put, which refuses shardings over other processes' devices.
    return jax.jit(place, out_shardings=spec.sharding)(array)


def _restore_args(spec: ABSTRACT) -> ocp.RestoreArgs:
    if spec.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=spec.sharding)


def _checksum(x: jax.Array) -> jax.Array:
    """The sum, modulo 2^32, of the array's words, each scrambled together with its position.

    Scrambling is one-to-one at every position, so a change within one word always changes the sum;
    any other goes unnoticed with a probability of about 2^-32. (With plain odd weights the top bits
    of two words, such as two signs, would cancel.)
    """
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize <= 4):
        words = x.astype(jnp.uint32)
    else:
        word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # The flat position from one iota per axis: flattening would gather an array that is sharded.
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
        stride = stride * words.shape[axis] % 2**32
    # The finalizer of MurmurHash3: xor-shifts and odd factors.
    words = (words ^ (position * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> np.uint32(16)), dtype=jnp.uint32)


def _stack_checksums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_checksum(x) for x in arrays])


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The checksum of every array, whatever its sharding: one call, one small transfer."""
    if not arrays:
        return {}
    meshes = [x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)]
    # Replicated, so that every process can read them.
    out = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = jax.jit(_stack_checksums, out_shardings=out)(list(arrays.values()))
    return {path: int(x) for path, x in zip(arrays, np.asarray(sums), strict=True)}


def _make_manifest(
    leaves: dict[str, jax.Array], arrays: dict[str, jax.Array], metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    checksums = _checksums(arrays)
    records: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        records[path] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        records[path]["checksum"] = checksums.get(path)
        if _is_key(leaf):
            records[path]["key_impl"] = str(jax.random.key_impl(leaf))
    floats = {name: float(value) for name, value in (metrics or {}).items()}
    finite = {name: value if math.isfinite(value) else None for name, value in floats.items()}
    return {"format": 1, "leaves": records, "metrics": finite}


def _seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the manifest's own checksum: damage to it must not pass for another architecture."""
    return {**manifest, "crc32": zlib.crc32(json.dumps(manifest, sort_keys=True).encode())}


def _unseal(sealed: dict[str, Any]) -> dict[str, Any]:
    manifest = {name: value for name, value in sealed.items() if name != "crc32"}
    if _seal(manifest) != sealed:
        raise ValueError("its own checksum does not match")
    return manifest


def _describe(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _check_same_tree(where: Any, saved: dict[str, Any], wanted: dict[str, ABSTRACT]) -> None:
    """Raises CheckpointError if a checkpoint holds another tree than the one wanted."""
    differences = []
    for path in {**wanted, **saved}:
        got = "{dtype}{shape}".format(**saved[path]) if path in saved else "nothing"
        expected = _describe(wanted[path]) if path in wanted else "nothing"
        if got != expected:
            differences.append(f"{path}: got {got}, expected {expected}")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"checkpoint {where} was written by another architecture or optimizer: "
            f"{'; '.join(differences[:3])}{more}. "
            "Use the config it was saved with, or another workdir."
        )


def _on_every_process(fine: bool) -> bool:
    if jax.process_count() == 1:
        return fine
    return bool(np.all(multihost_utils.process_allgather(np.asarray(fine))))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def _save_failed(directory: Any, error: Exception) -> str:
    return (
        f"saving a checkpoint to {directory} failed: {_first_line(error)}. Check that it can be "
        "written and has room; the same command resumes from the newest whole checkpoint."
    )


def _cannot_read(directory: Any, step: int, error: Exception) -> str:
    return (
        f"checkpoint {step} in {directory} could not be read, for a reason outside the checkpoint: "
        f"{_first_line(error)}. Free memory or mend permissions and run the same command again."
    )


def _not_from_orbax(record: std_logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname


def _quiet_orbax() -> None:
    """Keeps orbax's log (dozens of lines a save, on absl's own logger) off stderr.

    Nothing is lost: every failure of orbax also comes back as an exception, and as one line.
    """
    # Adding the same function again changes nothing.
    logging.get_absl_logger().addFilter(_not_from_orbax)


@contextlib.contextmanager
def _hushed_asyncio() -> Generator[None, None, None]:
    """Orbax reads arrays concurrently: of several that fail it raises one and abandons the others.

    Each abandoned one would end in a traceback of its own on stderr, long after.
    """

    def hook(args: Any) -> None:
        abandoned = inspect.iscoroutine(args.object) or "loop is closed" in str(args.exc_value)
        if not abandoned:
            hook_before(args)

    logger, hook_before = std_logging.getLogger("asyncio"), sys.unraisablehook
    disabled_before, logger.disabled = logger.disabled, True
    sys.unraisablehook = hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        logger.disabled, sys.unraisablehook = disabled_before, hook_before
