"""Execute notebooks from top to bottom: `python notebooks/execute.py [--small] [NOTEBOOK ...]`.

The outputs are saved in the files and contain no paths of this machine. `--small` sets REVDEQ_NOTEBOOK_SMALL, which
makes notebooks use smaller sizes, and does not change the files. The exit code is 1 after an error in a cell, a
warning or other message on standard error, or an output that contains a path of this machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
CELL_SECONDS = 600


def main(arguments: list[str] | None = None) -> None:
    """Execute the given notebooks, by default all of this folder."""
    parser = argparse.ArgumentParser(description="Execute notebooks from top to bottom.", allow_abbrev=False)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--small", action="store_true", help="use smaller sizes and do not change the files")
    given = parser.parse_args(arguments)
    if given.small:
        os.environ["REVDEQ_NOTEBOOK_SMALL"] = "1"
    # tqdm misses ipywidgets, which nothing here needs, where torchmetrics finds and imports transformers.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    # As in an activated environment: commands that the notebooks print are `python ...`.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    for path in given.notebooks:
        begin = time.monotonic()
        try:
            notebook = execute(path)
        except (CellExecutionError, RuntimeError, ValueError, OSError) as error:
            sys.exit(f"error: {path.name}: {error}")
        if not given.small:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - begin:.0f} s", flush=True)


def execute(path: Path) -> Any:
    """Execute the notebook in an empty folder and return it with new, clean outputs.

    Raises:
        CellExecutionError: If a cell raises.
        ValueError: If a cell writes to standard error, or an output contains a path of this machine.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as sockets:
        settings: dict[str, Any] = {"record_timing": False, "coalesce_streams": True}
        # Use sockets in a folder instead of the network.
        settings["config"] = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
        settings["resources"] = {"metadata": {"path": folder}}
        # What a cell writes is in the notebook; the kernel's own complaints while it shuts down are nobody's.
        NotebookClient(notebook, timeout=CELL_SECONDS, **settings).execute(stderr=subprocess.DEVNULL)
        private = {folder, str(Path.home()), str(FOLDER.parent), sys.prefix, sys.base_prefix} - {"/", "/usr"}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            text = str(output.get("text", output.get("data", "")))
            if output.get("name") == "stderr":
                raise ValueError(f"a cell wrote to standard error: {text.strip()}\n{cell.source}")
            if named := next((name for name in private if name in text), None):
                raise ValueError(f"an output contains the path {named} of this machine: {text.strip()[:500]}")
    return notebook


if __name__ == "__main__":
    main()
