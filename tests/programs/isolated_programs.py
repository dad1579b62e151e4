"""Compiles small networks for a topology, and says which parts of their branches differ where.

    python -m tests.programs.isolated_programs h100:1 mlp decoder ...

Prints a line of JSON for each: how many isolated parts the forward pass and the rewind have, and
lists of [name, op_name, program] of those that are not found in the rewind: of its forward pass
(`forward`), of the whole of `store` (`store`), and of the rewind of a mixture (`mixture`); and the
same of programs that may lay out their arrays in another way (`forward but for layouts`, ...).
`--fused` compiles them without barriers, as a program that must not pass.
"""

import json
import runpy
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from revnet_jax.config import image_classification, language_model
from revnet_jax.core import (
    Exactness,
    Invertible,
    Section,
    affine,
    bdia_block,
    isolate,
    multi_stream_block,
    reversible_block,
    sequence,
    symplectic_block,
)
from revnet_jax.planning.topology import parse_topology, topology_devices
from revnet_jax.programs.same_program import isolated_parts, not_found
from revnet_jax.training.program import step_program

ROWS, WIDTH, LAYERS = 512, 256, 3


def mlp(params, *args):
    """A sum over features, products in bfloat16, and an elementwise function between them."""
    *reads, context = args
    x = sum(reads[1:], start=reads[0])
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    hidden = (x * scale * params["scale"]).astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
    hidden = jax.nn.gelu(hidden) @ params["v"].astype(jnp.bfloat16)
    return hidden + context.shared.astype(jnp.bfloat16)


def mlp_params(layers=LAYERS):
    shape = lambda *dims: jax.ShapeDtypeStruct((layers, *dims), jnp.float32)
    wide = {"w": shape(WIDTH, 2 * WIDTH), "v": shape(2 * WIDTH, WIDTH)}
    return wide | {"scale": shape(WIDTH)}


def pair(params, x, context):
    u = mlp(params, x, context)
    return jnp.tanh(u), u


def energy(params, x, context):
    return jnp.sum(jnp.tanh(mlp(params, x, context)).astype(jnp.float32))


def gamma(context):
    return jnp.where(context.data > 0, 0.5, -0.5)


def flip(params, x, context):
    return x[::-1]


def blocks():
    """Sections by name; every section's layer gets `mlp_params` for each of its half-steps."""
    plain, params = reversible_block(mlp, mlp), mlp_params()
    signs_L = jax.ShapeDtypeStruct((LAYERS, 2, ROWS, 1), jnp.float32)
    alone = mlp_params(1)
    return {
        "mlp": [Section(plain, (params,) * 2)],
        "affine": [Section(reversible_block(pair, pair, coupling=affine()), (params,) * 2)],
        "bdia": [Section(bdia_block(mlp, mlp, gamma=gamma), (params,) * 2, data_L=signs_L)],
        "symplectic": [Section(symplectic_block(energy, energy, step=0.1), (params,) * 2)],
        "three streams": [Section(multi_stream_block((mlp,) * 3), (params,) * 3)],
        "invertible": [Section(Invertible(shear, unshear), params)],
        "single layers": [
            Section(plain, (alone,) * 2),
            Section(Invertible(flip, flip), length=1),
            Section(plain, (params,) * 2),
            Section(plain, (alone,) * 2),
        ],
    }


def shear(params, x, context):
    return x[0] + mlp(params, x[1], context).astype(jnp.float32), x[1]


def unshear(params, y, context):
    return y[0] - mlp(params, y[1], context).astype(jnp.float32), y[1]


def chain_texts(name, device, settings):
    """The gradient of a sequence's loss, compiled, for each of some settings."""
    on_device = SingleDeviceSharding(device)
    place = lambda tree: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_device), tree
    )
    sections = blocks()[name]
    num_streams = 3 if name == "three streams" else 2
    stream = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
    shared = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
    arrays = [(s.params_L, s.data_L) for s in sections]

    def loss(params, x, shared, probe, data, setting):
        filled = [
            s._replace(params_L=params_L, data_L=data_L)
            for s, params_L, data_L in zip(sections, params, data, strict=True)
        ]
        y, _ = sequence(filled, x, shared=shared, probe=probe, **setting)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in y)

    params, data = zip(*arrays, strict=True)
    probe = jax.eval_shape(Exactness.probe)
    arguments = place((params, (stream,) * num_streams, shared, probe, data))
    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    for setting in settings:
        run = jax.jit(lambda *args, setting=setting: gradient(*args, setting))
        yield run.lower(*arguments).compile().as_text()


