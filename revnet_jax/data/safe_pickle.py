"""A restricted unpickler that reads only pickles like those that CIFAR is published in.

Unpickling may call any function that the file names. A short file can also encode a value that is
exponentially large: a tuple that holds one tuple twice, which again holds one twice, and so on. So
the file's instructions are checked first. They may name only what numpy arrays and byte strings
need, may not refer to a container a second time, and are limited in number.
"""

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from revnet_jax.data.dataset import DataError

# The largest published file has 155 MB: 50,000 images with two labels and a name each. Rewritten by
# Python 3 it has half a million instructions.
_MAX_BYTES = 2**29
_MAX_INSTRUCTIONS = 2**20
_MAX_CONTAINERS = 100  # a published file has a dictionary, three lists, and array shapes

# Opcodes of protocols 2 (that of the published files) to 5.
_NO_VALUES = frozenset({"PROTO", "FRAME", "MARK", "STOP"})
_NUMBERS = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"})
_BYTES = frozenset({"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"})
_TEXT = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
_GLOBALS = frozenset({"GLOBAL", "STACK_GLOBAL"})
_CONSUME = frozenset({"REDUCE", "BUILD"})  # these remove the tuple before them from the stack
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_CONTAINERS = _TUPLES | {"EMPTY_DICT", "EMPTY_LIST"}
_FILL = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS"})
_PUT = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"BINGET", "LONG_BINGET"})
_ALLOWED = frozenset().union(
    _NO_VALUES, _NUMBERS, _BYTES, _TEXT, _GLOBALS, _CONSUME, _CONTAINERS, _FILL, _GET
)


class _Refused(Exception):
    """The file asks for something that is not allowed."""


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: Any, *_: Any):
        self.name = name.decode() if isinstance(name, bytes) else name
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # The state of a dtype is (version, byte order, ...).
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order

    def to_numpy(self) -> np.dtype:
        # Pixels and labels are integers; arrays of objects would hold pointers.
        if not re.fullmatch("[iu][1248]", self.name) or self.order not in ("<", ">", "=", "|"):
            raise _Refused(f"an array of {str(self.order)[:9]}{str(self.name)[:9]}")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """Stands in for an array, which a pickle creates empty and then fills by a state.

    numpy itself would allocate an array of any size before it is known that the file has the data.
    """

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # The state of an array is (version, shape, dtype, whether its order is Fortran's, bytes).
        _, self.shape, self.dtype, self.fortran, self.content = state

    def to_numpy(self) -> np.ndarray:
        # Neither allocates memory, and `reshape` fails if the shape asks for more than is there.
        flat = np.frombuffer(self.content, self.dtype.to_numpy())
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which protocol 2 encodes byte strings."""
    if encoding != "latin1":
        raise _Refused("a byte string that is not encoded as latin1")
    return text.encode("latin1")


_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # before numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, not to be called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            raise _Refused(f"{module_name}.{global_name}"[:99]) from None


def load_pickled_dict(path: Path) -> dict[str, Any]:
    """Returns the dictionary in the file, with its keys as text.

    Strings written by Python 2 are returned as bytes.

    Raises:
      DataError: the file is truncated or damaged, has instructions that the published files do not
        need, or holds something other than a dictionary.
    """
    size = path.stat().st_size
    try:
        if size > _MAX_BYTES:
            raise _Refused(f"{size:,} bytes")
        with path.open("rb") as file:
            # All instructions are checked before the first is carried out.
            _check_instructions(file)
            file.seek(0)
            # Strings of Python 2, the pixels among them, would otherwise be decoded from ASCII.
            value = _Unpickler(file, encoding="bytes").load()
        if isinstance(value, dict):
            return {_text(key): _to_numpy(item) for key, item in value.items()}
    except _Refused as error:
        raise DataError(
            f"{path}: got a pickle that asks for {error}; expected only numpy arrays, numbers and "
            "strings, as the published files have; do not load it, and download the data set from "
            "its published address"
        ) from None
    # A damaged pickle may raise almost any exception.
    except Exception as error:
        raise DataError(
            f"{path}: got a pickle of {size} bytes that ends early or is damaged "
            f"({type(error).__name__}: {error}); expected a file of the published python version; "
            "download it again"
        ) from error
    raise DataError(
        f"{path}: got a pickled {type(value).__name__}, expected a dictionary; "
        "check that this file belongs to the data set"
    )


def _check_instructions(file: Any) -> None:
    """Raises _Refused for instructions that no published file needs, or for too many.

    Cost: 1 us per instruction.
    """
    is_container: dict[int, bool] = {}  # by memo number: whether the value is a container
    on_top, containers = "", 0  # on_top: the opcode that made the value on top of the stack
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count >= _MAX_INSTRUCTIONS:
            raise _Refused(f"more than {_MAX_INSTRUCTIONS:,} values")
        if name in _PUT:
            # MEMOIZE takes the next number; the other instructions name theirs.
            number: Any = len(is_container) if name == "MEMOIZE" else argument
            if number >= _MAX_INSTRUCTIONS:  # Python allocates memo slots for all smaller numbers
                raise _Refused(f"a value of number {number:,}")
            # Filling a container leaves it on top of the stack.
            is_container[number] = on_top in _CONTAINERS or on_top in _FILL
            continue
        if name in _GET and is_container.get(argument):
            raise _Refused("one list, tuple or dictionary in two places")
        # A tuple of arguments is used up at once and is no part of the result: not counted.
        if name in _CONSUME and on_top in _TUPLES:
            containers -= 1
        containers += name in _CONTAINERS
        if containers > _MAX_CONTAINERS:
            raise _Refused(f"more than {_MAX_CONTAINERS} lists, tuples and dictionaries")
        if name not in _ALLOWED:
            raise _Refused(f"the instruction {name}")
        on_top = name


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _to_numpy(value: Any) -> Any:
    return value.to_numpy() if isinstance(value, _Array) else value
