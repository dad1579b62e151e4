"""Provenance: the command, host, devices and package versions of a start."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

PACKAGES = (
    "revnet_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)


def describe_start() -> dict[str, Any]:
    """The command, host, devices and package versions that this process was started with."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process_id": os.getpid(),
        "command": sys.argv,
        "config_file": _config_file(),
        "folder": os.getcwd(),
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def versions() -> dict[str, str | None]:
    """Versions of the packages that results may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _config_file() -> str | None:
    """The value of `--config`; None if it is not given or not defined, as in a notebook."""
    # FLAGS has no `get`. The value of the flag is the config; ml_collections keeps the file's name
    # beside it, in `config_filename`.
    flag = flags.FLAGS["config"] if "config" in flags.FLAGS else None  # noqa: SIM401
    return getattr(flag, "config_filename", None) if flag is not None and flag.present else None


@functools.cache
def git_commit() -> str | None:
    """The git commit of the package, with "-dirty" if files differ from it; None outside git."""
    return commit_of(Path(__file__))


def commit_of(file: Path) -> str | None:
    """The git commit of the repository that tracks this file, as `git_commit`; None if none does.

    A package that is installed inside of another project's repository is not tracked by it.
    """
    tracked = ["git", "ls-files", "--error-unmatch", file.name]
    # --exclude=* leaves out tags, so that every commit is named by its whole hash. --dirty looks at
    # every file, which may take long on a network file system: hence the timeout below.
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    run = functools.partial(
        subprocess.run, cwd=file.parent, capture_output=True, text=True, timeout=10
    )
    try:
        found = run(describe).stdout.strip() if run(tracked).returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found or None
