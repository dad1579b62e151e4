"""Configs of runs that start from the weights of another run, such as an imported one."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from revnet_jax.config import ConfigError
from revnet_jax.config.saved import todays


def start_from(config: ConfigDict, workdir: Path, *data: str) -> None:
    """Takes a model and its weights from the folder of a run: `config.model`, `config.init_from`.

    Args:
      data: the settings of `config.data` that belong to the model, which are taken too. Those that
        are newer than the run keep their values in `config`, as newer settings of the model do.

    Raises ConfigError if the folder holds no run of this kind.
    """
    try:
        found = todays(json.loads((workdir / "config.json").read_text())["config"])
        if (family := found["model"]["family"]) != config.model.family:
            raise ValueError(f"it is of {family}")
        config.model.update(found["model"])
        # Where the data are is a matter of this run.
        config.data.update({name: found["data"][name] for name in data if name in found["data"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"got arm {str(workdir)!r}, expected one of laptop, or the folder of a run of "
            f"{config.model.family} ({what})"
        ) from error
    config.init_from = str(workdir)
