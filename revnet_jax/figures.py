"""Plots that a script draws at its end: what they need is looked for at its start."""

from __future__ import annotations

from typing import Any

from revnet_jax.cli import check_output
from revnet_jax.errors import UserError, writing


def load_figure_class(flag: str, path: str) -> Any:
    """matplotlib's Figure, to be saved at `path`; UserError before anything is computed.

    flag: the name of the flag that says where.
    """
    check_output(flag, path, suffix=".png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--{flag} needs matplotlib: run scripts/setup.sh plots") from None
    return Figure


def save(figure: Any, path: str, dpi: int = 100) -> None:
    """Writes the file, or raises StorageError."""
    with writing(path):
        figure.savefig(path, dpi=dpi)
