"""The notebooks in examples/ run, and are committed with their outputs."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests import quick

FILES = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
name = lambda file: file.stem


def executed(file: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    notebook = nbformat.read(file, as_version=4)
    # Its files go where pytest cleans up.
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if file.stem != "finetune":
        # Its training takes longer to run than to compile.
        for name, value in quick.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(directory)}}
    ).execute()
    return notebook


def kinds(cell: Any) -> set[str]:
    """The kinds of a cell's outputs, apart from the lines of progress, which end empty."""
    return {
        output.output_type
        for output in cell.outputs
        if output.get("data", {}).get("text/plain") != ""
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_cell_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(file, tmp_path, monkeypatch)
    for cell, committed in zip(
        notebook.cells, nbformat.read(file, as_version=4).cells, strict=True
    ):
        if cell.cell_type == "code":
            # Text varies with XLA's version; the kinds of output do not.
            assert kinds(cell) == kinds(committed)
    if file.stem == "finetune":
        text = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
        before, after = re.findall(r"exact: (\d+)%", text)
        assert int(before) == 0
        assert int(after) > 95


@pytest.mark.parametrize("file", FILES, ids=name)
def test_notebooks_are_small_executed_and_clean(file: Path) -> None:
    assert os.path.getsize(file) < 160_000
    notebook = nbformat.read(file, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(not cell.metadata for cell in notebook.cells)
    assert all(output.get("name") != "stderr" for cell in code for output in cell.outputs)
    assert str(Path.home()) not in file.read_text()
