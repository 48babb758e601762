"""``make notebooks``: execute the notebooks in place on fma_mini, and keep only what may be committed.

``make check-notebooks`` (``--check``) executes copies, and fails where an output differs from the
committed one in more than the seconds that a training took. That holds on the kind of processor that the
outputs were made on; elsewhere the last digits of a training differ.

A folder of its own takes the outputs, so that a user's runs are left alone. Time stamps, widget states
and the name of the machine's interpreter are stripped; the kernel stays the plain ``python3``.
"""

from __future__ import annotations

import json
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


def executed(path: Path) -> nbformat.NotebookNode:
    """Execute a notebook; return it with only what may be committed."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    quiet = ["--IPKernelApp.log_level=50"]
    NotebookClient(notebook, kernel_name="python3", resources=where, extra_arguments=quiet).execute()
    strip(notebook)
    return notebook


def refresh(path: Path) -> bool:
    """Execute one notebook and write it back."""
    nbformat.write(executed(path), path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)
    return True


def check(path: Path) -> bool:
    """Execute a copy of one notebook; tell whether its outputs are the committed ones."""
    pairs = zip(nbformat.read(path, as_version=4).cells, executed(path).cells, strict=True)
    changed = [i for i, (old, new) in enumerate(pairs) if without_seconds(old) != without_seconds(new)]
    print(f"{path.name}: {f'other outputs in cells {changed}' if changed else 'the same'}", flush=True)
    return not changed


def without_seconds(cell: nbformat.NotebookNode) -> str:
    """Return a cell's outputs as text, without the seconds that its trainings took."""
    outputs = json.dumps(cell.get("outputs", []), sort_keys=True)
    outputs = re.sub(r"(?<=in )[\d.]+ s\b|\d+ s a seed", "SECONDS", outputs)
    if "seconds a seed" not in outputs:
        return outputs
    rows = re.sub(r"T_[0-9a-f]{8}", "", outputs)
    return re.sub(r'"text/plain": ("(?:\\.|[^"])*"|\[.*?\])|<td>\d+</td>(?=\\n\s*</tr>)', "", rows)


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


def main() -> int:
    """Refresh or check the notebooks whose numbers are given, or all, and then their solutions."""
    given = [argument for argument in sys.argv[1:] if argument != "--check"]
    paths = [*sorted(NOTEBOOKS.glob("0*.ipynb")), *sorted(NOTEBOOKS.glob("solutions/0*.ipynb"))]
    chosen = [path for path in paths if not given or path.name[:2] in given]
    work = check if "--check" in sys.argv else refresh
    with tempfile.TemporaryDirectory() as outputs:
        os.environ.setdefault("FMA_NB_OUTPUTS", outputs)
        return 0 if all([work(path) for path in chosen]) else 1


if __name__ == "__main__":
    sys.exit(main())
