"""The command line: builds a config from a file and flags, and turns errors into one line.

Imports nothing heavy: a misspelt flag should cost half a second, not the start of JAX.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from revnet_jax.config import ConfigError, flatten, knobs
from revnet_jax.config.experiments import locate, names
from revnet_jax.config.ranges import Range, check_ranges
from revnet_jax.config.references import look_in
from revnet_jax.errors import UserError, exit_status

flags.disclaim_key_flags()  # so that --help lists flags defined here under the calling program

_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
# Names of settings in other packages that no rule of `near_keys` would find.
_SHORT = {
    "lr": ("schedule.learning_rate",),
    "batch": ("batch_size",),
    "steps": ("num_steps",),
    "epochs": ("num_steps",),
    "depth": ("model.layers", "model.units"),
    "layers": ("model.units",),
    "width": ("model.channels",),
    "dim": ("model.width", "model.channels"),
    "dtype": ("model.compute_dtype", "model.param_dtype", "optimizer.state_dtype"),
    "workers": ("data.num_threads",),
    "path": ("data.dir",),
}


class _TupleParser(flags.ArgumentParser):
    """Parses tuples. A flag given twice keeps its last value; ml_collections would join both."""

    def parse(self, argument: Any) -> tuple[Any, ...]:
        return tuple_parser.TupleParser().parse(argument)


config_flags.register_flag_parser_for_type(tuple, _TupleParser())


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE[:arm]`, and a flag per setting: `--config.model.backprop=store`."""
    # No default path, because it would be read at once, relative to the current folder.
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "FILE[:arm] of the experiment, as configs/digits.py. Each of its settings is a flag: "
        "--config.batch_size=32. --config=FILE --help lists them.",
    )


def define_checkpoint_flag() -> flags.FlagHolder[Literal["newest", "best"]]:
    """Defines `--checkpoint`, which of a run's checkpoints is read."""
    # absl has no type for the values of an enum.
    flag: Any = flags.DEFINE_enum("checkpoint", "newest", ["newest", "best"], "Which checkpoint.")
    return flag


def limit(flag: flags.FlagHolder, expected: Range) -> None:
    """Makes parsing fail if the flag's number is out of range or NaN."""
    flags.register_validator(
        flag.name,
        lambda value: value is None or expected.holds(value),
        message=f"expected {expected.expected}",
    )


def check_output(flag: str, path: str, *, suffix: str = "") -> None:
    """Raises UserError unless a file can be written at `path`. Call it before computing anything.

    Args:
      flag: the name of the flag that gives the path.
    """
    file = Path(path).absolute()
    folder = file.parent
    if not path.endswith(suffix) or not folder.is_dir() or file.is_dir():
        kind = f"a {suffix} file" if suffix else "a file"
        raise UserError(f"got --{flag}={path}, expected {kind} in a folder that exists")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"got --{flag}={path}, expected a file that may be written")


