"""Plots that a script draws at its end, with checks that it can make at its start."""

from __future__ import annotations

from typing import Any

from revnet_jax.config.cli import check_output
from revnet_jax.errors import UserError, writing


def load_figure_class(flag: str, path: str) -> Any:
    """Returns the class Figure of matplotlib, after checking that `path` can be written.

    Call it before computing anything. flag: the name of the flag that gives the path.

    Raises UserError if matplotlib is missing or `path` cannot be written.
    """
    check_output(flag, path, suffix=".png")
    try:
        # Not pyplot, which has global state and may look for a display.
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--{flag} needs matplotlib: run scripts/setup.sh plots") from None
    return Figure


def save(figure: Any, path: str, dpi: int = 100) -> None:
    """Saves a figure at `path`. Raises StorageError if it cannot be written."""
    with writing(path):
        figure.savefig(path, dpi=dpi)
