"""The report: one static page a run, with the result table, the main figures and the notebooks.

Everything is inside the files themselves: the page opens by double click and fetches nothing.
"""

import base64
import re
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from PIL import Image
from pygments.formatters import HtmlFormatter

from fma_nb import evaluation
from fma_nb.evaluation import Metrics
from fma_nb.plots import MODEL_NAMES
from fma_nb.project import FmaNbError, run_dir, write_text
from fma_nb.runs.ablation import SAME_RECIPE, read_row
from fma_nb.runs.experiment import read_metrics

_TEMPLATES = Path(__file__).parent
_COMPARED = ("baseline", SAME_RECIPE, "crnn_no_gru")  # with the CRNN
_PIXEL_RATIO = 1.8  # dots of a stored figure for one of the page: as large as in the notebooks, and sharp


def write_report(run: str) -> Path:
    """Write a run's ``report/index.html`` and the HTML of its executed notebooks."""
    folder = run_dir(run)
    notebooks = sorted(p for p in (folder / "notebooks").glob("*.ipynb") if ".partial" not in p.name)
    if not notebooks:
        raise FmaNbError(f"{folder} holds no executed notebooks: run 'fma-nb run --run {run}' first.")
    pages = [_write_page(path, folder / "report") for path in notebooks]
    found = {p.stem: read_metrics(run, [p.stem])[p.stem] for p in (folder / "metrics").glob("*.json")}
    if same_recipe := read_row(run, SAME_RECIPE):
        found[SAME_RECIPE] = same_recipe[0]
    shown = {MODEL_NAMES.get(model, model): metrics for model, metrics in sorted(found.items())}
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = templates.get_template("report.html.j2").render(
        run=run,
        pages=pages,
        models=list(shown.values()),
        # Tables as columns, each a row of the page: the models stand side by side, so they fit a phone.
        results=evaluation.result_summary(shown).to_dict("list"),
        settings=_settings(shown).to_dict("list"),
        verdict=_verdict(found),
        figures=[_figure(path) for path in sorted((folder / "figures").glob("*.png"))],
    )
    write_text(folder / "report" / "index.html", html)
    return folder / "report" / "index.html"


def _write_page(path: Path, report_dir: Path) -> dict[str, str]:
    """Convert an executed notebook to HTML; return its link and title."""
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    _describe_images(notebook.cells)
    exporter = HTMLExporter(
        template_name="basic",
        template_file="notebook.html.j2",
        extra_template_paths=[str(_TEMPLATES)],
        embed_images=True,
        exclude_anchor_links=True,
    )
    resources = {"metadata": {"name": title}, "code_style": _code_style()}
    html, _ = exporter.from_notebook_node(notebook, resources)
    html = re.sub("<table.*?</table>", r'<div class="scroll">\g<0></div>', html, flags=re.DOTALL)
    html = html.replace('.ipynb">', '.html">')  # from page to page
    write_text(report_dir / f"{path.stem}.html", html)
    return {"href": f"{path.stem}.html", "title": title}


def _describe_images(cells: list[nbformat.NotebookNode]) -> None:
    """Give each picture its alternative text: the caption in italics after it, else what announces it."""
    texts = [cell.source if cell.cell_type == "markdown" else "" for cell in cells]
    for i, cell in enumerate(cells):
        caption = re.match(r"\*(.+?)\*(?=\s|$)", next(filter(None, texts[i:]), ""), re.DOTALL)
        before = next(filter(None, reversed(texts[:i])), "Figure")
        alt = caption[1] if caption else before.split("\n\n")[-1]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = {"alt": " ".join(re.sub(r"[*`#]", "", alt).split())}


def _code_style() -> str:
    """Return the colours of code on the light and on the dark page: styles that keep WCAG's contrast."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("xcode", "lightbulb"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _settings(shown: dict[str, Metrics]) -> pd.DataFrame:
    """Return the training configurations, a line per model."""
    configs = [{"setting": name} | metrics["config"] for name, metrics in shown.items()]
    texts = [{key: str(value) for key, value in config.items() if key != "model"} for config in configs]
    return pd.DataFrame(texts).fillna("")


def _verdict(found: dict[str, Metrics]) -> dict[str, Any]:
    """Answer the report's question: on the same clips, who is ahead, by how much, and how surely."""
    ours = found.get("crnn", {"labels": {}})
    others = [name for name in _COMPARED if name in found and found[name]["labels"] == ours["labels"]]
    if not others:
        return {}
    split = next(split for split in reversed(evaluation.EVALUATION_SPLITS) if split in ours["labels"])
    clips = evaluation.clip_table(ours, split)
    artists, genres = clips["artist"].tolist(), clips["genre"].tolist()
    correct, differences = evaluation.correct_matrix(ours, split), {}
    for name in others:
        pair = (correct, evaluation.correct_matrix(found[name], split), artists)
        estimates = [evaluation.paired_difference(*pair, weighted_by) for weighted_by in (None, genres)]
        differences[MODEL_NAMES[name]] = estimates  # in accuracy, and in artist-balanced accuracy
    return {
        "split": split,
        "clips": len(artists),
        "artists": len(set(artists)) if max(artists) >= 0 else 0,  # an unknown artist has a negative number
        "effective": round(evaluation.effective_artists(artists)),
        "differences": differences,
    }


def _figure(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        caption = image.info.get("Description", path.stem)
        width, height = (round(side / _PIXEL_RATIO) for side in image.size)
    data = base64.b64encode(path.read_bytes()).decode()
    return {"src": f"data:image/png;base64,{data}", "caption": caption, "width": width, "height": height}
