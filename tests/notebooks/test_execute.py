"""The committed notebooks hold the outputs of one execution; what must not be in them ends the execution."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))


def test_there_are_six():
    assert [path.name[0] for path in FILES] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem[:1])
def test_outputs_are_kept_and_name_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert len(outputs) >= 5
    assert all(cell.metadata == {} for cell in notebook.cells)
    texts = "".join(str(output.get("text", "")) for output in outputs)
    assert "Traceback" not in texts
    assert not [word for word in ("/home/", "/root/", "/tmp/", "/work/", "/Users/") if word in texts]


def execute(folder: Path, sources: list[str], *options: str) -> tuple[subprocess.CompletedProcess, Path, bool]:
    """Run the script on a notebook of these cells, and say whether it changed the file."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before = path.read_bytes()
    environment = {name: value for name, value in os.environ.items() if name != "REVDEQ_NOTEBOOK_SMALL"}
    command = [sys.executable, str(NOTEBOOKS / "execute.py"), str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    return result, path, path.read_bytes() != before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('take care')", "a cell wrote to standard error"),
        ("import pathlib; print(pathlib.Path.cwd())", "of this machine"),
    ],
)
def test_what_must_not_be_ends_the_execution_and_leaves_the_file(tmp_path, source, words):
    result, _, changed = execute(tmp_path, [source])
    assert result.returncode == 1
    assert words in result.stderr
    assert not changed


def test_outputs_are_kept_but_not_of_a_small_execution(tmp_path):
    sources = ["import os", "print('REVDEQ_NOTEBOOK_SMALL' in os.environ)"]
    result, path, changed = execute(tmp_path, sources)
    assert (result.returncode, result.stderr, changed) == (0, "", True)
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "False\n"
    result, _, changed = execute(tmp_path, [sources[0], "assert 'REVDEQ_NOTEBOOK_SMALL' in os.environ"], "--small")
    assert (result.returncode, result.stderr, changed) == (0, "", False)
