"""ResNets, RevNets and i-RevNets for images: stem, stages of residual units, head.

ResNets and RevNets differ in the number of streams alone. A unit that changes width or resolution
is computed outside the chains and, unless the chain after it stores, keeps nothing but its input;
all other units of a stage are one chain. An i-RevNet changes resolution by an invertible
rearrangement instead, so that its whole body is one sequence, and can be inverted down to the
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import (
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
from revnet_jax.models.architecture import Architecture, chains, groups
from revnet_jax.models.bridge import PureModule
from revnet_jax.models.dtypes import narrowed
from revnet_jax.models.invertible import PadStem, squeeze
from revnet_jax.models.model import Lockstep, Variables
from revnet_jax.models.partition import gather, on_batch
from revnet_jax.models.residual import RULES, Head, ResidualBranch, Stem, make_shortcut
from revnet_jax.models.strategies import assign_strategies


class Network:
    """An image classifier as pure functions: `init(key)` and `apply(variables, image, ...)`.

    backprop: what the gradient costs (see `chain`): one of `STRATEGIES` for all chains, or one for
      each; `reverse` needs two streams.
    stored_layers: how many layers of the chains, counted from the last, store all the same. Late
      layers are small ones: they buy most compute for their memory. unroll: see `chain`.
    compute_dtype: of convolutions; streams, batch statistics and logits are float32.
    grid: where the streams of a RevNet live; None for free floats.
    check_exactness: whether `probes` has any: the check keeps each chain's input.
    """

    rules = RULES

    def __init__(
        self,
        architecture: Architecture,
        *,
        backprop: Backprop | Sequence[Backprop] = "reverse",
        stored_layers: int = 0,
        unroll: int = 1,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        grid: Grid | None = Grid(),
        check_exactness: bool = True,
    ):
        self.architecture, self._unroll = architecture, unroll
        self.compute_dtype, self.param_dtype = compute_dtype, param_dtype
        self.check_exactness = check_exactness
        self.grid = grid
        self.groups = groups(architecture)
        self.chains = chains(self.groups)
        self.strategies = assign_strategies(architecture, self.groups, backprop, stored_layers)
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
        self._head = _pure(Head, channels[-1], architecture.num_classes, **common)

    @property
    def invertible(self) -> bool:
        """Whether its chains can be reversed."""
        return self.architecture.num_streams > 1

    @property
    def most_stored_layers(self) -> int:
        """How many there are in chains that do not store anyway."""
        return sum(s.layers for s in self.strategies.values() if s.backprop != "store")

    @property
    def stacked(self) -> list[str]:
        """The groups whose variables have a leading axis of one per layer."""
        return [group.name for group in self.groups if group.unit and not group.is_transition]

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
        return Variables(narrowed(params, self.param_dtype), stats)

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain whose input is rebuilt, to differentiate `apply` by; or None."""
        rebuilt = [name for name, strategy in self.strategies.items() if strategy.rebuilds]
        if not rebuilt or not self.check_exactness:
            return None
        return {name: Exactness.probe() for name in rebuilt}

    def apply(
        self,
        variables: Variables,
        image_BHWC: jax.Array,
        *,
        train: bool,
        key: jax.Array | None = None,
        probes: dict[str, Exactness] | None = None,
        lockstep: Lockstep | None = None,
    ) -> tuple[jax.Array, Any]:
        """(logits [B, num_classes] float32, running averages after this batch).

        train: normalise by the batch's statistics and update the running averages, once, whatever
          the strategy; otherwise normalise by the running averages.
        key: for models that draw random numbers; this one does not.
        lockstep: makes the cotangents of the chains' parameters their new values.
        """
        x_BHWC, new_stats = self.features(
            variables, image_BHWC, train=train, probes=probes, lockstep=lockstep
        )
        with jax.named_scope("head"):
            # Computed in the features' dtype, and so sent in it.
            head = gather(RULES, "head", variables.params["head"], x_BHWC.dtype)
            logits_BV, new_stats["head"] = self._head.apply(
                head, variables.stats["head"], x_BHWC, train=train
            )
        return logits_BV, new_stats

    def features(
        self,
        variables: Variables,
        image_BHWC: jax.Array,
        *,
        train: bool,
        probes: dict[str, Exactness] | None = None,
        lockstep: Lockstep | None = None,
    ) -> tuple[jax.Array, Any]:
        """(what the head sees: the streams joined, [B, H', W', channels[-1]]; running averages)."""
        params, stats = variables
        new_stats = {}
        with jax.named_scope("stem"):
            stem = self._gather("stem", params["stem"])
            x_BHWC, new_stats["stem"] = self._stem.apply(
                stem, stats["stem"], image_BHWC, train=train
            )
        x = on_batch(tuple(jnp.split(x_BHWC, self.architecture.num_streams, axis=-1)))
        for name, _, _ in self.groups:
            if name in self.chains:
                chain, strategy = self.chains[name], self.strategies[name]
                x, auxes = sequence(
                    self._sections(chain, variables, train, lockstep),
                    x,
                    backprop=strategy.backprop,
                    stored_layers=strategy.stored_layers,
                    unroll=self._unroll,
                    update=lockstep and lockstep.update,
                    probe=probes and probes.get(name),
                )
                new_stats |= {
                    group.name: aux_L
                    for group, aux_L in zip(chain, auxes, strict=True)
                    if group.unit
                }
            elif name in self._shortcuts:
                x, new_stats[name] = self._transition(name, params[name], stats[name], x, train)
                x = on_batch(x)
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

    def _gather(self, group, params):
        return gather(RULES, group, params, self.compute_dtype)

    def _sections(self, chain, variables, train, lockstep=None):
        def section(group):
            if group.unit is None:
                return Section(squeeze(), length=1)
            return Section(
                self._layer(group.name, train),
                variables.params[group.name],
                variables.stats[group.name],
                state_L=lockstep and lockstep.states[group.name],
            )

        return [section(group) for group in chain]

    def _layer(self, name: str, train: bool) -> Layer:
        """A chain's layer; its running averages are per-layer data in and auxiliary outputs out."""

        def branch(module, i):
            def run(params, x_BHWC, context):
                params = self._gather(f"{name}/{i}", params)
                x_BHWC = on_batch(x_BHWC)
                u_BHWC, stats = module.apply(params, context.data[i], x_BHWC, train=train)
                return on_batch(u_BHWC), stats

            return run

        branches = [branch(module, i) for i, module in enumerate(self._branches[name])]
        if len(branches) == 2:
            return reversible_block(*branches, has_aux=True, grid=self.grid)
        (f,) = branches

        def residual(params, x, context):
            u_BHWC, stats = f(params[0], x[0], context)
            return (x[0] + u_BHWC.astype(x[0].dtype),), (stats,)

        return PlainLayer(residual)

    @jax.named_scope("transition")
    def _transition(self, name, params, stats, x, train):
        """A unit that changes width or resolution: not invertible, so its input is kept."""
        branches, shortcuts = self._branches[name], self._shortcuts[name]

        def run(params, stats, x):
            params = self._gather(name, params)
            n = len(branches)
            y, new_stats = [], list(stats)
            for i in range(n):
                shortcut, new_stats[n + i] = shortcuts[i].apply(params[n + i], stats[n + i], x[i])
                # A ResNet's f reads its own stream; f reads x2, g reads y1.
                read = x[-1] if i == 0 else y[0]
                u, new_stats[i] = branches[i].apply(params[i], stats[i], read, train=train)
                y.append(shortcut.astype(x[i].dtype) + u.astype(x[i].dtype))
            return tuple(y), tuple(new_stats)

        run = run if self.strategies[name].stores else jax.checkpoint(run)
        return run(params, stats, x)


def _pure(make: Any, *args: Any, **kwargs: Any) -> PureModule:
    return PureModule(lambda rngs: make(*args, rngs=rngs, **kwargs))
