"""How a model's arrays are split over a mesh of devices: rules by path, next to each model.

A mesh has the axes "data", "fsdp" and "tensor". Batches are split over the first two. Weights are
split over "fsdp" (Rajbhandari et al. 2019, arXiv:1910.02054, stage 3; Zhao et al. 2023,
arXiv:2304.11277), and gathered where they are used; "tensor" splits heads and hidden units, and the
arithmetic with them (Shoeybi et al. 2019, arXiv:1909.08053). Where there is no mesh, nothing here
does anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from revnet_jax.core import GATHERED, trees

# (pattern found in a leaf's path, the mesh axis of each of its last dimensions); the first counts.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]
BATCH = ("data", "fsdp")


def spec_of(rules: Rules, path: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """How a leaf is split: as its rule says, but for axes that do not divide their dimension.

    mesh: a `Mesh` or its abstract one. Leaves without a rule are whole on every device.
    """
    for pattern, axes in rules:
        if re.search(pattern, path) and len(axes) <= len(shape):
            break
    else:
        return PartitionSpec()
    sizes = dict(mesh.shape)
    split = [
        axis if axis is not None and size % sizes.get(axis, size + 1) == 0 else None
        for size, axis in zip(shape[len(shape) - len(axes) :], axes, strict=True)
    ]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *split)


def gather(rules: Rules, group: str, params: Any, dtype: Any) -> Any:
    """Weights as they are used: whole along "fsdp". Their gradients are scattered over it again.

    group: the path of `params`. dtype: what the weights that are split are
    computed in: they are sent so. One all-gather, and one reduce-scatter of the gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if dict(mesh.shape).get("fsdp", 1) == 1:
        return params

    def gathered(path, leaf):
        split = spec_of(rules, _name(group, path), leaf.shape, mesh)
        if "fsdp" not in split:
            return leaf
        whole = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
        leaf = leaf.astype(dtype) if trees.is_inexact(leaf) else leaf
        return checkpoint_name(_gathered(split, whole, leaf), GATHERED)

    return jax.tree_util.tree_map_with_path(gathered, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(split, whole, leaf):
    return lax.with_sharding_constraint(leaf, whole)


def _gathered_fwd(split, whole, leaf):
    return _gathered(split, whole, leaf), None


def _gathered_bwd(split, whole, _, cotangent):
    # The constraint's own derivative would have every device hold, and add up, all of it.
    return (lax.with_sharding_constraint(cotangent, split),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def on_batch(tree: Any) -> Any:
    """Arrays with the batch as their first axis, split over it alone; their cotangents, too.

    For what branches read and return. Left to themselves compilers may split the arithmetic of a
    rewind in another way than a forward pass's, which sums in another order, and rounds otherwise.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    spec = PartitionSpec(batch_axes(mesh))
    return jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, spec), tree)


def batch_axes(mesh: Any) -> tuple[str, ...]:
    """The axes of a mesh that batches are split over."""
    return tuple(axis for axis in BATCH if axis in mesh.axis_names)


def by_device(
    function: Callable[..., Any], in_axes: Sequence[tuple], out_axes: tuple
) -> Callable[..., Any]:
    """The function, computed by every device for its own part: for what compilers cannot split.

    in_axes, out_axes: for each dimension of an argument, or of the result, the mesh axis or axes it
      is split over; missing ones are whole, and their gradients added up over all devices. Outside
      a mesh it is the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    there = lambda axes: axes if isinstance(axes, tuple) else (axes,)
    spec = lambda dims: PartitionSpec(
        *(tuple(axis for axis in there(axes) if axis in mesh.axis_names) for axes in dims)
    )
    in_specs = tuple(map(spec, in_axes))
    return jax.shard_map(function, in_specs=in_specs, out_specs=spec(out_axes), check_vma=False)


def by_batch(
    function: Callable[..., Any], rules: Rules, group: str, dtype: Any
) -> Callable[..., Any]:
    """`function(params, *batches)`, computed by every device for its own part of the batches.

    For weights that are used in a loop over parts of the tokens: they are gathered once, and each
    device adds up the gradients of its own tokens before it sends any. Arguments as of `gather`.
    Compilers go on splitting the arithmetic inside over "tensor".
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Where none is left, compilers cannot tell what is computed by device from what they split.
    axes = tuple(axis for axis in batch_axes(mesh) if mesh.shape[axis] > 1)
    if not axes:
        return function

    def split(path, leaf):
        spec = spec_of(rules, _name(group, path), leaf.shape, mesh)
        return PartitionSpec(*(axis if axis in axes else None for axis in spec))

    def whole(leaf, spec):
        if "fsdp" not in spec:
            return leaf
        parts = leaf.astype(dtype)
        # Back in its own dtype, in which gradients of the parts are to be added up.
        return lax.all_gather(parts, "fsdp", axis=spec.index("fsdp"), tiled=True).astype(leaf.dtype)

    def mapped(params, *batches):
        specs = jax.tree_util.tree_map_with_path(split, params)
        inside = lambda params, *batches: function(jax.tree.map(whole, params, specs), *batches)
        part = PartitionSpec(axes)
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
