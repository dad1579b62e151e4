"""Writes tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def either(value: Any, text: Callable[[Any], str]) -> str:
    """`text(value)`, or a dash if the value is None."""
    return "-" if value is None else text(value)


def markdown(cells: Sequence[Sequence[str]], text_columns: int | Sequence[str] = 1) -> list[str]:
    """Lines of a Markdown table, in columns of equal width.

    Args:
      cells: the header, then the rows.
      text_columns: how many columns, from the first, or the names of those, that are text and
        aligned to the left. Numbers are aligned to the right.
    """
    header, *rows = cells
    if isinstance(text_columns, int):
        text_columns = header[:text_columns]
    is_text = [name in text_columns for name in header]
    lines = [header, ["---" if text else "---:" for text in is_text], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    align = lambda cell, width, text: cell.ljust(width) if text else cell.rjust(width)
    padded = (map(align, line, widths, is_text) for line in lines)
    return [f"| {' | '.join(line)} |" for line in padded]
