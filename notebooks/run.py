"""Runs notebooks from a clean kernel and keeps their outputs; run again, only what they print changes.

python notebooks/run.py                                        all of them
python notebooks/run.py notebooks/1_one_sparse_layer.ipynb     one

Needs nbclient and ipykernel: pip install moejax[dev].
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = pathlib.Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS = 300
"""Of one cell at most."""


def client(notebook: nbformat.NotebookNode, folder: pathlib.Path) -> NotebookClient:
    """What runs the notebook in `folder`. Its execute() raises CellExecutionError for the first cell that raises."""
    quiet = Config(KernelManager={"transport_encryption": "auto"})  # otherwise the kernel warns that anyone may listen
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(
        notebook, kernel_name=KERNEL["name"], timeout=SECONDS, coalesce_streams=True, resources=where, config=quiet
    )


def executed(file: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs."""
    notebook = nbformat.read(file, as_version=4)
    client(notebook, folder).execute()
    return plain(notebook)


def plain(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what changes from machine to machine: times and versions. Cells are numbered."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{i:02}", {}
    return notebook


def main(files: list[str]) -> None:
    """Each file is replaced by what it became."""
    for file in map(pathlib.Path, files) if files else sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(file, pathlib.Path(folder)), file)
        print(f"{file}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
