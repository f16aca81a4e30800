"""The notebook in examples/ runs, and is kept as it ran."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(FILE, as_version=4)
    # Its checkpoint goes where pytest cleans up.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    # As in conftest's quick_compilation.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, kept in zip(notebook.cells, nbformat.read(FILE, as_version=4).cells, strict=True):
        if cell.cell_type == "code":
            # Text varies with the version of XLA; what kind of output there is does not.
            assert {output.output_type for output in cell.outputs} == {
                output.output_type for output in kept.outputs
            }


def test_it_is_kept_small_executed_and_clean() -> None:
    assert os.path.getsize(FILE) < 20_000
    notebook = nbformat.read(FILE, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    assert all(output.get("name") != "stderr" for cell in code for output in cell.outputs)
    assert str(Path.home()) not in FILE.read_text()
