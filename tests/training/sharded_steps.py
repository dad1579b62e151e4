"""Trains a few steps on one device and on a mesh of eight, and prints how far apart they end.

    python tests/training/sharded_steps.py < cases.json

A program of its own, with eight simulated devices. A case has the settings of a config by dotted
key, "family", "mesh" (sizes by axis) and "dtype".
"""

import functools
import json
import os
import sys

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["PJRT_NPROC"] = "32"  # a device may block several threads in collectives
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # flax's float64 statistics fail under strict

import jax
import jax.numpy as jnp
import numpy as np

from revnet_jax.config import image_classification, language_model, vision_transformer
from revnet_jax.core import trees
from revnet_jax.training import build
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.program import jit_step
from revnet_jax.training.sharding import make_mesh, put_batch, shapes_on_mesh
from revnet_jax.training.step import init_state, make_train_step

CONFIGS = {"revnet": image_classification, "vit": vision_transformer, "decoder": language_model}
STEPS = 10
COMPILED = []  # an entry for each compilation
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: "backend_compile" in name and COMPILED.append(name)
)


def random_batch(task, batch_size, dtype):
    """Normal numbers where the task takes float32, and integers from 0 to 9 elsewhere."""
    rng, batch = np.random.default_rng(0), {}
    for name, leaf in task.batch_shapes(batch_size).items():
        if leaf.dtype == jnp.float32:
            batch[name] = rng.normal(size=leaf.shape).astype(dtype)
        else:
            batch[name] = rng.integers(10, size=leaf.shape).astype(np.int32)
    return batch


def train(config, dtype, devices):
    """(losses, parameters, mismatches) after some steps."""
    task, schedule, optimizer = build.build_recipe(config)
    mesh = make_mesh(devices, **config.mesh)
    build.check_split(config, mesh)

    def init():
        state = init_state(task.network, optimizer, seed=0)
        cast = lambda leaf: leaf.astype(dtype) if trees.is_inexact(leaf) else leaf
        variables = jax.tree.map(cast, state.variables)
        return state._replace(variables=variables, opt_state=optimizer.init(variables.params))

    shapes = shapes_on_mesh(init, task.network.rules, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    # Random numbers can depend on the mesh: draw on one device, then place.
    state = jax.device_put(exact_jit(init, quickly=True)(), shardings)
    step = make_train_step(task, optimizer, schedule)
    step = jit_step(step, mesh, shapes, functools.partial(exact_jit, quickly=True))
    batch, losses = random_batch(task, config.batch_size, dtype), []
    for taken in range(STEPS):
        compiled = len(COMPILED)
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append(float(metrics["train_loss"]))
        # A step returns its state with the shardings that the next one takes: it compiles once.
        assert taken == 0 or len(COMPILED) == compiled
    return losses, jax.tree.map(np.asarray, state.variables.params), float(state.exact_mismatches)


def difference(a, b):
    """The largest of any element, relative to it where it is more than 1."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y) / np.maximum(1, np.abs(y)))) for x, y in pairs)


def configured(case):
    """The config of a case, without its mesh."""
    config = CONFIGS[case["family"]]()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in case["settings"].items()}
    config.update_from_flattened_dict({**settings, "model.compute_dtype": case["dtype"]})
    return config


def compare(case, trained, reference):
    """The case, with how far what was trained on its mesh is from one device's reference."""
    losses, params, mismatches = trained
    true_losses, true_params, _ = reference
    relative = [abs(a - b) / abs(b) for a, b in zip(losses, true_losses, strict=True)]
    return {
        **case,
        "losses": max(relative),
        "params": difference(params, true_params),
        "mismatches": mismatches,
        "fell": true_losses[-1] < true_losses[0],
    }


def main():
    build.DTYPES["float64"] = jnp.float64
    references = {}  # results on one device, which cases with several meshes share
    for case in json.load(sys.stdin):
        dtype, config = case["dtype"], configured(case)
        key = json.dumps([case["family"], case["settings"], dtype])
        with jax.enable_x64(dtype == "float64"):
            if key not in references:
                references[key] = train(config, dtype, jax.devices()[:1])
            config.mesh.update(case["mesh"])
            trained = train(config, dtype, jax.devices())
        print(json.dumps(compare(case, trained, references[key])), flush=True)


if __name__ == "__main__":
    main()
