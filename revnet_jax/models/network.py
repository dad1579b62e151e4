"""ResNets and RevNets for images: stem, stages of residual units, head.

The two families differ in the number of streams alone. A unit that changes width or resolution is
computed outside the chains and, unless `backprop` is `store`, keeps nothing but its input; all
other units of a stage are one chain.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
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
    chain,
    reversible_block,
)
from revnet_jax.models.bridge import PureModule
from revnet_jax.models.residual import Head, ResidualBranch, Stem, make_shortcut

NUM_STREAMS = {"resnet": 1, "revnet": 2}
STEMS = ("cifar", "imagenet")


@dataclass(frozen=True)
class Architecture:
    """What a network is; how it is trained is said elsewhere.

    family: "resnet" (one stream, a unit is `x + f(x)`) or "revnet" (two streams, f and g).
    units: residual units per stage.
    channels: of the stem, then of each stage; a RevNet's streams have half of them each.
    bottleneck: three convolutions a branch instead of two.
    stem: "cifar" or "imagenet".
    image_shape: (H, W, C).
    """

    family: str
    units: tuple[int, ...]
    channels: tuple[int, ...]
    bottleneck: bool
    stem: str
    image_shape: tuple[int, int, int]
    num_classes: int

    def __post_init__(self):
        if self.family not in NUM_STREAMS or self.stem not in STEMS:
            raise ValueError(
                f"got family={self.family!r} and stem={self.stem!r}, expected one of "
                f"{', '.join(NUM_STREAMS)} and one of {', '.join(STEMS)}"
            )
        sizes = (*self.units, *self.channels, *self.image_shape, self.num_classes)
        if (
            min(sizes) < 1
            or len(self.image_shape) != 3
            or not self.units
            or (len(self.channels) != len(self.units) + 1)
        ):
            raise ValueError(
                f"got units={self.units}, channels={self.channels}, image_shape={self.image_shape} "
                f"and num_classes={self.num_classes}, expected positive sizes, image_shape as "
                "(H, W, C), and channels of the stem followed by those of each stage"
            )
        divisor = NUM_STREAMS[self.family] * (4 if self.bottleneck else 1)
        if self.channels[0] % self.num_streams or any(c % divisor for c in self.channels[1:]):
            raise ValueError(
                f"got channels={self.channels}, expected a multiple of {self.num_streams} for the "
                f"stem and of {divisor} for the stages"
            )
        if not self.bottleneck and list(self.channels) != sorted(self.channels):
            raise ValueError(
                f"got channels={self.channels}, expected them not to decrease: without bottlenecks "
                "a shortcut can add channels, not take them away"
            )

    @property
    def num_streams(self) -> int:
        return NUM_STREAMS[self.family]


class Unit(NamedTuple):
    """One residual unit; channels are a single stream's."""

    in_channels: int
    out_channels: int
    stride: int
    activate_first: bool

    @property
    def keeps_shape(self) -> bool:
        return self.in_channels == self.out_channels and self.stride == 1


class Section(NamedTuple):
    """`depth` equal units in a row: a chain, or a single unit that changes the streams' shape."""

    name: str
    unit: Unit
    depth: int


class Variables(NamedTuple):
    """Trees by section: trainable parameters, and the running averages of batch statistics."""

    params: Any
    stats: Any


def sections(architecture: Architecture) -> list[Section]:
    """The units of each stage, equal neighbours joined."""
    result = []
    stem_channels, *stage_channels = (c // architecture.num_streams for c in architecture.channels)
    channels = stem_channels
    for stage, (depth, out_channels) in enumerate(
        zip(architecture.units, stage_channels, strict=True)
    ):
        units = []
        for i in range(depth):
            stride = 2 if i == 0 and stage > 0 else 1
            units.append(Unit(channels, out_channels, stride, activate_first=bool(stage or i)))
            channels = out_channels
        for i, (unit, group) in enumerate(itertools.groupby(units)):
            result.append(Section(f"stage{stage + 1}_{'ab'[i]}", unit, len(list(group))))
    return result


class Network:
    """An image classifier as pure functions: `init(key)` and `apply(variables, image, ...)`.

    backprop: what the gradient of every chain costs: `store`, `remat` or (RevNet) `reverse`.
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
        self.sections = sections(architecture)
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
        self._stem = _pure(Stem, image_channels, channels[0], kind=architecture.stem, **common)
        # One module per stream: f alone, or f and g. Only f changes resolution and width.
        self._branches = {
            name: (branch(*unit), branch(unit.out_channels, unit.out_channels, 1, True))[
                : architecture.num_streams
            ]
            for name, unit, _ in self.sections
        }
        self._shortcuts = {
            name: (shortcut(unit),) * architecture.num_streams
            for name, unit, _ in self.sections
            if not unit.keeps_shape
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
    def chains(self) -> list[Section]:
        """The sections that are chains."""
        return [section for section in self.sections if section.unit.keeps_shape]

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables; a chain's have a leading axis of one per layer."""
        params, stats = {}, {}

        def add(name, init, key):
            params[name], stats[name] = init(key)

        stem_key, head_key, *section_keys = jax.random.split(key, 2 + len(self.sections))
        add("stem", self._stem.init, stem_key)
        for (name, unit, depth), section_key in zip(self.sections, section_keys, strict=True):
            modules = self._branches[name] + self._shortcuts.get(name, ())

            def init_unit(key, modules=modules):
                keys = jax.random.split(key, len(modules))
                pairs = [module.init(k) for module, k in zip(modules, keys, strict=True)]
                return tuple(zip(*pairs, strict=True))

            if unit.keeps_shape:
                add(name, jax.vmap(init_unit), jax.random.split(section_key, depth))
            else:
                add(name, init_unit, section_key)
        add("head", self._head.init, head_key)
        return Variables(params, stats)

    def probes(self) -> dict[str, Exactness] | None:
        """A probe for every chain, to differentiate `apply` by; None where nothing is rebuilt."""
        if self.backprop != "reverse" or not self.check_exactness:
            return None
        return {section.name: Exactness.probe() for section in self.chains}

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
        params, stats = variables
        new_stats = {}
        x_BHWC, new_stats["stem"] = self._stem.apply(
            params["stem"], stats["stem"], image_BHWC, train=train
        )
        x = tuple(jnp.split(x_BHWC, self.architecture.num_streams, axis=-1))
        for name, unit, _ in self.sections:
            if unit.keeps_shape:
                x, new_stats[name] = chain(
                    self._layer(name, train),
                    params[name],
                    x,
                    data_L=stats[name],
                    backprop=self.backprop,
                    probe=None if probes is None else probes[name],
                )
            else:
                x, new_stats[name] = self._transition(name, params[name], stats[name], x, train)
        logits_BV, new_stats["head"] = self._head.apply(
            params["head"], stats["head"], jnp.concatenate(x, axis=-1), train=train
        )
        return logits_BV, new_stats

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