DECODER = {
    "data.context": 512,
    "batch_size": 4,
    "model.layers": LAYERS,
    "model.width": 256,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.hidden": 512,
    "model.compute_dtype": "bfloat16",
    "model.loss_chunk": 512,
}
ADAPTED = {"model.lora_rank": 8, "optimizer.trainable": "lora"}
REVNET = {
    "batch_size": 32,
    "model.units": (1, 3),
    "model.channels": (16, 16, 32),
    "model.compute_dtype": "bfloat16",
}
NETWORKS = {
    "decoder": (language_model, DECODER),
    "decoder, chunked": (language_model, {**DECODER, "model.attention": "chunked"}),
    "decoder, float32": (
        language_model,
        {**DECODER, "model.compute_dtype": "float32", "model.kv_heads": 4},
    ),
    "decoder, unrolled": (language_model, {**DECODER, "model.unroll": LAYERS}),
    "decoder, operands kept": (language_model, {**DECODER, "model.keep_operands": True}),
    "decoder, dropout": (language_model, {**DECODER, "model.dropout": 0.1}),
    "decoder, experts": (language_model, {**DECODER, "model.experts": 4}),
    "decoder, windows": (
        language_model,
        {**DECODER, "model.window": 64, "data.end_token": 0, "model.separate_documents": True},
    ),
    "decoder, BDIA": (language_model, {**DECODER, "model.integrator": "bdia"}),
    "decoder, LoRA": (language_model, {**DECODER, **ADAPTED}),
    "decoder, MEFT": (
        language_model,
        {**DECODER, **ADAPTED, "model.integrator": "meft", "optimizer.trainable": "lora|adapter"},
    ),
    "decoder, 8 bits": (language_model, {**DECODER, **ADAPTED, "model.frozen_dtype": "int8"}),
    "RevViT": (
        "vit_s_cifar10",
        {
            "batch_size": 8,
            "model.layers": LAYERS,
            "model.width": 192,
            "model.heads": 3,
            "model.hidden": 384,
            "model.compute_dtype": "bfloat16",
        },
    ),
    "RevNet-38": ("cifar10_revnet38", {"batch_size": 32, "model.compute_dtype": "bfloat16"}),
    "i-RevNet": ("cifar10_irevnet", {"batch_size": 32, "model.compute_dtype": "bfloat16"}),
    "RevNet": (image_classification, REVNET),
    "RevNet, layers alone": (image_classification, {**REVNET, "model.units": (2, 2)}),
}


def network_texts(name, device, settings):
    """A training step, compiled, for each of some settings of `config.model`."""
    make, changes = NETWORKS[name]
    if isinstance(make, str):
        make = runpy.run_path(f"configs/{make}.py")["get_config"]
    for setting in settings:
        config = make()
        config.update_from_flattened_dict(changes)
        config.model.update(setting)
        program = step_program(config, [device])
        yield program.step.lower(program.state, program.batch).compile().as_text()


def differences(name, device):
    """What the module's docstring says, of the parts of one network's branches."""
    of_network = name in NETWORKS
    texts = network_texts if of_network else chain_texts
    strategies = [{"backprop": "reverse"}, {"backprop": "store"}, {"stored_layers": 1}]
    reversed_text, stored_text, mixed_text = texts(name, device, strategies)
    found = {"name": name}
    for suffix, layouts in (("", True), (" but for layouts", False)):
        parts = lambda text, scope, layouts=layouts: isolated_parts(text, scope, layouts=layouts)
        forward, rewind = parts(reversed_text, "forward"), parts(reversed_text, "rewind")
        found |= {f"parts{suffix}": len(forward), f"rewind{suffix}": len(rewind)}
        found[f"forward{suffix}"] = not_found(forward, rewind)
        found[f"store{suffix}"] = not_found(parts(stored_text, "forward"), rewind)
        found[f"mixture{suffix}"] = not_found(parts(mixed_text, "rewind"), rewind)
    return found


def main() -> None:
    topology, *names = sys.argv[1:]
    if "--fused" in names:
        names.remove("--fused")
        isolate._barrier = lambda *leaves: leaves
    (device, *_) = topology_devices(parse_topology(topology))
    for name in names:
        print(json.dumps(differences(name, device)), flush=True)


if __name__ == "__main__":
    main()
