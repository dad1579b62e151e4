"""Compiles one training step and measures it, in a process of its own because compilers may crash.

Reads a JSON request from stdin: {"config": settings by dotted key, "topology": name,
"cache_dir": folder}. Writes one line of JSON to stdout: {"step": ...} with the fields of
`CompiledStep`, or {"error": a line for the user}. For a request with {"configs": settings by name}
in place of "config", it compiles nothing and writes {"refusals": ...}, the result of `refusals`.
Lines on stderr that begin with "note: " are shown to the user.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.devices import memory_bytes, out_of_memory, program_bytes
from revnet_jax.errors import StorageError, UserError, tell, writing
from revnet_jax.files import write_atomically
from revnet_jax.optimizers.trainable import Trainable
from revnet_jax.planning import by_part, units
from revnet_jax.planning.chips import chip_of, fillable_bytes
from revnet_jax.planning.topology import LOCAL, Topology, parse_topology, topology_devices
from revnet_jax.planning.variants import as_config
from revnet_jax.programs import traffic
from revnet_jax.programs.counts import arithmetic
from revnet_jax.training.program import StepProgram, recipe_on, step_program

# What `_compile` returns, and a file in the cache holds.
FIGURES = {
    *("out_of_memory", "needed_bytes", "argument_bytes", "traffic", "parts", "compile_seconds"),
}


def main() -> None:
    request = json.loads(sys.stdin.read())
    try:
        topology = parse_topology(request["topology"])
        if "configs" in request:
            print(json.dumps({"refusals": refusals(request["configs"], topology)}))
            return
        step = measure_step(as_config(request["config"]), topology, Path(request["cache_dir"]))
        print(json.dumps({"step": step}))
    except UserError as error:
        # Any other error ends the process; the planner then shows its last line.
        print(json.dumps({"error": str(error)}))


def refusals(configs: Mapping[str, Mapping[str, Any]], topology: Topology) -> dict[str, str]:
    """The configs that cannot be trained on a topology, by name, each with the reason."""
    found, targets = {}, topology_devices(topology)
    for name, settings in configs.items():
        try:
            _check_offload(config := as_config(settings), targets)
            recipe_on(config, targets)
        except UserError as error:
            found[name] = str(error)
    return found


def measure_step(config: ConfigDict, topology: Topology, cache_dir: Path) -> dict[str, Any]:
    """The fields of `CompiledStep`; the compiler's figures are read from the cache if there."""
    targets = topology_devices(topology)
    _check_offload(config, targets)
    if topology.is_gpu:
        # XLA asks the GPU itself for deterministic kernels, which is not there (jax 0.11.2).
        config = config.copy_and_resolve_references()
        config.deterministic = False
    program = step_program(config, targets)
    # Traced before the cache is asked, because the program itself is the key.
    traced = program.step.trace(program.state, program.batch)
    lowered = traced.lower()
    # Options of `jit` are not in the program's text.
    text = f"{lowered.as_text()}\ndeterministic: {config.deterministic}"
    path = cache_dir / f"{_digest(text, topology, targets)}.json"
    compiled = _kept(path)
    cached = compiled is not None
    if compiled is None:
        compiled = _compile(lowered, targets[0], _slices(program))
        # The tuning of a GPU in use may find no memory today, and some tomorrow.
        if not (compiled["out_of_memory"] and topology.name == LOCAL):
            _keep(path, json.dumps(compiled))
    return {
        "num_devices": len(targets),
        "device_kind": targets[0].device_kind,
        # 0 GiB stands for all that the device has.
        "limit_bytes": int(config.memory_limit_gib * 2**30) or _limit_bytes(targets[0]),
        "flops": arithmetic(traced.jaxpr, platform=targets[0].platform),
        "cached": cached,
        **_sizes(program, config),
        **compiled,
    }


