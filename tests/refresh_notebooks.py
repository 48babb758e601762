"""``make notebooks``: execute the notebooks in place on fma_mini, and keep only what may be committed.

A folder of its own takes the outputs, so that a user's runs are left alone. Time stamps, widget states
and the name of the machine's interpreter are stripped; the kernel stays the plain ``python3``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import zlib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def refresh(path: Path) -> None:
    """Execute one notebook and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    strip(notebook)
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def strip(notebook: nbformat.NotebookNode) -> None:
    """Remove what differs from one execution to the next without meaning anything."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            cell.outputs = [steady(output) for output in joined(cell.outputs)]


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what one cell printed: in how many pieces it arrived is chance."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == "stream" and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def steady(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove random names: memory addresses, and the identifiers pandas gives to styled tables."""
    output.get("metadata", {}).pop("execution", None)
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/"):
            shown = re.sub(r" at 0x[0-9a-f]+|T_[0-9a-f]{5}", "", content)
            name = f"T_{zlib.crc32(shown.encode()):08x}"
            output.data[kind] = re.sub("T_[0-9a-f]{5}", name, re.sub(r" at 0x[0-9a-f]+", "", content))
    return output


def main() -> None:
    """Refresh the notebooks whose numbers are given, or all."""
    chosen = [p for p in sorted(NOTEBOOKS.glob("0*.ipynb")) if not sys.argv[1:] or p.name[:2] in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as outputs:
        os.environ.setdefault("FMA_NB_OUTPUTS", outputs)
        for path in chosen:
            refresh(path)


if __name__ == "__main__":
    main()
