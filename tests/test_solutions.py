"""The worked solutions: they answer the lessons' exercises, start from the lessons' code, and run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from fma_nb.project import project_root

LESSONS = sorted((project_root() / "notebooks").glob("0*.ipynb"))
# What makes them quick, where a notebook has such a parameter. The run is that of the fixture `whole_run`.
SMALL = {
    "run": "tiny",
    "device": "cpu",
    "n_seeds": 1,
    "epochs": 1,
    "few_epochs": 1,
    "watched_epochs": 1,
    "planted_rounds": 1,
    "n_splits": 5,
}

pytestmark = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def solutions_of(lesson: Path) -> Path:
    return lesson.parent / "solutions" / f"{lesson.stem}_solutions.ipynb"


def text_of(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def exercises(text: str) -> list[str]:
    """Return a lesson's numbered exercises, whatever their line breaks."""
    listed = text.split("## Exercises")[1].split("**References.**")[0].split("**Next:**")[0]
    return [" ".join(item.split()) for item in re.split(r"^\d\. ", listed, flags=re.MULTILINE)[1:]]


def quoted(text: str) -> list[str]:
    """Return what stands as a quotation below each heading ``## Exercise n``."""
    sections = re.split(r"^## Exercise \d$", text, flags=re.MULTILINE)[1:]
    return [" ".join(" ".join(re.findall(r"^> (.*)$", one, re.MULTILINE)).split()) for one in sections]


def statements(path: Path, tag: str = "") -> list[str]:
    """Return the statements at the top level of the code cells, or of those with a tag."""
    cells = nbformat.read(path, as_version=4).cells
    chosen = [c for c in cells if c.cell_type == "code" and (not tag or tag in c.metadata.get("tags", []))]
    return [ast.dump(statement) for cell in chosen for statement in ast.parse(cell.source).body]


def test_every_exercise_is_quoted_as_it_is_now(lesson: Path) -> None:
    asked = exercises(text_of(lesson))
    assert len(asked) >= 3
    assert quoted(text_of(solutions_of(lesson))) == asked


def test_what_is_taken_from_the_lesson_is_the_lessons(lesson: Path) -> None:
    taken = statements(solutions_of(lesson), "lesson")
    assert len(taken) >= 3
    assert set(taken) <= set(statements(lesson))


def test_they_run_and_leave_the_finished_run_alone(lesson, whole_run, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FMA_NB_DATA", str(project_root() / "data"))
    monkeypatch.setenv("FMA_NB_OUTPUTS", str(whole_run.outputs))
    path = solutions_of(lesson)
    declared = papermill.inspect_notebook(str(path))
    run = whole_run.outputs / "tiny"
    kept = [file for kind in ("metrics", "checkpoints", "logs") for file in sorted((run / kind).iterdir())]
    before = [file.read_bytes() for file in kept]
    papermill.execute_notebook(
        str(path),
        str(tmp_path / path.name),
        {name: value for name, value in SMALL.items() if name in declared},
        kernel_name="python3",
        cwd=str(path.parent),
        progress_bar=False,
    )
    assert before and [file.read_bytes() for file in kept] == before