def _kept(path: Path) -> dict[str, Any] | None:
    """The figures in the cache; None if they are not there, cut off, or cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= FIGURES else None


def _keep(path: Path, compiled: str) -> None:
    """Writes figures to the cache; on an error prints a note, since the figures are still valid."""
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, compiled)  # another process may read it
    except StorageError as error:
        tell(f"note: {error}")


def _check_offload(config, targets):
    # A CPU's memory is the host's: offloading would free nothing.
    if targets[0].platform == "cpu" and "offload" in config.model.backprop:
        raise ConfigError(
            "config.model.backprop: got offload on a CPU, expected a device with memory of its own"
        )


def asked_bytes(message: str) -> int | None:
    """The bytes that a program needs, from an out-of-memory error; None if it does not say."""
    # The TPU compiler says "(16.50G) exceeds available HBM" or "Used 512.00M of 15.75G hbm".
    found = re.search(r"\(([\d.]+)([BKMGT])\) exceeds", message) or re.search(
        r"Used ([\d.]+)([BKMGT]) of", message
    )
    return units.parse_size(found[1], found[2]) if found else None


def _compile(lowered, device, slices):
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        # A finding like others.
        found = {"out_of_memory": True, "needed_bytes": asked_bytes(str(error))}
        found |= {"argument_bytes": None, "traffic": None, "parts": None}
    else:
        stats, text = compiled.memory_analysis(), compiled.as_text()
        # By part for GPUs alone, because kernel speeds were measured on GPUs only.
        chip = chip_of(device.device_kind) if device.platform == "gpu" else None
        found = {
            "out_of_memory": False,
            "needed_bytes": program_bytes(stats, device.platform),
            "argument_bytes": stats.argument_size_in_bytes,
            "traffic": traffic.traffic(text, slices)._asdict(),
            "parts": by_part.by_part(text, chip) if chip else None,
        }
    return {**found, "compile_seconds": time.monotonic() - started}


def _slices(program: StepProgram) -> list[int]:
    """The slice of each device (on GPUs its host), in the order of the mesh."""
    # Groups of a collective number the devices by their places in the mesh.
    devices = jax.tree.leaves(program.batch)[0].sharding.mesh.devices.flat
    name = "process_index" if devices[0].platform == "gpu" else "slice_index"
    return [getattr(device, name, None) or 0 for device in devices]


def _digest(text: str, topology: Topology, targets: list[Any]) -> str:
    """The cache key: a hash of all that the figures depend on.

    These are the program, devices, compiler and its options, and the code that reads the compiled
    program.
    """
    versions = [jax.__version__, targets[0].client.platform_version, targets[0].device_kind]
    options = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = [text, topology.name, str(len(targets)), *versions, *options]
    parts.append(reading_code(Path(__file__).parents[1]))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def reading_code(package: Path) -> str:
    """The code that compiles and reads programs, without comments and layout.

    By what it says, so that whoever changes how programs are read has no version to count up. Whole
    folders, because a list of modules would miss what these import. Cost: 0.1 s.

    Args:
      package: the folder of revnet_jax.
    """
    files = [package / "devices.py", package / "training" / "compiler.py"]
    for folder in ("planning", "programs"):
        files += sorted((package / folder).glob("*.py"))
    return "\n".join(ast.dump(ast.parse(file.read_text())) for file in files)


def _limit_bytes(device: jax.Device) -> int | None:
    """Memory of a device that programs may use; None if unknown."""
    if device in jax.devices():
        return memory_bytes(device)
    chip = chip_of(device.device_kind)
    return fillable_bytes(chip) if chip else None


def _sizes(program: StepProgram, config: ConfigDict) -> dict[str, int]:
    """Bytes of one device's weights, gradients, optimizer state, and part of a batch."""
    return {
        "weights_bytes": tree_bytes((program.state.variables, program.state.ema)),
        "gradient_bytes": _gradient_bytes(program, config),
        "optimizer_bytes": tree_bytes(program.state.opt_state),
        "batch_bytes": tree_bytes(program.batch),
    }


def _gradient_bytes(program: StepProgram, config: ConfigDict) -> int:
    """Bytes of the gradients that exist at once on one device. Frozen parameters have none.

    With lockstep, chains have the gradient of one layer only. Gradient accumulation has those of
    the microbatch and their sum, in float32 at least.
    """
    trainable, in_chains = Trainable(config.optimizer.trainable), program.task.network.stacked
    params, _ = trainable.divide(program.state.variables.params)
    if config.optimizer.lockstep:
        outside = tree_bytes([tree for name, tree in params.items() if name not in in_chains])
        in_layers = [(params[name], jax.tree.leaves(params[name])) for name in in_chains]
        # All leaves of a stack have one index per layer in front. A frozen chain has no leaves.
        a_layer = [tree_bytes(tree) // leaves[0].shape[0] for tree, leaves in in_layers if leaves]
        return outside + max(a_layer, default=0)
    if config.microbatches == 1:
        return tree_bytes(params)
    of_sum = lambda leaf: tree_bytes(leaf) * max(4, leaf.dtype.itemsize) // leaf.dtype.itemsize
    return tree_bytes(params) + sum(map(of_sum, jax.tree.leaves(params)))


def tree_bytes(tree: Any) -> int:
    """Bytes of one device's shards of all arrays in a tree, from their shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


if __name__ == "__main__":
    main()
