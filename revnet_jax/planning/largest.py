"""Finds the largest size that fits into memory, with few compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SIZES = ("batch", "depth", "context")  # sizes of a training step that a plan can search


class Largest(NamedTuple):
    """The result of a search.

    Attributes:
      size: the largest that was compiled and fits; None if none does.
      needed_bytes: memory at that size.
      exact: whether the next larger size was compiled too and does not fit; if size is None,
        whether the smallest size was compiled.
    """

    size: int | None
    needed_bytes: int | None
    exact: bool


def largest_that_fits(
    needed_bytes: Callable[[int], int | None],
    start: int,
    *,
    limit_bytes: int,
    step: int = 1,
    most: int,
    most_compiled: int = 6,
) -> Largest:
    """Searches by the secant method, since memory is nearly affine in size.

    Args:
      needed_bytes: memory at a size; None if the compiler ran out of memory without a figure.
      start: the first size to try; all sizes are multiples of `step`, and at most `most`.
      most_compiled: the largest number of calls of `needed_bytes`.

    Raises ValueError for a start that is not a multiple of `step`.
    """
    if start % step:
        raise ValueError(f"got a start of {start}, expected a multiple of the step, {step}")
    tried = {size: needed_bytes(size) for size in (start, min(2 * start, most))}
    while len(tried) < most_compiled:
        fitting, failing = _split(tried, limit_bytes)
        # As long as nothing has failed, one step beyond `most` counts as failed: `most` may be
        # tried.
        low, high = max(fitting, default=0), min(failing, default=most + step)
        # Strictly between the largest that fits and the smallest that fails: if nothing is left
        # there, the guess was tried before, and the search ends.
        guess = min(max(_guess(tried, limit_bytes, low, high, step), low + step), high - step)
        if guess < step or guess in tried:
            break
        tried[guess] = needed_bytes(guess)
    fitting, failing = _split(tried, limit_bytes)
    if not fitting:
        return Largest(None, None, exact=step in failing)
    size = max(fitting)
    return Largest(size, tried[size], exact=size + step in failing)


def _split(tried, limit_bytes):
    """(sizes that fit, sizes that do not)."""
    fitting = [
        size for size, needed in tried.items() if needed is not None and needed <= limit_bytes
    ]
    # A size without a figure has failed: the compiler ran out of memory.
    return fitting, [size for size in tried if size not in fitting]


def _guess(tried, limit_bytes, low, high, step):
    """The size where a line through two known points meets the limit; else halfway."""
    known = sorted((size, needed) for size, needed in tried.items() if needed is not None)
    halfway = (low + high) // 2 // step * step
    if len(known) < 2:
        return halfway
    # The two nearest to the limit, because memory is only nearly affine. It may fall from one to
    # the other, where a compiler saves memory as it nears the limit: then the first and the last.
    nearest = sorted(known, key=lambda point: abs(point[1] - limit_bytes))[:2]
    for (size1, needed1), (size2, needed2) in (nearest, (known[0], known[-1])):
        slope = (needed2 - needed1) / (size2 - size1)
        if slope > 0:
            return int(size1 + (limit_bytes - needed1) / slope) // step * step
    # Memory does not grow, so no line meets the limit: try the largest size, then bisect.
    return halfway if high in tried else high - step
