"""Which parameters are trained, and which stay as they are (frozen)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from revnet_jax.core import trees


class Trainable(NamedTuple):
    """The parameters whose path matches a regular expression; the others are frozen.

    Frozen parameters have no gradient and no optimizer state, and no product is computed for their
    gradients.

    Attributes:
      pattern: searched for in paths such as "layers/0/qkv/kernel", which is of all layers, stacked.
        The default matches all.
    """

    pattern: str = ""

    def divide(self, params: Any) -> tuple[Any, Any]:
        """Returns (trained, frozen): trees like `params`, each with None in place of the others."""
        return trees.partition(params, self._matches(params))

    def check(self, params: Any) -> None:
        """Raises ValueError unless the pattern matches parameters, and no integers among them.

        Args:
          params: shapes are enough.
        """
        try:
            matches = self._matches(params)
        except re.error as error:
            raise ValueError(
                f"got trainable={self.pattern!r} ({error}), expected a regular expression"
            ) from error
        if not any(jax.tree.leaves(matches)):
            paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise ValueError(
                f"got trainable={self.pattern!r}, which matches no parameter, expected a regular "
                f"expression that is found in the path of some: {', '.join(paths)}"
            )
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.divide(params)[0]):
            if not trees.is_inexact(leaf):
                raise ValueError(
                    f"got trainable={self.pattern!r}, which matches {_name(path)} of {leaf.dtype}, "
                    "expected a regular expression for other parameters, such as lora: whole "
                    "numbers have no gradient"
                )

    def _matches(self, params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: re.search(self.pattern, _name(path)) is not None, params
        )


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")
