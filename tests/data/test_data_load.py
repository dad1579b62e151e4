import ast
import sys
from pathlib import Path

import pytest

import revnet_jax.data
from revnet_jax.data import load_dataset


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "'mnist'.*digits, cifar10, cifar100, image_folder"),
        ({"name": "digits", "dir": "somewhere"}, "dir='somewhere'.*expected None"),
        ({"name": "digits", "image_size": 32}, "image_size=32.*expected 8"),
        ({"name": "cifar10"}, "no dir for cifar10"),
        ({"name": "image_folder", "dir": "."}, "no image_size"),
        ({"name": "image_folder", "dir": ".", "image_size": 0}, "image_size=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments)


def test_package_imports_only_numpy_grain_pillow_and_tokenizers():
    allowed = {"numpy", "grain", "PIL", "tokenizers", "revnet_jax"} | sys.stdlib_module_names
    for path in Path(revnet_jax.data.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                if name.startswith("revnet_jax"):
                    own = ("revnet_jax.data", "revnet_jax.errors", "revnet_jax.files")
                    assert name.startswith(own), name
