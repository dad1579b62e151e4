"""Imports go one way: see docs/code.md."""

import ast
import pathlib
import subprocess
import sys

import pytest

import revnet_jax

PACKAGE = pathlib.Path(revnet_jax.__file__).parent
FORBIDDEN = {
    "core": {"flax", "optax", "orbax", "absl", "ml_collections", "grain", "numpy", "PIL"},
    "data": {"jax", "flax", "optax", "orbax", "absl", "ml_collections"},
    "models": {"orbax", "absl", "ml_collections", "grain"},
    "config": {"jax", "flax", "optax", "orbax", "grain", "numpy"},
    "programs": {"flax", "optax", "orbax", "absl", "ml_collections", "grain"},
}
LIBRARY = {"core", "models", "optimizers", "data"}
TOOLS = {"errors", "files", "tables"}
SETTINGS = {"config", "families"} | TOOLS
MAY_IMPORT = {
    "core": {"core"},
    "data": {"data"} | TOOLS,
    "models": {"core", "models"},
    "optimizers": {"core", "models", "optimizers"},
    "programs": {"core", "programs"},
    "config": {"config"} | TOOLS,
    "errors": set(),
    "files": set(),
    "tables": set(),
    "devices": set(),
    "figures": {"config", "errors"},
    "families": {"config", "core", "models"},
    "runs": {"data", "devices", "optimizers", "runs"} | SETTINGS,
    "training": {"devices", "runs", "training"} | LIBRARY | SETTINGS,
    "pretrained": {"pretrained", "runs", "training"} | LIBRARY | SETTINGS,
    "couplings": {"couplings", "runs", "training"} | LIBRARY | TOOLS,
    "planning": {"devices", "planning", "programs", "training"} | LIBRARY | SETTINGS,
    "benchmark": {"benchmark", "devices", "planning", "programs", "training"} | LIBRARY | SETTINGS,
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("house", MAY_IMPORT)
def test_imports_go_one_way(house):
    modules = [*(PACKAGE / house).rglob("*.py"), *PACKAGE.glob(f"{house}.py")]
    assert modules
    for path in modules:
        for name in imports(path):
            top, *rest = name.split(".")
            assert top not in FORBIDDEN.get(house, ()), f"{path} imports {name}"
            if house == "core":
                assert top in {"jax", "revnet_jax", *sys.stdlib_module_names}, f"imports {name}"
            if top == "revnet_jax" and rest:
                assert rest[0] in MAY_IMPORT[house], f"{path} imports {name}"
            assert top not in {"scripts", "configs", "tests"}, f"{path} imports {name}"


def test_core_loads_nothing_but_jax():
    code = (
        "import sys, revnet_jax.core\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "print(*sorted(loaded & {'flax', 'absl', 'optax', 'orbax', 'ml_collections', 'grain'}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def public_names(path):
    """Classes, functions and type aliases that a module defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name) and not t.id.isupper()]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def shared_names(folder):
    """The public names that several modules of a folder define, each with those modules."""
    homes = {}
    for path in sorted(folder.rglob("*.py")):
        for name in public_names(path):
            homes.setdefault(name, set()).add(str(path.relative_to(folder)))
    del homes["main"]  # a program's `main` is no name
    return {name: found for name, found in homes.items() if len(found) > 1}


def test_a_public_name_is_defined_once():
    """So that a name says what it is, wherever it is imported, and scripts copy no function."""
    assert shared_names(PACKAGE) == {}
    assert shared_names(PACKAGE.parent / "scripts") == {}
