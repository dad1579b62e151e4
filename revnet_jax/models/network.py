"""ResNets, RevNets and i-RevNets for images: stem, stages of residual units, head.

ResNets and RevNets differ in the number of streams alone. A unit that changes width or resolution
is computed outside the chains and, unless `backprop` is `store`, keeps nothing but its input; all
other units of a stage are one chain. An i-RevNet changes resolution by an invertible rearrangement
instead, so that its whole body is one sequence, and can be inverted down to the image.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from revnet_jax.core import (
    STRATEGIES,
    Backprop,
    Exactness,
    Grid,
    Layer,
    PlainLayer,
    Section,
    reversible_block,
    sequence,
    sequence_inverse,
)
from revnet_jax.models.architecture import Architecture, Group, groups
from revnet_jax.models.bridge import PureModule
from revnet_jax.models.invertible import PadStem, squeeze
from revnet_jax.models.residual import Head, ResidualBranch, Stem, make_shortcut


class Variables(NamedTuple):
    """Trees by group: trainable parameters, and the running averages of batch statistics."""

    params: Any
    stats: Any


class Network:
    """An image classifier as pure functions: `init(key)` and `apply(variables, image, ...)`.

    backprop: what the gradient of every chain costs: `store`, `remat`, or (two streams) `reverse`.
    compute_dtype: of convolutions; streams, batch statistics and logits are float32.
    grid: where the streams of a RevNet live; None for free floats.
    check_exactness: whether `probes` has any: the check keeps each chain's input.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        backprop: Backprop = "reverse",
        compute_dtype: Any = jnp.float32,
        grid: Grid | None = Grid(),
        check_exactness: bool = True,
    ):
        if backprop not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"got backprop={backprop!r}, expected one of {known}")
        if backprop == "reverse" and architecture.family == "resnet":
            raise ValueError(
                "got backprop='reverse' for a resnet, expected 'store' or 'remat': its units have "
                "no inverse. Take family='revnet' to store nothing"
            )
        self.architecture = architecture
        self.backprop: Backprop = backprop
        self.compute_dtype = compute_dtype
        self.check_exactness = check_exactness
        self.grid = grid
        self.groups = groups(architecture)
        common = {"dtype": compute_dtype}
        in_unit = {"bottleneck": architecture.bottleneck, **common}

        def branch(in_channels, out_channels, stride, activate_first):
            settings = {"stride": stride, "activate_first": activate_first, **in_unit}
            return _pure(ResidualBranch, in_channels, out_channels, **settings)

        def shortcut(unit):
            channels = unit.in_channels, unit.out_channels
            return _pure(make_shortcut, *channels, stride=unit.stride, **in_unit)

        channels = architecture.channels
        image_channels = architecture.image_shape[2]
        if architecture.stem == "pad":
            self._stem = _pure(PadStem, image_channels, channels[0])
        else:
            self._stem = _pure(Stem, image_channels, channels[0], kind=architecture.stem, **common)
        # One module per stream: f alone, or f and g. Only f changes resolution and width.
        self._branches = {
            name: (branch(*unit), branch(unit.out_channels, unit.out_channels, 1, True))[
                : architecture.num_streams
            ]
            for name, unit, _ in self.groups
            if unit
        }
        self._shortcuts = {
            name: (shortcut(unit),) * architecture.num_streams
            for name, unit, _ in self.groups
            if unit and not unit.keeps_shape
        }
        self._head = _pure(Head, channels[-1], architecture.num_classes)

    def with_backprop(self, backprop: Backprop) -> Network:
        """The same function of the same variables, with a gradient of another cost."""
        return Network(
            self.architecture,
            backprop=backprop,
            compute_dtype=self.compute_dtype,
            grid=self.grid,
            check_exactness=self.check_exactness,
        )

    @property
    def chains(self) -> dict[str, list[Group]]:
        """Neighbouring groups between transitions, each chain under the name of its first."""
        runs = itertools.groupby(self.groups, key=lambda group: group.is_transition)
        chains = [list(run) for is_transition, run in runs if not is_transition]
        return {chain[0].name: chain for chain in chains}

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables; a chain's have a leading axis of one per layer."""
        params, stats = {}, {}

        def add(name, init, key):
            params[name], stats[name] = init(key)

        stem_key, head_key, *group_keys = jax.random.split(key, 2 + len(self.groups))
        add("stem", self._stem.init, stem_key)
        for (name, unit, depth), group_key in zip(self.groups, group_keys, strict=True):
            if unit is None:
                continue
            modules = self._branches[name] + self._shortcuts.get(name, ())

            def init_unit(key, modules=modules):
                keys = jax.random.split(key, len(modules))
                pairs = [module.init(k) for module, k in zip(modules, keys, strict=True)]
                return tuple(zip(*pairs, strict=True))

            if unit.keeps_shape:
                add(name, jax.vmap(init_unit), jax.random.split(group_key, depth))
            else:
                add(name, init_unit, group_key)
        add("head", self._head.init, head_key)
        return Variables(params, stats)

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain, to differentiate `apply` by; None where nothing is rebuilt."""
        if self.backprop != "reverse" or not self.check_exactness:
            return None
        return {name: Exactness.probe() for name in self.chains}

    def apply(
        self,
        variables: Variables,
        image_BHWC: jax.Array,
        *,
        train: bool,
        probes: dict[str, Exactness] | None = None,
    ) -> tuple[jax.Array, Any]:
        """(logits [B, num_classes] float32, running averages after this batch).

        train: normalise by the batch's statistics and update the running averages, once, whatever
          the strategy; otherwise normalise by the running averages.
        """
        x_BHWC, new_stats = self.features(variables, image_BHWC, train=train, probes=probes)
        logits_BV, new_stats["head"] = self._head.apply(
            variables.params["head"], variables.stats["head"], x_BHWC, train=train
        )
        return logits_BV, new_stats

    def features(
        self,
        variables: Variables,
        image_BHWC: jax.Array,
        *,
        train: bool,
        probes: dict[str, Exactness] | None = None,
    ) -> tuple[jax.Array, Any]:
        """(what the head sees: the streams joined, [B, H', W', channels[-1]]; running averages)."""
        params, stats = variables
        new_stats = {}
        x_BHWC, new_stats["stem"] = self._stem.apply(
            params["stem"], stats["stem"], image_BHWC, train=train
        )
        x = tuple(jnp.split(x_BHWC, self.architecture.num_streams, axis=-1))
        chains = self.chains
        for name, _, _ in self.groups:
            if name in chains:
                x, auxes = sequence(
                    self._sections(chains[name], variables, train),
                    x,
                    backprop=self.backprop,
                    probe=None if probes is None else probes[name],
                )
                new_stats |= {
                    group.name: aux_L
                    for group, aux_L in zip(chains[name], auxes, strict=True)
                    if group.unit
                }
            elif name in self._shortcuts:
                x, new_stats[name] = self._transition(name, params[name], stats[name], x, train)
        return jnp.concatenate(x, axis=-1), new_stats

    def inverse(self, variables: Variables, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """The image from its features, bit for bit as it entered: snapped to the grid.

        Cost: one evaluation of each branch; memory independent of depth. Raises ValueError unless
        the network is an i-RevNet with stem "pad": any other loses something.
        """
        architecture = self.architecture
        if architecture.family != "irevnet" or architecture.stem != "pad":
            raise ValueError(
                f"got family={architecture.family!r} and stem={architecture.stem!r}, expected "
                "'irevnet' and 'pad': any other has no inverse down to the image"
            )
        (chain,) = self.chains.values()
        y = tuple(jnp.split(x_BHWC, architecture.num_streams, axis=-1))
        x = sequence_inverse(self._sections(chain, variables, train), y)
        return jnp.concatenate(x, axis=-1)[..., : architecture.image_shape[2]]

    def _sections(self, chain: list[Group], variables: Variables, train: bool) -> list[Section]:
        return [
            Section(self._layer(name, train), variables.params[name], variables.stats[name])
            if unit
            else Section(squeeze(), length=1)
            for name, unit, _ in chain
        ]

    def _layer(self, name: str, train: bool) -> Layer:
        """A chain's layer; its running averages are per-layer data in and auxiliary outputs out."""

        def branch(module, i):
            def run(params, x_BHWC, context):
                return module.apply(params, context.data[i], x_BHWC, train=train)

            return run

        branches = [branch(module, i) for i, module in enumerate(self._branches[name])]
        if len(branches) == 2:
            return reversible_block(*branches, has_aux=True, grid=self.grid)
        (f,) = branches

        def residual(params, x, context):
            u_BHWC, stats = f(params[0], x[0], context)
            return (x[0] + u_BHWC.astype(x[0].dtype),), (stats,)

        return PlainLayer(residual)

    def _transition(self, name, params, stats, x, train):
        """A unit that changes width or resolution: not invertible, so its input is kept."""
        branches, shortcuts = self._branches[name], self._shortcuts[name]

        def run(params, stats, x):
            n = len(branches)
            y, new_stats = [], list(stats)
            for i in range(n):
                shortcut, new_stats[n + i] = shortcuts[i].apply(params[n + i], stats[n + i], x[i])
                # A ResNet's f reads its own stream; f reads x2, g reads y1.
                read = x[-1] if i == 0 else y[0]
                u, new_stats[i] = branches[i].apply(params[i], stats[i], read, train=train)
                y.append(shortcut.astype(x[i].dtype) + u.astype(x[i].dtype))
            return tuple(y), tuple(new_stats)

        run = run if self.backprop == "store" else jax.checkpoint(run)
        return run(params, stats, x)


def _pure(make: Any, *args: Any, **kwargs: Any) -> PureModule:
    return PureModule(lambda rngs: make(*args, rngs=rngs, **kwargs))


def num_params(variables: Variables) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.params))
