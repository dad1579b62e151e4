"""The README's example runs as it stands."""

import pathlib
import re


def test_the_example_of_the_core():
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["exactness"].max_abs > 0
