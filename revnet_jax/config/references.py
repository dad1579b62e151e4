"""The user's own functions that a config names: `config.model.family = "my_model:build"`.

The string is `MODULE:FUNCTION`, as in entry points and in Hydra's `_target_`. Unlike an object in a
config it can be given as a flag, is printed by `--dry_run`, is kept in config.json, and reaches
other processes (planners, other hosts, a later `scripts/evaluate.py`). The function gets the
settings of its section as keyword arguments. So its signature lists its settings, and a misspelt
one is found before anything is compiled.

Modules are found as by `import`; the folder of the config file is searched first.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from revnet_jax.config import ConfigError
from revnet_jax.errors import UserError

KEYS = ("model.family", "data.name", "optimizer.name")  # settings that may be references


def is_reference(name: Any) -> bool:
    """Whether a setting is a MODULE:FUNCTION string, not a name that the package defines."""
    return isinstance(name, str) and ":" in name


def named_in(config: Mapping[str, Any]) -> list[str]:
    """The references in a config. config: settings by dotted key."""
    return [config[key] for key in KEYS if key in config and is_reference(config[key])]


def look_in(folders: Iterable[str | os.PathLike[str]], *, first: bool = True) -> None:
    """Adds folders to the module search path: before all others, or after those of PYTHONPATH.

    Not after the others, which have modules that are called like a user's own.
    """
    given = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    for folder in (os.path.abspath(folder) for folder in folders):
        if folder not in sys.path and os.path.isdir(folder):
            after = [i for i, path in enumerate(sys.path) if path in given]
            sys.path.insert(0 if first else 1 + max(after, default=-1), folder)


def search_path() -> str:
    """A value of PYTHONPATH with which another process finds the same modules as this one."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def folders_of(config: Mapping[str, Any]) -> list[str]:
    """The folders where the modules of a config were found, for processes without its file.

    Args:
      config: settings by dotted key.
    """
    found = []
    for name in named_in(config):
        module, _, _ = name.partition(":")
        file = getattr(sys.modules.get(module), "__file__", None)
        if file:
            levels = module.count(".") + (Path(file).name == "__init__.py")
            found.append(str(Path(file).absolute().parents[levels]))
    return list(dict.fromkeys(found))


def load_reference(key: str, name: str) -> Callable[..., Any]:
    """Imports the function that the setting `config.<key>` names.

    Raises ConfigError if the module or the function is missing. Other errors while importing are
    bugs in the module, and keep their traceback.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ConfigError(
            f"config.{key}: got {name!r}, expected MODULE:FUNCTION, as my_model:build"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"config.{key}: got {name!r} and found no module {missing!r}, expected it beside "
                "the config file, in a folder of PYTHONPATH, or installed"
            ) from error
        raise ConfigError(
            f"config.{key}: got {name!r}, which imports {missing!r}, expected that to be installed"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        got = "no" if function is None else f"a {type(function).__name__}, not a function, as"
        raise ConfigError(
            f"config.{key}: got {name!r} and {got} {attribute!r} in {module.__file__}, expected a "
            "function"
        )
    return function


def parameters_taken(key: str, name: str) -> set[str]:
    """The parameters that the signature of the function of `config.<key>` names."""
    parameters = inspect.signature(load_reference(key, name)).parameters
    return {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def call_reference(
    key: str,
    name: str,
    settings: Mapping[str, Any],
    *,
    given: Mapping[str, Any],
    optional: Mapping[str, Any],
) -> Any:
    """Calls the function of `config.<key>` with keyword arguments.

    Args:
      settings: the settings of its section. Its signature must accept all of them.
      given: arguments of the package, which its signature must accept too.
      optional: arguments that it gets only if its signature names them.

    Raises ConfigError if signature and settings do not match, and in place of a ValueError or
    TypeError that the function raises.
    """
    function, section = load_reference(key, name), key.partition(".")[0]
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = parameters_taken(key, name)
    arguments = {**settings, **given}
    if refused := [argument for argument in arguments if argument not in named and not takes_all]:
        mend = f", or remove config.{section}.{refused[0]}" if refused[0] in settings else ""
        raise ConfigError(
            f"config.{section}: got {name} without a parameter {refused[0]}, expected one for each "
            f"of {', '.join(arguments)}: add it or **options{mend}"
        )
    arguments |= {argument: x for argument, x in optional.items() if argument in named}
    needed = [n for n in named if parameters[n].default is parameters[n].empty]
    if missing := sorted(set(needed) - arguments.keys()):
        raise ConfigError(
            f"config.{section}: got no {missing[0]}, which {name} takes, expected "
            f"config.{section}.{missing[0]} in the config file"
        )
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise ConfigError(f"config.{section}: {name}: {error} ({where})") from error


def check_members(key: str, name: str, what: Any, members: Collection[str], expected: str) -> None:
    """Raises ConfigError if an object lacks members.

    Args:
      what: the object, which the function of `config.<key>` returned.
    """
    if missing := [member for member in members if not hasattr(what, member)]:
        raise ConfigError(
            f"config.{key}: got a {type(what).__name__} without {', '.join(missing)} from {name}, "
            f"expected {expected}"
        )
