"""Loads CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from a folder in one of their published layouts.

https://www.cs.toronto.edu/~kriz/cifar.html offers a binary version (fixed-size records) and a
python version (pickled dictionaries) of each. Both hold 32x32 RGB images as rows of 3072 bytes in
channel, row, column order.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from revnet_jax.data.dataset import DataError, Dataset, in_memory_dataset, shorten
from revnet_jax.data.safe_pickle import load_pickled_dict

_PIXEL_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """One published layout: its folder, its files, and where labels and class names are."""

    folder: str
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    num_classes: int
    train_file_ratio: int  # images in a training file over images in the test file
    label_bytes: int = 0  # binary layouts: bytes before the pixels; the last is the label
    labels_key: str = ""  # python layouts
    names_key: str = ""


_CIFAR10_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
_LAYOUTS = {
    "cifar10": (
        _Layout(
            folder="cifar-10-batches-bin",
            train_files=tuple(f"{file}.bin" for file in _CIFAR10_FILES),
            test_file="test_batch.bin",
            names_file="batches.meta.txt",
            num_classes=10,
            train_file_ratio=1,  # every file has 10,000 images
            label_bytes=1,
        ),
        _Layout(
            folder="cifar-10-batches-py",
            train_files=_CIFAR10_FILES,
            test_file="test_batch",
            names_file="batches.meta",
            num_classes=10,
            train_file_ratio=1,
            labels_key="labels",
            names_key="label_names",
        ),
    ),
    "cifar100": (
        _Layout(
            folder="cifar-100-binary",
            train_files=("train.bin",),
            test_file="test.bin",
            names_file="fine_label_names.txt",
            num_classes=100,
            train_file_ratio=5,  # 50,000 images to train, 10,000 to test
            label_bytes=2,  # coarse, fine
        ),
        _Layout(
            folder="cifar-100-python",
            train_files=("train",),
            test_file="test",
            names_file="meta",
            num_classes=100,
            train_file_ratio=5,
            labels_key="fine_labels",
            names_key="fine_label_names",
        ),
    ),
}


def load_cifar(name: str, dir: str | os.PathLike[str]) -> Dataset:
    """Loads `cifar10` or `cifar100` (its 100 fine labels) into memory: 32x32x3, uint8.

    Args:
      name: "cifar10" or "cifar100".
      dir: the folder of a published layout, or its parent folder. If both versions are there, the
        binary one is read. Files with fewer images are accepted, if all training files keep their
        published proportion to the test file.

    Raises:
      DataError: no layout found, a file missing, truncated or damaged, or a label out of range.
    """
    layout, folder = _find_layout(name, Path(dir))
    files = (*layout.train_files, layout.test_file)
    for file in (*files, layout.names_file):
        if not (folder / file).is_file():
            raise DataError(
                f"{folder / file} is missing; expected {', '.join(files)} and {layout.names_file} "
                f"in {folder}; unpack the archive again"
            )
    read = _read_binary if layout.label_bytes else _read_python
    parts = [read(folder / file, layout) for file in files]
    _check_proportions([folder / file for file in files], [len(part[1]) for part in parts], layout)
    return in_memory_dataset(
        name,
        train_images_NHWC=_to_images([part[0] for part in parts[:-1]]),
        train_labels=np.concatenate([part[1] for part in parts[:-1]]),
        test_images_NHWC=_to_images([parts[-1][0]]),
        test_labels=parts[-1][1],
        class_names=_read_class_names(folder / layout.names_file, layout),
    )


def _find_layout(name: str, dir: Path) -> tuple[_Layout, Path]:
    layouts = _LAYOUTS[name]
    for layout in layouts:
        if (dir / layout.folder).is_dir():
            return layout, dir / layout.folder
    for layout in layouts:
        # A renamed folder is recognised by its files.
        files = (*layout.train_files, layout.test_file)
        if dir.name == layout.folder or any((dir / file).is_file() for file in files):
            return layout, dir
    found = "a folder without them" if dir.is_dir() else "no such folder"
    raise DataError(
        f"{name}: looked in {dir} for {' or '.join(layout.folder for layout in layouts)}, or for "
        f"their files ({' or '.join(layout.train_files[0] for layout in layouts)}), and got "
        f"{found}; set dir to the folder where the published archive was unpacked"
    )


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 rows [N, 3072] and labels [N] of one file of fixed-size records."""
    record_bytes = layout.label_bytes + _PIXEL_BYTES
    size_bytes = path.stat().st_size
    if size_bytes == 0 or size_bytes % record_bytes:
        raise DataError(
            f"{path} is truncated: got {size_bytes} bytes, expected one or more records of "
            f"{record_bytes} bytes (an image and its label); download or unpack it again"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, record_bytes)
    # The last byte before the pixels: in CIFAR-100 the coarse label comes before the fine one.
    labels = records[:, layout.label_bytes - 1]
    _check_labels(path, labels, layout.num_classes)
    return records[:, layout.label_bytes :], labels


