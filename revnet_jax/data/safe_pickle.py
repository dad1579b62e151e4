"""Reads the pickles that CIFAR is published in, and no others.

Unpickling may call any function that the file names. Here a file may name only what numpy arrays
and byte strings need; anything else is an error that names it.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from revnet_jax.data.dataset import DataError


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, which protocol 2 uses to write byte strings."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"got a byte string encoded as {encoding!r}, expected latin1")
    return text.encode("latin1")


# numpy's function to rebuild an array, under its names before and after numpy 2. Taken from an
# array because importing it by the old name warns.
_reconstruct = np.zeros(0).__reduce__()[0]
_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _DisallowedGlobal(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            raise _DisallowedGlobal(f"{module_name}.{global_name}") from None


def load_pickled_dict(path: Path) -> dict[str, Any]:
    """Returns the dictionary in the file, with its keys as text.

    Strings written by Python 2 come back as bytes.

    Raises:
      DataError: the file is truncated or damaged, names a global outside the allow-list, or holds
        something other than a dictionary.
    """
    try:
        with path.open("rb") as file:
            value = _Unpickler(file, encoding="bytes").load()
    except _DisallowedGlobal as error:
        raise DataError(
            f"{path}: got a pickle that asks for {error}; expected only numpy arrays, numbers and "
            "strings; do not load it, and download the data set from its published address"
        ) from None
    # A damaged pickle fails in as many ways as it has instructions.
    except Exception as error:
        raise DataError(
            f"{path}: got a pickle of {path.stat().st_size} bytes that ends early or is damaged "
            f"({type(error).__name__}: {error}); expected a file of the published python version; "
            "download it again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: got a pickled {type(value).__name__}, expected a dictionary; "
            "check that this file belongs to the data set"
        )
    return {key.decode() if isinstance(key, bytes) else str(key): value[key] for key in value}
