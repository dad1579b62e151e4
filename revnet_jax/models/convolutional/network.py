"""ResNets, RevNets and i-RevNets for images: stem, stages of residual units, head.

ResNets and RevNets differ only in the number of streams. A unit that changes width or resolution
is computed outside the chains. It keeps only its input (rematerialisation), unless the chain after
it stores. All other units of a stage form one chain. An i-RevNet changes resolution by
space-to-depth, which is invertible, so its whole body is one sequence and can be inverted down to
the image.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from revnet_jax.core import (
    Exactness,
    Layer,
    PlainLayer,
    Section,
    keeping_operands,
    reversible_block,
    sequence,
    sequence_inverse,
)
from revnet_jax.models.bridge import PureModule
from revnet_jax.models.convolutional.invertible import PadStem, squeeze
from revnet_jax.models.convolutional.residual import (
    RULES,
    ConvHead,
    ResidualBranch,
    Stem,
    make_shortcut,
)
from revnet_jax.models.convolutional.shape import ConvNetShape, chains, groups
from revnet_jax.models.convolutional.strategies import assign_strategies
from revnet_jax.models.dtypes import narrowed
from revnet_jax.models.model import ModelOptions, Sweep, Variables
from revnet_jax.models.partition import Rules, gather, on_batch


class ConvNet:
    """An image classifier as pure functions: `init(key)` and `apply(variables, image, ...)`.

    Args:
      options: how it computes. With `stored_layers` the last layers of all chains store. They have
        the smallest activations, so they save the most compute for their memory.
    """

    rules: Rules = RULES

    def __init__(
        self,
        shape: ConvNetShape,
        options: ModelOptions = ModelOptions(),
    ):
        self.shape, self._unroll = shape, options.unroll
        self._keep_operands = options.keep_operands
        self.compute_dtype, self.param_dtype = options.compute_dtype, options.param_dtype
        self.check_exactness, self.grid = options.check_exactness, options.grid
        self.groups = groups(shape)
        self.chains = chains(self.groups)
        self.strategies = assign_strategies(shape, self.groups, options)
        common = {"dtype": options.compute_dtype}
        in_unit = {"bottleneck": shape.bottleneck, **common}

        def branch(in_channels, out_channels, stride, activate_first):
            settings = {"stride": stride, "activate_first": activate_first, **in_unit}
            return _pure(ResidualBranch, in_channels, out_channels, **settings)

        def shortcut(unit):
            channels = unit.in_channels, unit.out_channels
            return _pure(make_shortcut, *channels, stride=unit.stride, **in_unit)

        channels = shape.channels
        image_channels = shape.image_shape[2]
        if shape.stem == "pad":
            self._stem = _pure(PadStem, image_channels, channels[0])
        else:
            self._stem = _pure(Stem, image_channels, channels[0], kind=shape.stem, **common)
        # One branch per stream: f, or f and g. Only f changes resolution and width.
        self._branches = {
            name: (branch(*unit), branch(unit.out_channels, unit.out_channels, 1, True))[
                : shape.num_streams
            ]
            for name, unit, _ in self.groups
            if unit
        }
        self._shortcuts = {
            # One module for all streams, since it holds no parameters: each stream has its own.
            name: (shortcut(unit),) * shape.num_streams
            for name, unit, _ in self.groups
            if unit and not unit.keeps_shape
        }
        self._head = _pure(ConvHead, channels[-1], shape.num_classes, **common)

    @property
    def invertible(self) -> bool:
        """Whether its chains can be reversed."""
        return self.shape.num_streams > 1

    @property
    def most_stored_layers(self) -> int:
        """The largest valid `stored_layers`: the layers of chains that do not store all anyway."""
        return sum(s.layers for s in self.strategies.values() if s.backprop != "store")

    @property
    def stacked(self) -> list[str]:
        """The groups whose variables have a leading axis of one per layer."""
        return [group.name for group in self.groups if group.unit and not group.is_transition]

    def init(self, key: jax.Array) -> Variables:
        """Initialises the variables; those of a chain have a leading axis of one per layer."""
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
                # [(params, stats) of each module] -> (params of all, stats of all)
                return tuple(zip(*pairs, strict=True))

            # The leaves of a chain get their leading axis from `vmap` over one key per layer.
            if unit.keeps_shape:
                add(name, jax.vmap(init_unit), jax.random.split(group_key, depth))
            else:
                add(name, init_unit, group_key)
        add("head", self._head.init, head_key)
        return Variables(narrowed(params, self.param_dtype), stats)

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain that is rebuilt and checked, by name; None if there is none."""
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
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, Any]:
        """(logits [B, num_classes] float32, running averages after this batch).

        Args:
          train: normalise by the batch's statistics and update the running averages (exactly once,
            under every strategy); otherwise normalise by the running averages.
          key: unused; other models draw random numbers.
          sweep: checks for exactness and updates in the backward sweep; by default neither.
        """
        x_BHWC, new_stats = self.features(variables, image_BHWC, train=train, sweep=sweep)
        with jax.named_scope("head"):
            # The head computes in the dtype of the features, so its weights are gathered in it.
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
        sweep: Sweep = Sweep(),
    ) -> tuple[jax.Array, Any]:
        """(concatenated streams [B, H', W', channels[-1]], running averages after this batch)."""
        params, stats = variables
        new_stats = {}
        with jax.named_scope("stem"):
            stem = self._gather("stem", params["stem"])
            x_BHWC, new_stats["stem"] = self._stem.apply(
                stem, stats["stem"], image_BHWC, train=train
            )
        x = on_batch(tuple(jnp.split(x_BHWC, self.shape.num_streams, axis=-1)))
        for name, _, _ in self.groups:
            # A chain runs where its first group is, whose name it has.
            if name in self.chains:
                chain, strategy = self.chains[name], self.strategies[name]
                checked = sweep.probes is not None and strategy.rebuilds
                x, auxes = sequence(
                    self._sections(chain, variables, train, sweep),
                    x,
                    backprop=strategy.backprop,
                    stored_layers=strategy.stored_layers,
                    unroll=self._unroll,
                    update=sweep.update,
                    # No `.get`: a probe of another name is an error, not a chain that is never
                    # checked.
                    probe=sweep.probes[name] if checked else None,
                )
                new_stats |= {
                    group.name: aux_L
                    for group, aux_L in zip(chain, auxes, strict=True)
                    if group.unit
                }
            # Other groups without a shortcut have run with their chain.
            elif name in self._shortcuts:
                x, new_stats[name] = self._transition(name, params[name], stats[name], x, train)
                x = on_batch(x)
        return jnp.concatenate(x, axis=-1), new_stats

    def inverse(self, variables: Variables, x_BHWC: jax.Array, *, train: bool) -> jax.Array:
        """Computes the image from its features: bit for bit, as it was after snapping to the grid.

        Cost: one evaluation of each branch; memory independent of depth. Raises ValueError unless
        the network is an i-RevNet with stem "pad": others are not invertible.
        """
        shape = self.shape
        if shape.family != "irevnet" or shape.stem != "pad":
            raise ValueError(
                f"got family={shape.family!r} and stem={shape.stem!r}, expected "
                "'irevnet' and 'pad': any other has no inverse down to the image"
            )
        (chain,) = self.chains.values()
        y = tuple(jnp.split(x_BHWC, shape.num_streams, axis=-1))
        x = sequence_inverse(self._sections(chain, variables, train), y)
        # Without the channels that the stem has added.
        return jnp.concatenate(x, axis=-1)[..., : shape.image_shape[2]]

    def _gather(self, group, params):
        return gather(RULES, group, params, self.compute_dtype)

    def _sections(self, chain, variables, train, sweep=Sweep()):
        def section(group):
            if group.unit is None:
                return Section(squeeze(), length=1)
            return Section(
                self._layer(group.name, train),
                variables.params[group.name],
                variables.stats[group.name],
                state_L=sweep.state_L(group.name),
            )

        return [section(group) for group in chain]

    def _layer(self, name: str, train: bool) -> Layer:
        """The layer of a chain.

        Running averages enter as per-layer data, and the new ones leave as auxiliary outputs.
        """

        def branch(module, i):
            def run(params, x_BHWC, context):
                params = self._gather(f"{name}/{i}", params)
                x_BHWC = on_batch(x_BHWC)
                u_BHWC, stats = module.apply(params, context.data[i], x_BHWC, train=train)
                return on_batch(u_BHWC), stats

            return run

        branches = [branch(module, i) for i, module in enumerate(self._branches[name])]
        if len(branches) == 2:
            block = reversible_block(*branches, has_aux=True, grid=self.grid)
            return keeping_operands(block) if self._keep_operands else block
        (f,) = branches

        def residual(params, x, context):
            u_BHWC, stats = f(params[0], x[0], context)
            # Added in the dtype of the stream: what the branch returns may be narrower.
            return (x[0] + u_BHWC.astype(x[0].dtype),), (stats,)

        return PlainLayer(residual)

    @jax.named_scope("transition")
    def _transition(self, name, params, stats, x, train):
        """Applies a unit that changes width or resolution.

        It is not invertible, so its input is kept for the gradient.
        """
        branches, shortcuts = self._branches[name], self._shortcuts[name]

        def run(params, stats, x):
            params = self._gather(name, params)
            n = len(branches)
            # The averages of the branches, then those of the shortcuts, as in `init`.
            y, new_stats = [], list(stats)
            for i in range(n):
                shortcut, new_stats[n + i] = shortcuts[i].apply(params[n + i], stats[n + i], x[i])
                # With one stream f reads x1; with two, f reads x2 and g reads y1.
                read = x[-1] if i == 0 else y[0]
                u, new_stats[i] = branches[i].apply(params[i], stats[i], read, train=train)
                y.append(shortcut.astype(x[i].dtype) + u.astype(x[i].dtype))
            return tuple(y), tuple(new_stats)

        # Without a policy the checkpoint keeps nothing but the arguments.
        unit = run if self.strategies[name].stores else jax.checkpoint(run)
        return unit(params, stats, x)


def _pure(make: Any, *args: Any, **kwargs: Any) -> PureModule:
    return PureModule(lambda rngs: make(*args, rngs=rngs, **kwargs))