def define_process_flags() -> Callable[[], dict[str, Any]]:
    """Defines the flags that say which of several processes this one is.

    Returns a function that reads them, as the arguments of `training.distributed.start`.
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


def run(
    main: Callable[[list[str]], Any], *, required: tuple[str, ...], arguments: bool = False
) -> None:
    """`absl.app.run`, but errors that the user can fix are one line (see `errors.exit_status`).

    Args:
      required: names of flags that must be given. Mistakes in flags are found before `main` starts.
      arguments: whether arguments other than flags are allowed.
    """

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        with exit_status():
            main(argv)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, required, arguments))


def _parse(argv: list[str], required: tuple[str, ...], arguments: bool) -> list[str]:
    """Parses the flags; any mistake in them ends the program with one line."""
    logging.set_verbosity(logging.ERROR)  # ml_collections warns before it raises
    asked = set(_HELP) & set(argv)
    if given := _config_path(argv):
        path = locate(given)
        spelt = {given: path, f"--config={given}": f"--config={path}"}
        argv = [spelt.get(arg, arg) for arg in argv]
        look_in([Path(path).parent])  # a config can import modules beside it, as a script can
    try:
        rest = flags.FLAGS([arg for arg in argv if arg not in asked])
    except Exception as error:
        mistake = _file_mistake(argv) or _flag_mistake(argv, error)
        if mistake is None:
            raise
        sys.exit(f"error: {mistake}")
    if len(rest) > 1 and not arguments:
        sys.exit(f"error: got argument {rest[1]!r}, expected flags only: write --name=value")
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if _config_path(argv) and not isinstance(config, ConfigDict):  # or an error stand-in
        sys.exit(f"error: {_file_mistake(argv)}")
    if config is not None and (mistake := _wrong_key(argv, config)):
        sys.exit(f"error: {mistake}")
    if asked:
        app.usage(shorthelp="--helpfull" not in asked, writeto_stdout=True)
        if config is not None:
            print(list_settings(config))
        sys.exit(0)
    for name in required:
        if not flags.FLAGS[name].value:
            sys.exit(f"error: --{name} is missing: see --help")
    for name in flags.FLAGS:
        # Most programs would take an empty list for one that is not given, some compute nothing.
        if flags.FLAGS[name].present and flags.FLAGS[name].value == []:
            sys.exit(f"error: got an empty --{name}, expected a list: leave it out for the default")
    if config is not None:
        try:
            knobs.check_experiment(config)
            check_ranges(config)
        except ConfigError as error:
            sys.exit(f"error: {error}")
    return rest


def _file_mistake(argv: list[str]) -> str | None:
    """Says what is wrong with the file of --config, which it loads, or with flags of settings."""
    if not _config_path(argv):
        return None
    path, *arm = _config_path(argv).split(":", 1)
    if not Path(path).is_file():
        known = ", ".join(names("configs"))
        return f"got {path!r} as --config, expected a file that exists, or one of {known}"
    try:
        module = runpy.run_path(path)
        if "get_config" not in module:
            return f"{path}: got no function get_config, expected one that returns a ConfigDict"
        config = module["get_config"](*arm)
    except ConfigError as error:
        return str(error)
    except Exception as error:
        tries = traceback.TracebackException.from_exception(error).stack
        lines = [at.lineno for at in tries if Path(at.filename).absolute() == Path(path).absolute()]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        text = " ".join(str(getattr(error, "msg", error)).split())
        where = path if line is None else f"{path}, line {line}"
        return f"{where}: {type(error).__name__}: {text}"
    if not isinstance(config, ConfigDict):
        return f"got {config!r} from get_config of {path}, expected a ConfigDict"
    return _wrong_key(argv, config)


def _flag_mistake(argv: list[str], error: Exception) -> str | None:
    """What absl or ml_collections found wrong with a flag; None for an error of another kind."""
    known = isinstance(error, flags.Error | AttributeError | TypeError | KeyError)
    return " ".join(str(error).split()) if known else None


def _config_path(argv: list[str]) -> str:
    """The value of --config, found as absl does; empty if it is not given."""
    found = ""
    for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            found = value if equals else following
    return found


def _wrong_key(argv: list[str], config: ConfigDict) -> str | None:
    """A message on the first flag that is not a setting of the config, with likely corrections."""
    known = flatten(config)
    for arg in argv[1:]:
        found = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        if found is None or found[1] in known:
            continue
        key = found[1]
        inside = [name for name in known if name.startswith(f"{key}.")]
        got = f"got --config.{key}, which is {'a group of settings' if inside else 'no setting'}"
        near = [f"--config.{name}" for name in near_keys(key, list(known))]
        *others, last = near or [""]
        named = f"{', '.join(others)} or {last}" if others else last
        hint = f"did you mean {named}? " if near else ""
        return f"{got} of the config: {hint}--config={_config_path(argv)} --help lists them"
    return None


def near_keys(key: str, known: Sequence[str]) -> list[str]:
    """Up to four known keys that a mistaken key may stand for, the most likely first.

    The first of these rules that finds any: the same name in another group; a name in `_SHORT`;
    initials (bs: batch_size); for a group, its name or first settings; similar spelling; words
    of a name.
    """
    name = key.rpartition(".")[2]
    names: dict[str, list[str]] = {}
    for each in sorted(known, key=lambda each: each.count(".")):
        names.setdefault(each.rpartition(".")[2], []).append(each)
    initials = lambda long: "".join(word[0] for word in long.split("_") if word)
    having = lambda holds: [each for long in names if holds(long) for each in names[long]]
    close = difflib.get_close_matches(key, known, 1)
    close = close or having(lambda long: long in difflib.get_close_matches(name, names, 1))
    found = (
        names.get(name, [])
        or [each for each in _SHORT.get(name, ()) if each in known]
        or having(lambda long: "_" in long and initials(long) == name)
        or [each for each in (f"{key}.name", f"{key}.family") if each in known]
        or [each for each in known if each.startswith(f"{key}.")]
        or close
        or having(lambda long: len(name) > 2 and f"_{name}" in f"_{long}")
    )
    return found[:4]


def list_settings(config: ConfigDict) -> str:
    """Lists the settings of a config as flags, each with the comment beside its definition."""
    defined = [knobs._mesh, knobs._optimizer, knobs.experiment]
    defined += [knobs._images] if "image_shape" in config.data else []
    defined += [knobs.image_classification] if "units" in config.model else []
    defined += [knobs.vision_transformer] if "patch" in config.model else []
    defined += [knobs.language_model] if "context" in config.data else []
    source = "".join(inspect.getsource(each) for each in defined)
    said = dict(re.findall(r"^ +(?:config\.)?([\w.]+) = .*?  # (.+)$", source, re.MULTILINE))
    lines = ["settings:", ""]
    for key, value in flatten(config).items():
        shown = f"  --config.{key}={shlex.quote(str(value))}"
        lines.append(f"{shown:44}  {said[key]}" if key in said else shown)
    return "\n".join(lines)
