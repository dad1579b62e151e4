"""A restricted unpickler that reads only pickles like those that CIFAR is published in.

Unpickling may call any function that the file names. A short file can also encode a value that is
exponentially large: a tuple that holds one tuple twice, which again holds one twice, and so on. So
the file's instructions are checked first, by following the kinds of the values on the stack. They
may name only what numpy arrays and byte strings need, may not refer to a container a second time,
may change only the values made here, and are limited in number.
"""

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from revnet_jax.data.dataset import DataError

# The largest published file has 155 MB: 50,000 images with two labels and a name each. Rewritten by
# Python 3 it has half a million instructions.
_MAX_BYTES = 2**29
_MAX_INSTRUCTIONS = 2**20
_MAX_CONTAINERS = 100  # a published file has a dictionary, three lists, and array shapes

# Opcodes of protocols 2 (that of the published files) to 5, by the kind of value that they push.
_PUSHED = {
    name: kind
    for kind, names in {
        "constant": ("NONE", "NEWTRUE", "NEWFALSE"),
        "number": ("BININT", "BININT1", "BININT2", "LONG1"),
        "bytes": ("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        "text": ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        "function": ("GLOBAL", "STACK_GLOBAL"),
        "tuple": ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"),
        "list": ("EMPTY_LIST",),
        "dictionary": ("EMPTY_DICT",),
        "result": ("REDUCE",),  # an array, a dtype, or an encoded byte string
    }.items()
    for name in names
}
# How many values an opcode takes from the stack; others take none, or those since the last mark.
_TAKEN = {
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "STACK_GLOBAL": 2},
    **{"APPEND": 1, "SETITEM": 2, "BUILD": 1, "REDUCE": 2},
}
_TAKE_MARKED = frozenset({"TUPLE", "APPENDS", "SETITEMS"})
_OTHERS = frozenset({"PROTO", "FRAME", "STOP", *_TAKEN, *_TAKE_MARKED})
_CONTAINERS = frozenset({"tuple", "list", "dictionary"})
_PUT = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GET = frozenset({"BINGET", "LONG_BINGET"})


class _Refused(Exception):
    """The file asks for something that is not allowed."""


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: Any, *_: Any):
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # The state of a dtype is (version, byte order, ...).
        self.order = state[1]

    def to_numpy(self) -> np.dtype:
        # Decoded here, where the first wrong name ends it: a file may make many dtypes of one
        # large string, whose copies would fill the memory.
        name, order = _text(self.name), _text(self.order)
        # Pixels and labels are integers; arrays of objects would hold pointers.
        if not re.fullmatch("[iu][1248]", name) or order not in ("<", ">", "=", "|"):
            raise _Refused(f"an array of {order[:9]}{name[:9]}")
        return np.dtype(name).newbyteorder(order)


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


_ALLOWED_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # before numpy 2
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, not to be called
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, size: int):
        # Strings of Python 2, the pixels among them, would otherwise be decoded from ASCII.
        super().__init__(file, encoding="bytes")
        self._bytes_left = size

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("_codecs", "encode"):
            return self._encode_latin1
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            raise _Refused(f"{module_name}.{global_name}"[:99]) from None

    def _encode_latin1(self, text: str, encoding: str) -> bytes:
        """Stands in for `_codecs.encode`, by which protocol 2 encodes byte strings."""
        if encoding != "latin1":
            raise _Refused("a byte string that is not encoded as latin1")
        # One text encoded many times would fill the memory. Published files encode each text once.
        self._bytes_left -= len(text)
        if self._bytes_left < 0:
            raise _Refused("more bytes than the file has")
        return text.encode("latin1")


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
            value = _Unpickler(file, size).load()
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


def _check_instructions(file: BinaryIO) -> None:
    """Raises _Refused for instructions that no published file needs, or for too many.

    Any other exception means that the file is damaged.

    Cost: 2 us per instruction.
    """
    stack: list[str] = []  # the kinds of the values since the last mark
    marked: list[list[str]] = []  # those before each mark
    memo: dict[Any, str] = {}
    containers = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count >= _MAX_INSTRUCTIONS:
            raise _Refused(f"more than {_MAX_INSTRUCTIONS:,} values")
        if name in _PUT:
            # MEMOIZE takes the next number; the other instructions name theirs.
            number: Any = len(memo) if name == "MEMOIZE" else argument
            if number >= _MAX_INSTRUCTIONS:  # Python allocates memo slots for all smaller numbers
                raise _Refused(f"a value of number {number:,}")
            memo[number] = stack[-1]
        elif name in _GET:
            if memo[argument] in _CONTAINERS:
                raise _Refused("one list, tuple or dictionary in two places")
            stack.append(memo[argument])
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in _PUSHED or name in _OTHERS:
            if name in _TAKE_MARKED:
                taken, stack = stack, marked.pop()
            else:
                taken = [stack.pop() for _ in range(_TAKEN.get(name, 0))][::-1]
            _check_kinds(name, taken, stack)
            if name in _PUSHED:
                stack.append(_PUSHED[name])
            # A tuple of arguments is used up at once and is no part of the result: not counted.
            containers += (_PUSHED.get(name) in _CONTAINERS) - (name in ("REDUCE", "BUILD"))
            if containers > _MAX_CONTAINERS:
                raise _Refused(f"more than {_MAX_CONTAINERS} lists, tuples and dictionaries")
        else:
            raise _Refused(f"the instruction {name}")


def _check_kinds(name: str, taken: list[str], stack: list[str]) -> None:
    """Checks the values that an instruction takes, and the one below, which it changes."""
    match name:
        case "APPEND" | "APPENDS":
            fits = stack[-1] == "list"
        case "SETITEM" | "SETITEMS":
            # Hashes of strings are random; numbers may be chosen so that all have the same hash.
            fits = stack[-1] == "dictionary" and {*taken[::2]} <= {"bytes", "text", "result"}
        case "REDUCE":
            fits = taken == ["function", "tuple"]
        case "BUILD":
            # The state of a function or a class would be set for the whole process.
            fits = stack[-1] == "result" and taken == ["tuple"]
        case _:
            fits = True
    if not fits:
        raise _Refused(f"{name} of {', '.join((*stack[-1:], *taken[:2]))}")


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _to_numpy(value: Any) -> Any:
    return value.to_numpy() if isinstance(value, _Array) else value
