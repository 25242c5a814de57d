"""Execute the tutorials. ``python -m tests.notebooks.execute`` renews the outputs that are stored in them."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[2] / "tutorials"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> nbformat.NotebookNode:
    """Return the notebook in a file, checked against the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: nbformat.NotebookNode, *, folder: Path = TUTORIALS, timeout: int = 600) -> None:
    """Run every cell in a fresh kernel, from first to last; an exception in a cell is an error that shows it."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=kernel_environment(os.environ))


def kernel_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which figures are drawn into the notebook, and that is quiet and offline."""
    kept = {name: value for name, value in environment.items() if name != "MPLBACKEND"}
    return kept | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy for storing: outputs kept, but without warnings and progress bars, and without metadata."""
    stored = copy.deepcopy(notebook)
    stored.metadata = nbformat.from_dict(METADATA)
    for cell in stored.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return stored


def main(names: Iterable[str]) -> None:
    """Execute the tutorials named, or all, and write them back with their outputs."""
    paths = [Path(name) for name in names] or sorted(TUTORIALS.glob("*.ipynb"))
    for path in paths:
        notebook = read(path)
        execute(notebook)
        nbformat.write(cleaned(notebook), path)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
