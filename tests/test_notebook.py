"""The notebook of the public API runs from its first cell to its last, and its stored outputs are what it prints.

`python tests/test_notebook.py` renews the stored outputs.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs nbformat, nbclient and ipykernel of ficpd[dev]")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs nbclient and ipykernel of ficpd[dev]")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"
USED = ["ficpd.run", "to_frame", "ficpd.compare", "ficpd.load_library", "scores=True", "evaluate", "adapt", "save"]
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
"""What Jupyter's own packages say of packages that a script does not need."""


def execute(notebook: Any, folder: str) -> None:
    """Runs all cells in a new kernel over sockets of the folder, which has to have a short path."""
    from traitlets.config import Config

    kernel = Config({"KernelManager": {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}})
    about = {"metadata": {"path": folder}}
    env = {**os.environ, **QUIET, "IPYTHONDIR": folder}
    nbclient.NotebookClient(notebook, timeout=300, record_timing=False, resources=about, config=kernel).execute(env=env)


def printed(notebook: Any) -> list[str]:
    """Lists what the cells print as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.get("text") or output.get("data", {}).get("text/plain", output.output_type) for output in outputs]


def unnumbered(text: str) -> str:
    """Drops figures and the space around them, which differ between machines."""
    return re.sub(r"[\d.\s]+", " ", text)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter's packages
def test_the_notebook_runs_and_prints_what_it_stores(folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = printed(notebook)
    execute(notebook, folder)
    assert [unnumbered(text) for text in printed(notebook)] == [unnumbered(text) for text in stored]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cell_that_raises_is_an_error(folder):
    cells = [nbformat.v4.new_code_cell("left = 1"), nbformat.v4.new_code_cell("left / 0")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(nbformat.v4.new_notebook(cells=cells), folder)


def test_the_notebook_is_valid_small_and_of_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert sum(bool(cell.outputs) for cell in code) > 5
    assert [word for word in USED if word not in "".join(cell.source for cell in code)] == []
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 30_000
    assert re.search(r"/(home|root|tmp|Users|work)/|site-packages|stderr", text) is None


if __name__ == "__main__":
    renewed = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory(prefix="nb") as place:
        execute(renewed, place)
    nbformat.write(renewed, NOTEBOOK)
