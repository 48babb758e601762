"""The report: one static page a run, with the result table, the main figures and the notebooks.

Everything is inside the files themselves: the page opens by double click and fetches nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from PIL import Image

from fma_nb.evaluation import result_summary
from fma_nb.plots import MODEL_NAMES
from fma_nb.project import FmaNbError, atomic_path, run_dir

_SHOWN_CONFIG = ("dataset", "preset", "device", "date", "fingerprint")


def save_figure(figure: Figure, run: str, name: str, caption: str) -> None:
    """Write a figure for the report; its caption, which is also its alternative text, goes inside."""
    path = run_dir(run) / "figures" / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144, metadata={"Description": caption})


def write_report(run: str) -> Path:
    """Write a run's ``report/index.html`` and the HTML of its executed notebooks.

    Raises
    ------
    FmaNbError
        When the run has no executed notebook.
    """
    folder = run_dir(run)
    notebooks = sorted(p for p in (folder / "notebooks").glob("*.ipynb") if ".partial" not in p.name)
    if not notebooks:
        raise FmaNbError(f"{folder} holds no executed notebooks: run 'fma-nb run --run {run}' first.")
    report_dir = folder / "report"
    pages = [_write_page(path, report_dir) for path in notebooks]
    metrics = [json.loads(path.read_text()) for path in sorted((folder / "metrics").glob("*.json"))]
    template = jinja2.Template(_template(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = template.render(
        run=run,
        pages=pages,
        results=_results(metrics),
        synthetic=any(m["synthetic"] for m in metrics),
        figures=list(_figures(folder / "figures")),
        facts=_facts(metrics),
    )
    index = report_dir / "index.html"
    with atomic_path(index) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return index


def _template() -> str:
    return (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")


def _write_page(path: Path, report_dir: Path) -> dict[str, str]:
    """Convert an executed notebook to HTML unless its page is newer; return its link and title."""
    page = report_dir / f"{path.stem}.html"
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    if not page.exists() or page.stat().st_mtime < path.stat().st_mtime:
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = cell.source.replace(".ipynb)", ".html)")
        # Empty addresses: no script is fetched from outside, and the notebooks need none.
        exporter = HTMLExporter(mathjax_url="", require_js_url="", mermaid_js_url="", embed_images=True)
        html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
        with atomic_path(page) as temporary:
            temporary.write_text(html, encoding="utf-8")
    return {"href": page.name, "title": title}


def _results(metrics: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = {MODEL_NAMES.get(m["model"], m["model"]): m for m in metrics}
    return result_summary(found).to_dict("records")


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            caption = str(image.info.get("Description", path.stem))
            width, height = image.size
        data = base64.b64encode(path.read_bytes()).decode()
        yield {
            "src": f"data:image/png;base64,{data}",
            "caption": caption,
            "width": str(width // 2),
            "height": str(height // 2),
        }


def _facts(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not metrics:
        return []
    first = metrics[0]
    facts = [(key, str(first[key])) for key in _SHOWN_CONFIG]
    facts += [(f"{name} version", version) for name, version in first["versions"].items()]
    return facts + [
        (f"{m['model']} configuration", ", ".join(f"{k} {v}" for k, v in m["config"].items() if k != "model"))
        for m in metrics
    ]
