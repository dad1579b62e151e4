"""Turns flax modules, nnx or linen, into pure functions and branches of reversible blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

# All that a module may hold, in the order in which `nnx.split` returns it.
_STATE = (nnx.Param, nnx.BatchStat, nnx.RngState)


class PureModule:
    """An nnx module as pure `init` and `apply`; parameters and running averages are plain trees.

    Args:
      make: builds the module from its random streams: `lambda rngs: nnx.Linear(3, 4, rngs=rngs)`.

    `jax.vmap(module.init)(keys)` gives every leaf a leading layer axis, as a chain needs it.
    Raises ValueError for a module with state of another kind, which would be lost between calls.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        is_built = isinstance(make, nnx.Module | linen.Module)
        self._make = make if is_built else _without_sharding(make)
        # Shapes only, so that a large module takes no memory here.
        module = make if is_built else nnx.eval_shape(lambda: self._make(nnx.Rngs(0)))
        if is_built or not isinstance(module, nnx.Module):
            got = type(module).__name__
            raise ValueError(f"got {got}, expected what builds it: `lambda rngs: MLP(rngs=rngs)`")
        self._graphdef, _, _, streams, other = nnx.split(module, *_STATE, ...)
        self._streams = nnx.to_pure_dict(streams)
        if other:
            got = ", ".join(sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(other)}))
            raise ValueError(
                f"got a module with state {got}, expected parameters, running averages and random "
                "streams only: keep it outside, and pass it in as data or `shared`"
            )

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Initialises (params, stats): trainable parameters and running averages."""
        _, params, stats, _ = nnx.split(self._make(nnx.Rngs(key)), *_STATE)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    def apply(
        self, params: Any, stats: Any, *args: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Returns (the module's output, its running averages after the call).

        Args:
          key: for all random numbers of the call. Raises ValueError if it is None and the module
            has random streams.
        """
        if self._streams and key is None:
            raise ValueError("got key=None, expected a key: the module keeps random streams")
        # Random streams restart at every call, so that the same key gives the same numbers.
        draw = nnx.Rngs(key)
        streams = jax.tree.map(lambda leaf: _restarted(leaf, draw), self._streams)
        # A new module for each call: what the call changes in it does not outlive the call.
        module = nnx.merge(self._graphdef, params, stats, streams)
        output = module(*args, **kwargs)
        new_stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        # No gradient flows into averages over past batches.
        return output, jax.lax.stop_gradient(new_stats)


def _without_sharding(make):
    """Builds a module without placing its arrays on a mesh.

    A module's partitioning annotations describe one layer's axes, without the stacked layer axis.
    """

    def made(rngs):
        with nnx.use_eager_sharding(False):
            return make(rngs)

    return made


def _restarted(leaf, draw):
    """Resets a leaf of a random stream: a new key from `draw`, or a counter of zero."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    # As many keys as the leaf has; its shape is () for a single stream.
    return jax.random.split(draw(), leaf.shape) if is_key else jnp.zeros(leaf.shape, leaf.dtype)


class BranchData(NamedTuple):
    """A layer's data for one branch: running averages, and the key for its random numbers."""

    stats: Any
    key: jax.Array


