"""The notebooks run as they stand, start to finish, and are committed with their outputs."""

import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


@every_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    """As its reader runs it: on one device, without the tests' strict promotion (optax needs some).

    No claim in it rests on how hard the compiler tries, and most of the time goes into compiling.
    """
    monkeypatch.delenv("JAX_NUMPY_DTYPE_PROMOTION", raising=False)
    monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output.text for output in printed if output.get("name") == "stderr"]


@every_notebook
def test_it_is_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@every_notebook
def test_it_opens_with_its_purpose_and_the_install_line(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    assert "# %pip install" in code_cells(notebook)[0].source


@every_notebook
def test_it_is_small_and_names_no_machine(path):
    text = path.read_text()
    assert len(text) < 300_000
    metadata = json.loads(text)["metadata"]
    assert metadata["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    # Base64 holds slashes and letters of all kinds; a path in it would mean nothing.
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(work|tmp|home|root|Users|usr|opt|content)/|site-packages", text)
