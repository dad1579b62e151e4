"""The record of a run's data, to tell whether other data are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnet_jax.data import Dataset
from revnet_jax.data.source import Source
from revnet_jax.data.text import Text

DataRecord = Mapping[str, Any]  # JSON


def of_text(text: Text) -> dict[str, Any]:
    """Record of a text: sha256 of the file, vocabulary, and bytes per token."""
    return {
        "sha256": text.sha256,
        "bytes_per_token": text.bytes_per_token,
        "vocabulary": text.vocabulary._asdict(),
    }


def of_dataset(dataset: Dataset) -> dict[str, Any]:
    """Record of images: sha256 of the images or of the list of their files, and their number."""
    return {
        "sha256": dataset.sha256,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
    }


def of_source(source: Source) -> dict[str, Any]:
    """Record of a custom source: its sha256, if it has one."""
    sha256 = getattr(source, "sha256", "")
    return {"sha256": sha256} if sha256 else {}


def is_same(found: DataRecord, recorded: DataRecord) -> bool:
    """Whether the sha256 agree; True if none was recorded."""
    return not recorded.get("sha256") or found.get("sha256") == recorded["sha256"]


def summary(record: DataRecord) -> str:
    """A phrase for messages, such as "50 training and 10 test images of sha256 ..."."""
    if "train_images" in record:
        what = f"{record['train_images']:,} training and {record['test_images']:,} test images"
    else:
        what = "a text" if "vocabulary" in record else "data"
    return f"{what} of sha256 {record.get('sha256')}"
