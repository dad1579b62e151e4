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
from revnet_jax.training import build
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.program import jit_step
from revnet_jax.training.sharding import make_mesh, put_batch, shapes_on_mesh
from revnet_jax.training.step import init_state, make_train_step

CONFIGS = {"revnet": image_classification, "vit": vision_transformer, "decoder": language_model}
STEPS = 10
COMPILED = []  # the names of events
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: "backend_compile" in name and COMPILED.append(name)
)


def train(config, dtype, devices):
    """(losses, parameters, mismatches) after some steps."""
    task, schedule, optimizer = build.build_recipe(config)
    mesh = make_mesh(devices, **config.mesh)
    build.check_split(config, mesh)

    def init():
        state = init_state(task.network, optimizer, seed=0)
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), state.variables)
        return state._replace(variables=variables, opt_state=optimizer.init(variables.params))

    there = shapes_on_mesh(init, task.network.rules, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, there)
    state = jax.device_put(exact_jit(init, quickly=True)(), shardings)  # the same on any mesh
    step = make_train_step(task, optimizer, schedule)
    step = jit_step(step, mesh, there, functools.partial(exact_jit, quickly=True))
    rng, batch, losses = np.random.default_rng(0), {}, []
    for name, leaf in task.batch_shapes(config.batch_size).items():
        if leaf.dtype == jnp.float32:
            batch[name] = rng.normal(size=leaf.shape).astype(dtype)
        else:
            batch[name] = rng.integers(10, size=leaf.shape).astype(np.int32)
    for taken in range(STEPS):
        compiled = len(COMPILED)
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append(float(metrics["train_loss"]))
        # What the first one returns lies where the next one takes it.
        assert taken == 0 or len(COMPILED) == compiled
    return losses, jax.tree.map(np.asarray, state.variables.params), float(state.exact_mismatches)


def difference(a, b):
    """The largest of any element, relative to it where it is more than 1."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y) / np.maximum(1, np.abs(y)))) for x, y in pairs)


def main():
    build.DTYPES["float64"] = jnp.float64
    references = {}
    for case in json.load(sys.stdin):
        dtype = case["dtype"]
        with jax.enable_x64(dtype == "float64"):
            config = CONFIGS[case["family"]]()
            settings = {
                k: tuple(v) if isinstance(v, list) else v for k, v in case["settings"].items()
            }
            config.update_from_flattened_dict({**settings, "model.compute_dtype": dtype})
            key = json.dumps([case["family"], case["settings"], dtype])
            if key not in references:
                references[key] = train(config, dtype, jax.devices()[:1])
            config.mesh.update(case["mesh"])
            losses, params, mismatches = train(config, dtype, jax.devices())
            true_losses, true_params, _ = references[key]
            found = {
                "losses": max(
                    abs(a - b) / abs(b) for a, b in zip(losses, true_losses, strict=True)
                ),
                "params": difference(params, true_params),
                "mismatches": mismatches,
                "fell": true_losses[-1] < true_losses[0],
            }
        print(json.dumps({**case, **found}), flush=True)


if __name__ == "__main__":
    main()
