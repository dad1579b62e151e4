"""Finds the experiments and programs of the package, in a clone or in an installed wheel."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """The folder "configs" or "scripts": inside the package in a wheel, beside it in a clone."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


def names(kind: str) -> list[str]:
    """The names of the experiments (kind "configs") or of the programs (kind "scripts")."""
    return sorted(path.stem for path in folder(kind).glob("[!_]*.py"))


def locate(config: str) -> str:
    """Replaces the name of an experiment, NAME[:arm], by its file. For `--config`.

    An existing file, or an unknown name, is returned unchanged.
    """
    path, colon, arm = config.partition(":")
    if path not in names("configs") or Path(path).exists():
        return config
    return f"{folder('configs') / path}.py{colon}{arm}"
