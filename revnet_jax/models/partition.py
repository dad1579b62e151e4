"""Sharding: how a model's arrays are split over a mesh of devices, by rules next to each model.

A mesh has the axes "data", "fsdp", "sequence" and "tensor". Batches are split over the first two.
Weights are split over "fsdp" (Rajbhandari et al. 2019, arXiv:1910.02054, stage 3; Zhao et al. 2023,
arXiv:2304.11277), and all-gathered where they are used. "sequence" splits the tokens of each
sequence, and further splits the weights. "tensor" splits heads and hidden units, and the
arithmetic with them (Shoeybi et al. 2019, arXiv:1909.08053). Without a mesh, the functions here
change nothing.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from revnet_jax.core import GATHERED, trees

# (pattern searched for in a leaf's path, mesh axis of each of the leaf's last dimensions). The
# first rule that matches is used.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
BATCH = ("data", "fsdp")
# A rule's "fsdp" stands for both axes if sequences are split, because the devices that share a
# sequence use the same weights.
WEIGHTS = ("fsdp", "sequence")


def spec_of(rules: Rules, path: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The sharding of a leaf by its rule, leaving out axes that do not divide their dimension.

    Args:
      mesh: a `Mesh` or an `AbstractMesh`.

    Leaves without a rule are replicated.
    """
    for pattern, axes in rules:
        # A rule is of the last dimensions, because stacked layers have one more in front.
        if re.search(pattern, path) and len(axes) <= len(shape):
            break
    else:
        return PartitionSpec()
    sizes = dict(mesh.shape)
    if sizes.get("sequence", 1) > 1:
        axes = [WEIGHTS if axis == "fsdp" else axis for axis in axes]
    # An axis that the mesh lacks counts as size + 1 devices, which never divide the size.
    split = [
        axis if axis is not None and size % extent(axis, sizes, size + 1) == 0 else None
        for size, axis in zip(shape[len(shape) - len(axes) :], axes, strict=True)
    ]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *split)


def extent(axes: Any, sizes: dict[str, int], missing: int = 1) -> int:
    """The number of devices along one or several mesh axes.

    Args:
      missing: the size to assume for an axis that the mesh does not have.
    """
    return math.prod(sizes.get(axis, missing) for axis in _tuple(axes))


def _tuple(axes):
    return axes if isinstance(axes, tuple) else (axes,)


def gather(rules: Rules, group: str, params: Any, dtype: Any) -> Any:
    """All-gathers weights along `WEIGHTS` for use; their gradients are reduce-scattered.

    Args:
      group: the path of `params`.
      dtype: that the weights are used in; sharded weights are cast to it before they are sent.

    Cost: one all-gather, and one reduce-scatter of the gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Without a mesh, too, nothing is split.
    if all(dict(mesh.shape).get(axis, 1) == 1 for axis in WEIGHTS):
        return params

    def gathered(path, leaf):
        split = spec_of(rules, _name(group, path), leaf.shape, mesh)
        whole = PartitionSpec(*(None if axis in ("fsdp", WEIGHTS) else axis for axis in split))
        if split == whole:
            return leaf
        leaf = leaf.astype(dtype) if trees.is_inexact(leaf) else leaf
        # Named, so that no strategy keeps gathered weights: those of all layers would exist at
        # once.
        return checkpoint_name(_gathered(split, whole, leaf), GATHERED)

    return jax.tree_util.tree_map_with_path(gathered, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(split, whole, leaf):
    # Constrained to the sharded layout first: a compiler might otherwise gather the leaf before it
    # is cast, in more bytes.
    return lax.with_sharding_constraint(lax.with_sharding_constraint(leaf, split), whole)


def _gathered_fwd(split, whole, leaf):
    return _gathered(split, whole, leaf), None


def _gathered_bwd(split, whole, _, cotangent):
    # The constraint's own derivative would be an all-reduce: every device would hold the whole
    # gradient.
    return (lax.with_sharding_constraint(cotangent, split),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def on_batch(tree: Any) -> Any:
    """Constrains arrays and their cotangents to be sharded over the batch, their first axis, only.

    If sequences are split, the second axis is that of tokens, and is sharded too.

    For the inputs and outputs of branches. Without the constraint a compiler may partition the
    rewind differently from the forward pass, and then sums in another order and rounds differently.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    spec = PartitionSpec(batch_axes(mesh), *sequence_axis(mesh))
    # The derivative of a constraint is the same constraint, so it holds for cotangents too.
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, spec), tree)


def on_sequence(tree: Any) -> Any:
    """Shards arrays whose first axis is that of tokens, if sequences are split."""
    axis = sequence_axis(jax.sharding.get_abstract_mesh())
    if not axis:
        return tree
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, jax.P(*axis)), tree)


