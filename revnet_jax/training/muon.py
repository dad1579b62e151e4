"""Muon: each matrix of momentum is made orthogonal before it is applied.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025 (arXiv:2502.16982).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from jax import lax

from revnet_jax.models.partition import Rules, extent, spec_of

# The authors' values.
MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Root mean square of an update's elements, about that of Adam's (arXiv:2502.16982).
UPDATE_RMS = 0.2
# Groups with the first and the last layer of a model, whose kernels the authors leave to Adam.
ENDS = ("stem", "embed", "head")


def scale_by_muon(
    *, b1: float, b2: float, stacked: Collection[str] | None, rules: Rules = ()
) -> optax.GradientTransformation:
    """Muon for kernels, and Adam for all else: embeddings, norms, biases, and kernels in `ENDS`.

    Muon is Nesterov momentum of 0.95, then `orthogonalize`. Its updates are as large as Adam's are
    (Liu et al. 2025), so that both share one learning rate and one weight decay. The
    best rate need not be AdamW's: for a model of width 128 it was twice that.

    What is one matrix goes by a kernel's name and shape, after the axis of layers if it has one:

      kernel [in, out]            all of it; queries, keys and values are one: which columns are
                                  whose is not known here, and a small language model that took
                                  each on its own ended at the same loss
      kernel [in, parts, out]     each part: the gate and the value of a SwiGLU
      kernel [h, w, in, out]      a convolution, as [h * w * in, out]
      ..._kernel [experts, ...]   that of each expert

    On a mesh each device has whole matrices of its own share of a stack's layers (or a kernel's
    experts), for one exchange of the momentum before and one of the update after: no product needs
    another device. A kernel that is one matrix alone, as in lockstep, is gathered, and every
    device does the same. Devices along "data" do the same, too.

    b1, b2: Adam's. stacked: as of `make_optimizer`. rules: how parameters lie on a mesh.

    Memory: one moment of each kernel where Adam has two. Arithmetic: 20 m^2 n + 10 m^3 operations
    for a matrix [m, n], m <= n: at most 5 m / tokens of the 6 m n tokens that a step computes with
    it. They are done in the gradient's dtype, float32, where the authors take bfloat16. On GPUs and
    TPUs that costs memory traffic but no time in the products, which JAX's default precision
    computes in TF32 and bfloat16; `jax_default_matmul_precision` changes that.

    Raises ValueError for a kernel of any other shape.
    """

    def labels(params):
        label = lambda path, _: "muon" if _is_hidden_kernel(path, stacked) else "adam"
        return jax.tree_util.tree_map_with_path(label, params)

    def orthogonal(updates, state, params=None):
        one = lambda path, leaf: _orthogonal_on_mesh(path, leaf, stacked, rules)
        return jax.tree_util.tree_map_with_path(one, updates), state

    muon = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.GradientTransformation(lambda params: optax.EmptyState(), orthogonal),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam(b1, b2)}, labels)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Each matrix [..., in, out] with all singular values near 1, times 0.2 sqrt(max(in, out)).

    Five Newton-Schulz iterations with coefficients that bring small singular values up fast, and
    all of them to within about 0.3 of 1 (Jordan et al. 2024). The factor makes the root mean square
    of the elements about 0.2. Zeros stay zeros.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    a, b, c = COEFFICIENTS
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = UPDATE_RMS * math.sqrt(x.shape[-1]) * x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _is_hidden_kernel(path, stacked):
    at_an_end = stacked is not None and _name(path[:1]) in ENDS
    return _name(path[-1:]).endswith("kernel") and not at_an_end


def _orthogonal_on_mesh(path, leaf, stacked, rules):
    """`_orthogonal`, where parts of matrices lie on several devices."""
    layers = stacked is not None and _name(path[:1]) in stacked
    leading = layers + (_name(path[-1:]) != "kernel")  # axes of layers, of experts
    mesh = jax.sharding.get_abstract_mesh()
    split = spec_of(rules, _name(path), leaf.shape, mesh)
    sizes = dict(mesh.shape)
    cuts = [(axis, dim) for dim, axis in enumerate(split) if axis and extent(axis, sizes) > 1]
    if not cuts:
        return _orthogonal(leaf, leading)
    # By hand, so that no compiler splits the products or gathers what it could exchange.
    compute = _exchanged if leading else _gathered
    one = functools.partial(compute, cuts, functools.partial(_orthogonal, leading=leading))
    mapped = jax.shard_map(one, in_specs=split, out_specs=split, check_vma=False)
    if not leading:
        return mapped(leaf)
    devices = math.prod(extent(axis, sizes) for axis, _ in cuts)
    missing = [(0, -len(leaf) % devices)] + [(0, 0)] * (leaf.ndim - 1)
    return mapped(jnp.pad(leaf, missing))[: len(leaf)]


def _exchanged(cuts, function, part):
    """Each device has some of the first axis, whole, in place of a part of everything."""
    for axis, dim in cuts:
        part = lax.all_to_all(part, axis, 0, dim, tiled=True)
    part = function(part)
    for axis, dim in reversed(cuts):
        part = lax.all_to_all(part, axis, dim, 0, tiled=True)
    return part


def _gathered(cuts, function, part):
    """Every device has everything, and keeps its part of the result."""
    whole = part
    for axis, dim in cuts:
        whole = lax.all_gather(whole, axis, axis=dim, tiled=True)
    whole = function(whole)
    for axis, dim in cuts:
        size = part.shape[dim]
        whole = lax.dynamic_slice_in_dim(whole, lax.axis_index(axis) * size, size, dim)
    return whole


def _orthogonal(leaf, leading):
    """A kernel with each of its matrices, which come after so many leading axes, orthogonalized."""
    dims = leaf.ndim - leading
    if dims == 2:
        return orthogonalize(leaf)
    if dims == 3:
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(leaf, -3, -2)), -3, -2)
    if dims == 4:
        flat = leaf.reshape(*leaf.shape[:leading], -1, leaf.shape[-1])
        return orthogonalize(flat).reshape(leaf.shape)
    raise ValueError(
        f"got a kernel of shape {leaf.shape[leading:]} for muon, expected [in, out], "
        "[in, parts, out] or [height, width, in, out]: take adamw, or another name than kernel"
    )


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
