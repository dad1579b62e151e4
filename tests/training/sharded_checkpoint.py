"""Saves a state on eight devices, restores it on four, on one, and on eight again.

    python tests/training/sharded_checkpoint.py FOLDER

A program of its own, with eight simulated devices; fails where a bit or a place differs.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from revnet_jax.config import language_model
from revnet_jax.runs.checkpoint import Checkpoints
from revnet_jax.training.build import build_recipe
from revnet_jax.training.compiler import initialized
from revnet_jax.training.sharding import make_mesh, shapes_on_mesh
from revnet_jax.training.step import init_state

SIZES = {"model.layers": 2, "model.width": 32, "model.heads": 4, "model.kv_heads": 2}
MESHES = [(8, 2, 2, 2), (4, 1, 2, 2), (1, 1, 1, 1), (8, 1, 8, 1)]  # devices, data, fsdp, tensor


def bits(state):
    words = lambda x: (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )
    return [np.asarray(words(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def main():
    config = language_model()
    changes = {"model.hidden": 48, "optimizer.lockstep": True, "optimizer.state_dtype": "float8"}
    config.update_from_flattened_dict({**SIZES, **changes})
    task, _, optimizer = build_recipe(config)
    init = lambda: init_state(task.network, optimizer, seed=0)
    state, expected = None, None
    for step, (devices, data, fsdp, tensor) in enumerate(MESHES):
        mesh = make_mesh(jax.devices()[:devices], data=data, fsdp=fsdp, tensor=tensor)
        abstract = shapes_on_mesh(init, task.network.rules, mesh)
        options = {"best_metric": None, "best_mode": "min"}
        with Checkpoints(sys.argv[1], **options) as checkpoints:
            if state is None:
                state = initialized(init, abstract)
                expected = bits(state)
            else:
                restored_step, state = checkpoints.restore(abstract)
                assert restored_step == step - 1
            assert bits(state) == expected
            for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)
            checkpoints.save(step, state)


if __name__ == "__main__":
    main()
