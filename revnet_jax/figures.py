"""Plots that a script draws at its end: what they need is looked for at its start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from revnet_jax.errors import UserError, writing


def load_figure_class(flag: str, path: str) -> Any:
    """matplotlib's Figure, to be saved at `path`; UserError before anything is computed.

    flag: the name of the flag that says where.
    """
    folder = Path(path).absolute().parent
    if not path.endswith(".png") or Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"got --{flag}={path}, expected a .png file in a folder that can be written"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--{flag} needs matplotlib: run pip install matplotlib") from None
    return Figure


def save(figure: Any, path: str, dpi: int = 100) -> None:
    """Writes the file, or raises StorageError."""
    with writing(path):
        figure.savefig(path, dpi=dpi)
