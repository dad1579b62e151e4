"""The experiments and programs that come with the package: folders of a clone, parts of a wheel."""

from __future__ import annotations

from pathlib import Path


def folder(name: str) -> Path:
    """ "configs" or "scripts": inside the package where a wheel was installed, else beside it."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def names(kind: str) -> list[str]:
    """The experiments in "configs", or the programs in "scripts"."""
    return sorted(path.stem for path in folder(kind).glob("[!_]*.py"))


def locate(config: str) -> str:
    """The file of a `--config`: NAME[:arm] stands for an experiment of the package.

    What is a file, or no known name, is left as it is.
    """
    path, colon, arm = config.partition(":")
    if path not in names("configs") or Path(path).exists():
        return config
    return f"{folder('configs') / path}.py{colon}{arm}"
