"""The command line: how an experiment's file and flags become a config, and how programs end.

Imports nothing heavy: a misspelt flag should cost half a second, not the start of JAX.
"""

from __future__ import annotations

import difflib
import itertools
import runpy
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from revnet_jax.config import flatten
from revnet_jax.errors import PREEMPTED_STATUS, Preempted, UserError


def define_config_flag() -> flags.FlagHolder:
    """`--config=FILE[:arm]`, each of whose keys is a flag too: `--config.model.backprop=store`."""
    # No default path: it would be read, relative to the current folder, as soon as this is called.
    return config_flags.DEFINE_config_file("config", None, "FILE[:arm] of the experiment.")


def define_process_flags() -> Callable[[], dict[str, Any]]:
    """The flags that say which of several processes this is; what it returns reads them.

    What that returns are the arguments of `training.distributed.start`.
    """
    holders = {
        "coordinator_address": flags.DEFINE_string(
            "coordinator_address", None, "host:port of the first of several processes."
        ),
        "num_processes": flags.DEFINE_integer(
            "num_processes", None, "How many processes work together."
        ),
        "process_id": flags.DEFINE_integer(
            "process_id", None, "Which of them this one is, from 0."
        ),
        "heartbeat_timeout_seconds": flags.DEFINE_integer(
            "heartbeat_timeout_seconds", 60, "After so long without a sign of it a process is dead."
        ),
    }
    return lambda: {name: holder.value for name, holder in holders.items()}


def run(main: Callable[[list[str]], Any], *, required: tuple[str, ...]) -> None:
    """`absl.app.run`, except that what the user can mend is one line on stderr and status 1.

    So is a run that was preempted, with status 75: start it again.

    required: names of flags. A mistake in a flag costs no more than parsing them.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"error: {error}")
        except Preempted as stop:
            print(stop, file=sys.stderr)
            sys.exit(PREEMPTED_STATUS)
        except KeyboardInterrupt:
            sys.exit("interrupted")

    app.run(guarded, flags_parser=lambda argv: _parse(argv, required))


def _parse(argv: list[str], required: tuple[str, ...]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:  # where the config file failed, its traceback is in the message
        last_line = str(error).strip().splitlines()[-1]
        sys.exit(f"error: {last_line.removeprefix('revnet_jax.config.ConfigError: ')}")
    except (AttributeError, TypeError) as error:  # from ml_collections, for a key there is not
        sys.exit(f"error: {_explain_key(argv) or error}")
    if len(rest) > 1:
        sys.exit(f"error: got argument {rest[1]!r}, expected flags only: write --name=value")
    for name in required:
        if flags.FLAGS[name].value is None:
            sys.exit(f"error: --{name} is missing: see --help")
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else ConfigDict()
    if not isinstance(config, ConfigDict | None):  # a stand-in that raises whenever it is used
        sys.exit(f"error: got {_config_path(argv)!r} as --config, expected a file that exists")
    return rest


def _explain_key(argv: list[str]) -> str | None:
    """Names the first flag that is no key of the config, and the key that was probably meant."""
    path, _, arm = _config_path(argv).partition(":")
    known = flatten(runpy.run_path(path)["get_config"](arm))
    for arg in argv[1:]:
        key = arg.lstrip("-").split("=")[0].removeprefix("config.")
        if arg.startswith("--config.") and key not in known:
            last = key.rpartition(".")[2]
            near = difflib.get_close_matches(key, known, 1) or [
                name for name in known if name.rpartition(".")[2] == last
            ]
            hint = f"did you mean --config.{near[0]}?" if near else f"one of {', '.join(known)}"
            return f"got --config.{key}, which is no key of the config: {hint}"
    return None


def _config_path(argv: list[str]) -> str:
    following = dict(itertools.pairwise(argv)).get("--config", "")
    joined = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    return joined[-1] if joined else following