class FlaxBranch(PureModule):
    """A module as a branch of a block with `has_aux=True`: see `nnx_branch` and `linen_branch`.

    Args:
      name: the key of its `BranchData` in `context.data`.
      kwargs: passed to every call of the module; override them by `functools.partial(branch,
        train=False)`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], name: str, kwargs: dict[str, Any]):
        super().__init__(make)
        self.name, self._kwargs = name, kwargs

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """`(params, *inputs, context) -> (u, {name: running averages after this batch})`.

        Evaluates the module once. Raises ValueError if `context.data` has no entry for this branch.
        """
        *inputs, context = args
        data = context.data.get(self.name) if isinstance(context.data, Mapping) else None
        if not isinstance(data, BranchData):
            raise ValueError(
                f"got no data for {self.name!r}, expected init_layers' data_L: pass it"
            )
        # Later keywords win, which is how `functools.partial` changes the mode.
        kwargs = self._kwargs | kwargs
        u, stats = self.apply(params, data.stats, *inputs, key=data.key, **kwargs)
        return u, {self.name: stats}


def nnx_branch(make: Callable[[nnx.Rngs], nnx.Module], name: str, /, **kwargs: Any) -> FlaxBranch:
    """Makes a branch of an nnx module: `nnx_branch(lambda rngs: MLP(rngs=rngs), "f")`.

    See `FlaxBranch`, and `PureModule` for errors. For a module in another mode make another branch:
    `lambda rngs: nnx.view(MLP(rngs=rngs), deterministic=True)`.
    """
    return FlaxBranch(make, name, kwargs)


def linen_branch(module: linen.Module, name: str, /, *example: Any, **kwargs: Any) -> FlaxBranch:
    """Makes a branch of a linen module: `linen_branch(MLP(), "g", x1, train=True)`.

    See `FlaxBranch`, and `PureModule` for errors.

    Args:
      example: arrays like the module's inputs, on which `init` evaluates the module. The parameter
        trees are linen's.
    """
    if not isinstance(module, linen.Module):
        raise ValueError(f"got {module!r}, expected a linen module: build it, or take nnx_branch")
    make = lambda rngs: nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(*example, **kwargs)
    # Linen refuses to update running averages unless their collection is "mutable".
    return FlaxBranch(make, name, {"mutable": ["batch_stats"], **kwargs})


def init_layers(branches: Sequence[FlaxBranch], key: jax.Array, depth: int) -> tuple[Any, Any]:
    """Initialises (params_L, data_L) of `depth` layers for a block of these branches.

    params_L is a tuple with one tree per branch; data_L is `{name: BranchData}`.

    Raises ValueError for branches of the same name, or not made by `nnx_branch` or `linen_branch`.
    """
    if not isinstance(branches, Sequence) or not all(isinstance(b, FlaxBranch) for b in branches):
        raise ValueError(f"got {branches!r}, expected branches of nnx_branch and linen_branch")
    names = [branch.name for branch in branches]
    if len(set(names)) < len(names):
        raise ValueError(f"got branches {', '.join(names)}, expected distinct names: rename one")
    params_L, data_L = [], {}
    # Keys by branch, by use (0 for parameters, 1 for the data's random numbers) and by layer.
    for branch, keys in zip(branches, jax.random.split(key, (len(names), 2, depth)), strict=True):
        # Compiled, because XLA then removes the forward pass that linen's `init` runs for shapes.
        params, stats = jax.jit(jax.vmap(branch.init))(keys[0])
        params_L.append(params)
        data_L[branch.name] = BranchData(stats, keys[1])
    return tuple(params_L), data_L


def with_keys(data_L: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Returns data_L with fresh keys for every branch and layer.

    Entries other than BranchData are unchanged.
    """
    fresh = {}
    for i, name in enumerate(_names(data_L)):
        keys = jax.random.split(jax.random.fold_in(key, i), len(data_L[name].key))
        fresh[name] = data_L[name]._replace(key=keys)
    return {**data_L, **fresh}


def with_stats(data_L: Mapping[str, Any], aux_L: Sequence[Any]) -> dict[str, Any]:
    """Returns data_L with the running averages from the chain's `aux_L`.

    Raises ValueError if those of a branch are missing.
    """
    stats = {name: s for aux in aux_L if isinstance(aux, Mapping) for name, s in aux.items()}
    missing = [name for name in _names(data_L) if name not in stats]
    if missing:
        raise ValueError(f"got no averages for {missing}, expected the chain's: pass its aux_L")
    return {**data_L, **{n: data_L[n]._replace(stats=stats[n]) for n in _names(data_L)}}


def _names(data_L):
    """The branch names, sorted: jit sorts dictionaries, so keys are the same inside and outside."""
    return sorted(name for name, data in data_L.items() if isinstance(data, BranchData))
