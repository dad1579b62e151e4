"""Plots that a script draws at its end: what they need is looked for at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from revnet_jax.errors import UserError


def load_figure_class(flag: str, path: str) -> Any:
    """matplotlib's Figure, to be saved at `path`; UserError before anything is computed.

    flag: the name of the flag that says where.
    """
    if not path.endswith(".png") or not Path(path).absolute().parent.is_dir():
        raise UserError(f"got --{flag}={path}, expected a .png file in a folder that exists")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--{flag} needs matplotlib: run pip install matplotlib") from None
    return Figure