def whole_sequences(tree: Any) -> Any:
    """Shards arrays over the batch, their first axis, only: gathers them along sequences."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    spec = PartitionSpec(batch_axes(mesh))
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, spec), tree)


def by_heads(
    attend: Callable[..., jax.Array], q_BTNK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array
) -> jax.Array:
    """Sequence parallelism: `attend(q, k, v)` on whole sequences and a part of the heads.

    An all-to-all exchanges tokens for heads before the attention, and heads for tokens after it
    (Jacobs et al. 2023, arXiv:2309.14509). So any kernel can be used, causal attention is balanced
    over the devices, and no device holds keys and values of all heads. The number of heads must be
    a multiple of the number of devices ("sequence" times "tensor"); key-value heads are repeated
    until they are. If sequences are not split, this is `attend(q, k, v)`.

    Cost: each of n devices sends (n - 1) / n of its own q, k, v and result, once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not sequence_axis(mesh):
        return attend(q_BTNK, k_BTGK, v_BTGK)
    # How devices hold tokens and heads outside of attention, and within it.
    of_tokens, of_heads = (BATCH, "sequence", "tensor"), (BATCH, None, ("tensor", "sequence"))
    parts, G = extent(("tensor", "sequence"), dict(mesh.shape)), k_BTGK.shape[2]
    # Tiled: parts are joined along an axis that is there already.
    exchange = functools.partial(lax.all_to_all, axis_name="sequence", tiled=True)
    to_heads = functools.partial(exchange, split_axis=2, concat_axis=1)
    to_tokens = functools.partial(exchange, split_axis=1, concat_axis=2)
    # The fewest copies that the devices can share evenly. Copies lie side by side, so that a group
    # of query heads still finds its key-value head.
    repeated = lambda x: to_heads(jnp.repeat(x, math.lcm(parts, G) // G, axis=2))
    q_BTNK = by_device(to_heads, (of_tokens,), of_heads)(q_BTNK)
    k_BTGK, v_BTGK = (by_device(repeated, (of_tokens,), of_heads)(x) for x in (k_BTGK, v_BTGK))
    return by_device(to_tokens, (of_heads,), of_tokens)(attend(q_BTNK, k_BTGK, v_BTGK))


def batch_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that batches are split over."""
    return tuple(axis for axis in BATCH if axis in mesh.axis_names)


def sequence_axis(mesh: Any) -> tuple[str, ...]:
    """The axis that the tokens of a sequence are split over, or () if they are not."""
    return ("sequence",) if dict(mesh.shape).get("sequence", 1) > 1 else ()


def by_device(
    function: Callable[..., Any], in_axes: Sequence[tuple], out_axes: tuple
) -> Callable[..., Any]:
    """Wraps a function in `shard_map`, for arithmetic that compilers cannot partition.

    Args:
      in_axes: for each dimension of an argument, or of the result, the mesh axis or axes that it
        is split over. Arguments are replicated over the other axes, and their gradients summed over
        them.
      out_axes: the same for the dimensions of the result.

    Without a mesh it returns the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    spec = lambda dims: PartitionSpec(
        *(tuple(axis for axis in _tuple(axes) if axis in mesh.axis_names) for axes in dims)
    )
    # No check of the axes over which results vary: Pallas kernels do not declare them.
    in_specs = tuple(map(spec, in_axes))
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False)


def by_batch(
    function: Callable[..., Any], rules: Rules, group: str, dtype: Any
) -> Callable[..., Any]:
    """Wraps `function(params, *batches)` in `shard_map`, each device computing its own tokens.

    For weights that are used in a loop over parts of the tokens: they are all-gathered once, and
    each device sums the gradients of its own tokens before it sends any. rules, group and dtype
    are as for `gather`. If sequences are split, batches and the result have the axes [B, T, ...]; a
    sum over a device's tokens has shape [1, 1]. Compilers still partition the arithmetic inside
    over "tensor".
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size 1 are left out. With no axis left to map, shard_map would confuse manual and
    # automatic sharding.
    batch = tuple(axis for axis in batch_axes(mesh) if mesh.shape[axis] > 1)
    axes = (*batch, *sequence_axis(mesh))
    if not axes:
        return function

    def split(path, leaf):
        spec = spec_of(rules, _name(group, path), leaf.shape, mesh)
        # Only the axes that are mapped here may be named; "tensor" is left to the compiler.
        kept = (tuple(axis for axis in _tuple(entry) if axis in axes) for entry in spec)
        return PartitionSpec(*(entry or None for entry in kept))

    def whole(leaf, spec):
        # A rule splits one dimension over these axes, so that none is left after the first.
        for dim, axis in enumerate(spec):
            if axis is not None:
                sent = leaf.astype(dtype) if trees.is_inexact(leaf) else leaf
                parts = lax.all_gather(sent, axis, axis=dim, tiled=True)
                # Cast back, so that the gradients of the parts are summed in the leaf's own dtype.
                return parts.astype(leaf.dtype)
        return leaf

    def mapped(params, *batches):
        specs = jax.tree_util.tree_map_with_path(split, params)
        inside = lambda params, *batches: function(jax.tree.map(whole, params, specs), *batches)
        part = PartitionSpec(batch, *sequence_axis(mesh))
        return jax.shard_map(
            inside,
            in_specs=(specs, *[part] * len(batches)),
            out_specs=part,
            axis_names=set(axes),
            check_vma=False,
        )(params, *batches)

    return mapped


def _name(group, path):
    return f"{group}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/")