def _read_python(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 rows [N, 3072] and labels [N] of one pickled dictionary."""
    batch = load_pickled_dict(path)
    rows, labels = _field(path, batch, "data"), _field(path, batch, layout.labels_key)
    # Checked before numpy copies them: a short file can refer to one long string a million times,
    # and the copy would need a large amount of memory.
    if not isinstance(labels, np.ndarray) and not _is_list_of(int, labels):
        raise DataError(
            f"{path}: got {layout.labels_key!r} that are not a list of integers, expected one; "
            "download it again"
        )
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"{path}: got {layout.labels_key!r} of shape {labels.shape} and type {labels.dtype}, "
            "expected a list of integers; download it again"
        )
    expected_shape = (len(labels), _PIXEL_BYTES)
    if not isinstance(rows, np.ndarray) or rows.shape != expected_shape or rows.dtype != np.uint8:
        got = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(
            f"{path}: got 'data' of {got}, expected uint8 {expected_shape} for {len(labels)} "
            "labels; download it again"
        )
    _check_labels(path, labels, layout.num_classes)
    return rows, labels


def _field(path: Path, batch: dict[str, Any], key: str) -> Any:
    if key not in batch:
        raise DataError(
            f"{path}: got a dictionary with the keys {shorten(sorted(batch))}, expected {key!r}; "
            "check that the file belongs to this data set"
        )
    return batch[key]


def _is_list_of(kind: type, value: Any) -> bool:
    # The exact type, because a bool is an int too.
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_labels(path: Path, labels: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{path}: got label {labels[wrong[0]]} at image {wrong[0]}, expected 0 to "
            f"{num_classes - 1}; the file is damaged or of another data set, download it again"
        )


def _check_proportions(paths: Sequence[Path], counts: Sequence[int], layout: _Layout) -> None:
    """Detects a file cut exactly at the end of a record, which its size alone does not show."""
    num_test = counts[-1]
    for path, count in zip(paths[:-1], counts[:-1], strict=True):
        if count != num_test * layout.train_file_ratio:
            raise DataError(
                f"{path} is truncated, or {paths[-1].name} is: got {count} and {num_test} images, "
                f"expected {layout.train_file_ratio} to 1; download or unpack them again"
            )


def _read_class_names(path: Path, layout: _Layout) -> tuple[str, ...]:
    if layout.names_key:
        names = _field(path, load_pickled_dict(path), layout.names_key)
        if not _is_list_of(bytes, names) and not _is_list_of(str, names):
            raise DataError(
                f"{path}: got {layout.names_key!r} that are not a list of strings, expected the "
                "names of the classes; unpack the archive again"
            )
    else:
        names = [line.strip() for line in path.read_bytes().splitlines() if line.strip()]
    if len(names) != layout.num_classes:
        raise DataError(
            f"{path}: got {len(names)} class names, expected {layout.num_classes}; "
            "unpack the archive again"
        )
    try:
        return tuple(name.decode() if isinstance(name, bytes) else name for name in names)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: got a class name that is not UTF-8 ({error}), expected text: unpack the "
            "archive again"
        ) from error


def _to_images(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Converts rows in channel, row, column order to one contiguous uint8 [N, 32, 32, 3]."""
    # Filled file by file. Joining the rows before channels are moved to the end would need a second
    # copy of all images.
    images_NHWC = np.empty((sum(map(len, rows)), 32, 32, 3), np.uint8)
    start = 0
    for part in rows:
        stop = start + len(part)
        images_NHWC[start:stop] = part.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start = stop
    return images_NHWC
