"""Folders of a published model: config.json, and safetensors files that are read tensor by tensor.

The format of safetensors: 8 bytes with the length of a header, the header in JSON (dtype, shape and
place of each tensor), and the tensors' bytes one after another.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from revnet_jax.errors import UserError, writing
from revnet_jax.files import write_atomically

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
READ = ("F32", "BF16", "F16", "F64")  # dtypes whose tensors are read
# NumPy has no bfloat16; JAX brings one that NumPy's arrays can have.
WRITTEN = {"float32": ("F32", np.float32), "bfloat16": ("BF16", jnp.bfloat16)}


class WeightsError(UserError, ValueError):
    """Files of a published model that cannot be used, or a run that cannot be written as one."""


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError if it is missing, broken, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # RecursionError: deeply nested brackets.
    except (OSError, ValueError, RecursionError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise WeightsError(
            f"{path}: {what}; expected the JSON file of a published model"
        ) from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: got {str(found)[:40]}, expected an object in braces")
    return found


class Weights:
    """The tensors in the safetensors files of a folder. At first only their headers are read.

    Attributes:
      stored: every tensor by name.

    Raises WeightsError if a file is missing or cut short, or is not what the index says.
    """

    def __init__(self, folder: Path):
        self._files = {path: _opened(path) for path in _paths(folder)}
        self.stored: dict[str, Stored] = {}
        for path, file in self._files.items():
            for name in file.keys():  # noqa: SIM118 (no mapping)
                # Which of two tensors of one name is meant would depend on the order of files.
                if name in self.stored:
                    raise WeightsError(f"{path}: got {name} again, expected it in one file")
                # A slice knows dtype and shape from the header; no data are read.
                part = file.get_slice(name)
                self.stored[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
        if (folder / INDEX).exists():
            _check_index(folder / INDEX, self.stored)

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        return self._files[self.stored[name].file].get_tensor(name)


def _paths(folder):
    """The files with a model's tensors, as its index lists them, or the one file there is."""
    if not (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            return [folder / SINGLE]
        raise WeightsError(f"{folder} holds neither {SINGLE} nor {INDEX}: expected one of them")
    names = sorted(set(_weight_map(folder / INDEX).values()))
    for name in names:
        # A path with folders could lead to files elsewhere.
        if Path(name).name != name or not (folder / name).is_file():
            raise WeightsError(f"{folder / INDEX} names {name}, expected a file in its folder")
    return [folder / name for name in names]


def _weight_map(path):
    found = read_json_object(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise WeightsError(f"{path}: got no weight_map, expected the file of each tensor")
    return found


def _check_index(path, stored):
    listed = _weight_map(path)
    # Both ways: listed tensors that no file has, and stored ones that are not listed.
    wrong = [
        n for n in {**listed, **stored} if n not in stored or listed.get(n) != stored[n].file.name
    ]
    if wrong:
        name = wrong[0]
        got = stored[name].file.name if name in stored else "no file"
        raise WeightsError(
            f"{path}: {len(wrong)} tensors are not where it says, such as {name}: got {got}, "
            f"expected {listed.get(name, 'no such tensor')}"
        )


def _opened(path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise WeightsError(
            "the safetensors library is not installed: run scripts/setup.sh pretrained"
        ) from error
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path}: {str(error).splitlines()[0]}; expected a whole safetensors file"
        ) from error


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes tensors into safetensors files, one tensor in memory at a time.

    Args:
      folder: an empty one.
      shapes: of the tensors by name, in the order of writing.
      read: returns the tensor of a name.
      dtype: "float32" or "bfloat16", to which all are cast.
      shard_bytes: the most bytes of a file that holds more than one tensor. Several files get an
        index.
    """
    size = np.dtype(WRITTEN[dtype][1]).itemsize
    shards, total = [[]], 0
    for name, shape in shapes.items():
        total += (bytes_of := size * int(np.prod(shape)))
        # A tensor that is larger than a shard gets a file of its own.
        if shards[-1] and bytes_of + sum(n for _, n in shards[-1]) > shard_bytes:
            shards.append([])
        shards[-1].append((name, bytes_of))
    # The names that transformers gives to several files, and to a single one.
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name, _ in shard}, read, dtype)
    # After all files, so that it never lists one that is not there.
    if len(shards) > 1:
        places = {
            name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
        }
        write_json_object(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _write_file(path, shapes, read, dtype):
    name_of_dtype, as_numpy = WRITTEN[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, shape in shapes.items():
        # int, because np.prod(()) is the float 1.0.
        begin, end = end, end + np.dtype(as_numpy).itemsize * int(np.prod(shape))
        header[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with writing(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            # Through bytes, since numpy writes its own dtypes only.
            file.write(np.ascontiguousarray(read(name), as_numpy).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def removed_on_error(*paths: Path) -> Generator[None]:
    """Removes files and folders that are made inside the context if it ends with an error.

    A folder that was there before, and empty, stays empty.
    """
    existing = {path for path in paths if path.is_dir()}
    try:
        yield
    # BaseException, because an interrupt would leave files too.
    except BaseException:
        for path in paths:
            for made in path.iterdir() if path in existing else (path,):
                if made.is_dir():
                    shutil.rmtree(made, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):  # the first error is the one to report
                        made.unlink()
        raise


def write_json_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as published models have them."""
    with writing(path):
        write_atomically(path, json.dumps(content, indent=2) + "\n")


def first_few(names: Sequence[str]) -> str:
    """A phrase for messages: how many, and the first three."""
    return f"{len(names)}, such as {', '.join(names[:3])}" if len(names) > 3 else ", ".join(names)
