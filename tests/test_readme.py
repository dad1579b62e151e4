"""The examples of the README and of the first page run as they stand."""

import pathlib
import re


def test_the_example_of_the_core():
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["exactness"].max_abs > 0


def test_the_example_of_the_first_page():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "index.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert [leaf.shape for leaf in names["gradient"]] == [(64, 32, 32)] * 2
