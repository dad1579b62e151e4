"""The shape of an image network: family, stem, stages, and units in groups."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NUM_STREAMS = {"resnet": 1, "revnet": 2, "irevnet": 2}
STEMS = ("cifar", "imagenet", "pad")


@dataclass(frozen=True)
class ConvNetShape:
    """The shape of an image network, without settings of its training.

    Attributes:
      family: "resnet" (one stream, a unit is `x + f(x)`), "revnet" (two streams, f and g), or
        "irevnet" (a RevNet whose stages are joined by space-to-depth: Jacobsen et al. 2018,
        arXiv:1802.07088).
      units: residual units per stage.
      channels: of the stem, then of each stage; each of two streams has half of them. In an
        i-RevNet the first stage has as many as the stem, and each later stage four times as many as
        the one before.
      bottleneck: three convolutions per branch instead of two.
      stem: "cifar", "imagenet" (see `Stem`), or "pad" (adds channels of zeros, which is
        invertible).
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
        # Streams have equal shares of the channels, and a bottleneck a quarter of a share inside.
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

        if self.family == "irevnet":
            stages = range(len(self.units))
            # Each space-to-depth makes four channels of one.
            expected = (self.channels[0], *(self.channels[0] * 4**i for i in stages))
            if self.channels != expected or any(n % 2 ** stages[-1] for n in self.image_shape[:2]):
                raise ValueError(
                    f"got channels={self.channels} and image_shape={self.image_shape}, expected "
                    f"{expected} and a height and width divisible by {2 ** stages[-1]}: every "
                    "stage after the first halves the resolution and loses nothing"
                )
        if self.stem == "pad" and self.channels[0] < self.image_shape[2]:
            raise ValueError(
                f"got channels={self.channels} for images of {self.image_shape[2]} channels, "
                "expected a stem that adds channels: it cannot take any away"
            )

    @property
    def num_streams(self) -> int:
        return NUM_STREAMS[self.family]


class Unit(NamedTuple):
    """One residual unit. Channels are those of one stream."""

    in_channels: int
    out_channels: int
    stride: int
    activate_first: bool

    @property
    def keeps_shape(self) -> bool:
        return self.in_channels == self.out_channels and self.stride == 1


class Group(NamedTuple):
    """`depth` equal units in a row, or a single unit that changes the streams' shape.

    Attributes:
      unit: None for the space-to-depth of an i-RevNet, which has no parameters.
    """

    name: str
    unit: Unit | None
    depth: int

    @property
    def is_transition(self) -> bool:
        """Whether the group has no inverse, so that it is computed outside the chains."""
        return self.unit is not None and not self.unit.keeps_shape


def groups(shape: ConvNetShape) -> list[Group]:
    """Lists the units of all stages, with equal neighbours of a stage joined into one group."""
    result = []
    stem_channels, *stage_channels = (c // shape.num_streams for c in shape.channels)
    channels = stem_channels
    for stage, (depth, out_channels) in enumerate(zip(shape.units, stage_channels, strict=True)):
        units = []
        if stage and shape.family == "irevnet":
            result.append(Group(f"stage{stage + 1}_squeeze", None, 1))
            channels = out_channels
        for i in range(depth):
            # An i-RevNet changes resolution between stages instead.
            stride = 2 if i == 0 and stage > 0 and shape.family != "irevnet" else 1
            # Stems but "pad" end with normalisation and ReLU, so the first unit has none in front.
            units.append(Unit(channels, out_channels, stride, activate_first=bool(stage or i)))
            channels = out_channels
        # At most two groups, because only the first unit of a stage can differ from the others.
        for i, (unit, group) in enumerate(itertools.groupby(units)):
            result.append(Group(f"stage{stage + 1}_{'ab'[i]}", unit, len(list(group))))
    return result


def chains(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Joins the groups between transitions into chains, each named after its first group."""
    runs = itertools.groupby(groups, key=lambda group: group.is_transition)
    chains = [list(run) for is_transition, run in runs if not is_transition]
    return {chain[0].name: chain for chain in chains}
