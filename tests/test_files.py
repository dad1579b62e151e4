"""Tables in Markdown, and files that are whole or not there."""

import os

import pytest

from revnet_jax.files import write_atomically
from revnet_jax.tables import markdown


def test_a_table_aligns_text_to_the_left_and_numbers_to_the_right():
    cells = [["name", "kind", "n"], ["a", "long kind", "1"], ["long name", "b", "1,000"]]
    assert markdown(cells, text_columns=2) == [
        "| name      | kind      |     n |",
        "| ---       | ---       |  ---: |",
        "| a         | long kind |     1 |",
        "| long name | b         | 1,000 |",
    ]
    assert markdown(cells, text_columns=("name", "kind")) == markdown(cells, text_columns=2)
    assert markdown(cells)[1] == "| ---       |      ---: |  ---: |"


def test_a_file_is_replaced_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_text() == "new"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "newer")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
