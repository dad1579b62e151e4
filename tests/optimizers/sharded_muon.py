"""Compiles Muon's update for a mesh of eight, and prints what is sent and how far off it is.

    python tests/optimizers/sharded_muon.py

A program of its own, with eight simulated devices. Of a stack of layers, and of one layer, as in
lockstep.
"""

import collections
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PJRT_NPROC"] = "32"  # a device may block several threads in collectives
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "True"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # optax's Adam fails under strict

import jax
import jax.numpy as jnp
import numpy as np

from revnet_jax.models.transformer.lm import LanguageModel
from revnet_jax.optimizers.muon import scale_by_muon
from revnet_jax.programs import hlo
from revnet_jax.programs.collectives import kind_of
from revnet_jax.training.compiler import exact_jit
from revnet_jax.training.sharding import make_mesh, on_mesh, shapes_on_mesh

SHAPES = (
    {"qkv": {"kernel": (3, 16, 48)}, "out": {"kernel": (3, 16, 16)}, "scale": (3, 16)},
    {
        "up": {"kernel": (3, 16, 2, 40)},
        "up_kernel": (3, 4, 16, 2, 40),
        "down_kernel": (3, 4, 40, 16),
    },
)


def main():
    rng = np.random.default_rng(0)
    is_shape = lambda node: isinstance(node, tuple) and isinstance(node[0], int)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape))
    stack = {"layers": jax.tree.map(draw, SHAPES, is_leaf=is_shape)}
    one = jax.tree.map(lambda leaf: leaf[0], stack["layers"])
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}):
        mesh = make_mesh(jax.devices(), data=1, **sizes)
        for grads, stacked in ((stack, ["layers"]), (one, None)):
            rules = LanguageModel.rules
            optimizer = scale_by_muon(b1=0.9, b2=0.99, stacked=stacked, rules=rules)
            init = lambda grads=grads, optimizer=optimizer: (grads, optimizer.init(grads))
            there = shapes_on_mesh(init, rules, mesh)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, there)
            update = exact_jit(
                on_mesh(optimizer.update, mesh), quickly=True, out_shardings=shardings
            )
            compiled = update.lower(*there).compile()
            module = hlo.parse(compiled.as_text())
            kinds = [
                kind_of(instruction)
                for computation in module.computations.values()
                for instruction in computation.instructions.values()
            ]
            found, _ = compiled(*jax.device_put(init(), shardings))
            expected, _ = exact_jit(optimizer.update, quickly=True)(*init())
            pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
            result = {
                "mesh": sizes,
                "layers": stacked is not None,
                "sent": dict(sorted(collections.Counter(filter(None, kinds)).items())),
                "difference": max(float(np.max(np.abs(a - np.asarray(b)))) for a, b in pairs),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
