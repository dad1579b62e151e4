"""Frozen parameters: those of a chain that its caller does not differentiate.

They move from the parameters of a layer to its data, which has no cotangents. So the backward sweep
neither computes nor stacks gradients for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from revnet_jax.core import trees
from revnet_jax.core.block import (
    Block,
    Context,
    Forward,
    Invertible,
    PlainLayer,
    Rewound,
    Streams,
)


def freeze(section: Any, frozen_L: Any) -> Any:
    """Returns the section with its frozen parameters in `data_L`: (data, frozen) for each layer.

    Args:
      section: a `Section` whose `params_L` has None at the frozen parameters.
      frozen_L: the frozen parameters, with None at the others.
    """
    layer = section.layer
    if isinstance(layer, Block):
        # A block's parameters are a tuple by half-step, so branch i finds its frozen ones in entry
        # i. `i=i` binds the number at once; a plain closure would see the last one.
        steps = tuple(
            dataclasses.replace(step, branch=_thawing(step.branch, lambda frozen, i=i: frozen[i]))
            for i, step in enumerate(layer.half_steps)
        )
        layer = dataclasses.replace(layer, half_steps=steps)
    elif isinstance(layer, Invertible):
        apply, undo = _thawing(layer.apply), _thawing(layer.undo)
        layer = dataclasses.replace(layer, apply=apply, undo=undo)
    elif isinstance(layer, PlainLayer):
        layer = dataclasses.replace(layer, apply=_thawing(layer.apply))
    else:
        # The functions of a class of the caller's own are not known, so its methods are wrapped.
        layer = _Thawing(layer)
    return section._replace(layer=layer, data_L=(section.data_L, frozen_L))


def _thawing(function: Callable[..., Any], part: Callable[[Any], Any] = lambda tree: tree):
    """`function(params, ..., context)` of a layer, with its frozen parameters in `context.data`.

    part: selects what the function's parameters are from those of the layer.
    """

    def run(params, *others):
        # The context is the last argument of a branch, of `apply` and `undo`, and of every method.
        *others, context = others
        data, frozen = context.data
        params = trees.join(params, part(frozen))
        return function(params, *others, context._replace(data=data))

    return run


@dataclass(frozen=True)
class _Thawing:
    """A layer of the caller's own class, with its frozen parameters in `context.data`.

    Its `rewind` computes the cotangents of all parameters. Compilers remove the frozen ones.
    """

    layer: Any

    def forward(self, params: Any, x: Streams, context: Context) -> Forward | tuple:
        return _thawing(self.layer.forward)(params, x, context)

    def inverse(self, params: Any, y: Streams, residue: Any, context: Context) -> Streams:
        return _thawing(self.layer.inverse)(params, y, residue, context)

    def rewind(
        self, params: Any, y: Streams, dy: Streams, daux: Any, residue: Any, context: Context
    ) -> Rewound:
        # The caller's method knows nothing of frozen parameters and returns their cotangents too,
        # which the sweep has no place for.
        found = Rewound(*_thawing(self.layer.rewind)(params, y, dy, daux, residue, context))
        return found._replace(dparams=trees.like(params, found.dparams))
