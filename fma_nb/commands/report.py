"""The report: one static page a run, with the result table, the main figures and the notebooks.

Everything is inside the files themselves: the page opens by double click and fetches nothing.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from nbconvert import HTMLExporter
from PIL import Image
from pygments.formatters import HtmlFormatter

from fma_nb import evaluation
from fma_nb.evaluation import Estimate, Metrics
from fma_nb.plots import MODEL_NAMES
from fma_nb.project import FmaNbError, atomic_path, run_dir
from fma_nb.runs.ablation import SAME_RECIPE, read_row
from fma_nb.runs.experiment import read_metrics

_TEMPLATES = Path(__file__).parent
_SHOWN_CONFIG = ("dataset", "preset", "device", "date", "fingerprint")
_COMPARED = ("baseline", SAME_RECIPE, "crnn_no_gru")  # with the CRNN
_PIXEL_RATIO = 1.8  # dots of a stored figure for one of the page: as large as in the notebooks, and sharp


def write_report(run: str) -> Path:
    """Write a run's ``report/index.html`` and the HTML of its executed notebooks."""
    folder = run_dir(run)
    notebooks = sorted(p for p in (folder / "notebooks").glob("*.ipynb") if ".partial" not in p.name)
    if not notebooks:
        raise FmaNbError(f"{folder} holds no executed notebooks: run 'fma-nb run --run {run}' first.")
    report_dir = folder / "report"
    pages = [_write_page(path, report_dir) for path in notebooks]
    models = sorted(path.stem for path in (folder / "metrics").glob("*.json"))
    found = {model: read_metrics(run, [model])[model] for model in models}
    if same_recipe := read_row(run, SAME_RECIPE):
        found = dict(sorted({**found, SAME_RECIPE: same_recipe[0]}.items()))
    metrics = list(found.values())
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = templates.get_template("report.html.j2").render(
        run=run,
        pages=pages,
        results=_results(found),
        verdict=_verdict(found),
        synthetic=any(m["synthetic"] for m in metrics),
        figures=list(_figures(folder / "figures")),
        facts=_facts(metrics),
        settings=_settings(found),
    )
    return _write(report_dir / "index.html", html)


def _write(path: Path, html: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def _write_page(path: Path, report_dir: Path) -> dict[str, str]:
    """Convert an executed notebook to HTML; return its link and title."""
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    _describe_images(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(".ipynb)", ".html)")
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
    page = _write(report_dir / f"{path.stem}.html", html)
    return {"href": page.name, "title": title}


def _describe_images(cells: list[nbformat.NotebookNode]) -> None:
    """Give each picture its alternative text: the caption after it, else what announces it.

    A caption stands in italics at the start of the next text cell.
    """
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


def _results(found: dict[str, Metrics]) -> dict[str, list[str]]:
    """Return the result table: the names of the models, then a row a quantity. So it fits a phone."""
    table = evaluation.result_summary({_shown_name(model): metrics for model, metrics in found.items()})
    return {name: list(table[name]) for name in table}


def _verdict(found: dict[str, Metrics]) -> dict[str, Any]:
    """Answer the report's question: on the same clips, who is ahead, by how much, and how surely."""
    ours = found.get("crnn", {"labels": {}})
    others = [name for name in _COMPARED if name in found and found[name]["labels"] == ours["labels"]]
    if not others:
        return {}
    split = next(split for split in reversed(evaluation.EVALUATION_SPLITS) if split in ours["labels"])
    correct = evaluation.correct_matrix(ours, split)
    artists = evaluation.clip_table(ours, split)["artist"].tolist()
    genres = evaluation.clip_table(ours, split)["genre"].tolist()

    def ahead_of(name: str, genres: list[str] | None = None) -> Estimate:
        theirs = evaluation.correct_matrix(found[name], split)
        return evaluation.paired_difference(correct, theirs, artists, genres)

    return {
        "split": split,
        "clips": len(artists),
        "artists": len(set(artists)) if max(artists) >= 0 else 0,  # an unknown artist has a negative number
        "effective": round(evaluation.effective_artists(artists)),
        "comparisons": [
            (_in_words(ahead_of(name)), _shown_name(name), _shown(ahead_of(name))) for name in others
        ],
        "balanced": [(_shown_name(name), _shown(ahead_of(name, genres))) for name in others],
    }


def _in_words(estimate: Estimate) -> str:
    if estimate.low > 0:
        return "is ahead of"
    return "is behind" if estimate.high < 0 else "cannot be told apart from"


def _shown(estimate: Estimate) -> str:
    return str(estimate).replace("-", "−")


def _shown_name(model: str) -> str:
    return MODEL_NAMES.get(model, model)


def _figures(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            caption = str(image.info.get("Description", path.stem))
            width, height = (str(round(side / _PIXEL_RATIO)) for side in image.size)
        data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:image/png;base64,{data}"
        yield {"src": source, "caption": caption, "width": width, "height": height}


def _facts(metrics: list[Metrics]) -> list[tuple[str, str]]:
    if not metrics:
        return []
    first = metrics[0]
    facts = [(key, str(first[key])) for key in _SHOWN_CONFIG]
    return facts + [(f"{name} version", version) for name, version in first["versions"].items()]


def _settings(found: dict[str, Metrics]) -> dict[str, list[str]]:
    """Return the training configurations: the names of the models, then a row a setting."""
    configs = [metrics["config"] for metrics in found.values()]
    names = {name: None for config in configs for name in config if name != "model"}
    rows = {name: [str(config.get(name, "")) for config in configs] for name in names}
    return {"setting": [_shown_name(model) for model in found]} | rows
