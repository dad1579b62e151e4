"""The Muon optimizer: orthogonalizes the momentum of each weight matrix before applying it.

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
# Root mean square of the elements of an update, about that of Adam (arXiv:2502.16982).
UPDATE_RMS = 0.2
# Groups with the first or the last layer of a model. The authors leave their kernels to Adam.
ENDS = ("stem", "embed", "head")


def scale_by_muon(
    *, b1: float, b2: float, stacked: Collection[str] | None, rules: Rules = ()
) -> optax.GradientTransformation:
    """Muon for kernels; Adam for embeddings, norms, biases, and kernels in `ENDS`.

    Muon is Nesterov momentum of 0.95, then `orthogonalize`. Its updates are as large as Adam's (Liu
    et al. 2025), so that both share one learning rate and one weight decay. The best rate can
    differ from that of AdamW: for a model of width 128 it was twice as large.

    The name and shape of a kernel, after its axis of layers if it has one, say which matrices it
    consists of:

      kernel [in, out]            one matrix. Queries, keys and values count as one, because their
                                  columns are not known here; a small language model with each
                                  on its own ended at the same loss
      kernel [in, parts, out]     one matrix per part: the gate and the value of a SwiGLU
      kernel [h, w, in, out]      a convolution: one matrix [h * w * in, out]
      ..._kernel [experts, ...]   as above, for each expert

    On a mesh the layers of a stack (or the experts of a kernel) are dealt out to the devices, so
    that each has whole matrices and no product needs another device. This takes one all-to-all of
    the momentum before and one of the update after. A kernel of a single matrix, as in lockstep, is
    all-gathered and every device computes the same. Devices along "data" always compute the same.

    Args:
      b1: of Adam, for the parameters that are left to it.
      b2: likewise.
      stacked: see `make_optimizer`.
      rules: how the parameters are split over a mesh.

    Memory: one moment per kernel, where Adam has two. Arithmetic: 20 m^2 n + 10 m^3 operations for
    a matrix [m, n], m <= n, which is at most 5 m / tokens of the 6 m n tokens that a training step
    computes with it. Products are in the dtype of the gradient, float32, where the authors take
    bfloat16. On GPUs and TPUs this costs memory traffic but no time in the products, which JAX's
    default precision computes in TF32 and bfloat16; `jax_default_matmul_precision` changes that.

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
    """Brings all singular values of each matrix [..., in, out] near 0.2 sqrt(max(in, out)).

    Five Newton-Schulz iterations bring them to within about 0.3 of 1, with coefficients that raise
    small singular values fast (Jordan et al. 2024). The factor then makes the root mean square of
    the elements about 0.2. Zeros stay zeros.
    """
    # [m, n] with m <= n from here on, so that Gram matrices are [m, m], the smaller ones.
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    a, b, c = COEFFICIENTS
    # The Frobenius norm is no less than the largest singular value, so all are in [0, 1], where the
    # iterations work. 1e-8 lets a matrix of zeros stay one.
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-8)
    # Each singular value s becomes a s + b s^3 + c s^5.
    for _ in range(ITERATIONS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    # The elements of orthonormal rows of length n have a root mean square of 1 / sqrt(n).
    x = UPDATE_RMS * math.sqrt(x.shape[-1]) * x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _is_hidden_kernel(path, stacked):
    # Without `stacked` the tree is of one layer, and its paths do not begin with a group.
    at_an_end = stacked is not None and _name(path[:1]) in ENDS
    return _name(path[-1:]).endswith("kernel") and not at_an_end


def _orthogonal_on_mesh(path, leaf, stacked, rules):
    """`_orthogonal` on a mesh, where matrices may be split over several devices."""
    layers = stacked is not None and _name(path[:1]) in stacked
    leading = layers + (_name(path[-1:]) != "kernel")  # axes of layers, of experts
    mesh = jax.sharding.get_abstract_mesh()
    split = spec_of(rules, _name(path), leaf.shape, mesh)
    sizes = dict(mesh.shape)
    # For each dimension that is really split: (mesh axis, dimension).
    cuts = [(axis, dim) for dim, axis in enumerate(split) if axis and extent(axis, sizes) > 1]
    if not cuts:
        return _orthogonal(leaf, leading)
    # With shard_map, because the compiler might split the products, or use an all-gather in place
    # of the all-to-all.
    compute = _exchanged if leading else _gathered
    one = functools.partial(compute, cuts, functools.partial(_orthogonal, leading=leading))
    mapped = jax.shard_map(one, in_specs=split, out_specs=split, check_vma=False)
    if not leading:
        return mapped(leaf)
    devices = math.prod(extent(axis, sizes) for axis, _ in cuts)
    # Matrices of zeros fill up the last devices. They stay zeros, and are cut off again.
    missing = [(0, -len(leaf) % devices)] + [(0, 0)] * (leaf.ndim - 1)
    return mapped(jnp.pad(leaf, missing))[: len(leaf)]


def _exchanged(cuts, function, part):
    """Applies `function` between two all-to-alls, so that each device has whole layers in it."""
    for axis, dim in cuts:
        # [L, .., n / d] -> [L / d, .., n]: whole matrices of fewer layers.
        part = lax.all_to_all(part, axis, 0, dim, tiled=True)
    part = function(part)
    # In the opposite order, so that each layer returns to its place.
    for axis, dim in reversed(cuts):
        part = lax.all_to_all(part, axis, dim, 0, tiled=True)
    return part


def _gathered(cuts, function, part):
    """Applies `function` after an all-gather; each device keeps its own part of the result."""
    whole = part
    for axis, dim in cuts:
        whole = lax.all_gather(whole, axis, axis=dim, tiled=True)
    whole = function(whole)
    for axis, dim in cuts:
        size = part.shape[dim]
        whole = lax.dynamic_slice_in_dim(whole, lax.axis_index(axis) * size, size, dim)
    return whole


def _orthogonal(leaf, leading):
    """Orthogonalizes each matrix of a kernel. leading: number of axes of layers and experts."""
    dims = leaf.ndim - leading
    if dims == 2:  # [.., in, out]
        return orthogonalize(leaf)
    if dims == 3:  # [.., in, parts, out], as matrices [.., parts, in, out]
        return jnp.swapaxes(orthogonalize(jnp.swapaxes(leaf, -3, -2)), -3, -2)
    if dims == 4:  # [.., h, w, in, out], as matrices [.., h * w * in, out]
        flat = leaf.reshape(*leaf.shape[:leading], -1, leaf.shape[-1])
        return orthogonalize(flat).reshape(leaf.shape)
    raise ValueError(
        f"got a kernel of shape {leaf.shape[leading:]} for muon, expected [in, out], "
        "[in, parts, out] or [height, width, in, out]: take adamw, or rename it"
    )


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
