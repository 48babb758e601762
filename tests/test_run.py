"""The main job and the command line, run as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import assert_clean_progress, fma_nb

from fma_nb.commands.notebooks import NOTEBOOKS, notebook_parameters, run_notebooks
from fma_nb.project import FmaNbError, project_root


def test_the_main_job_ends_with_a_report(whole_run):
    assert whole_run.done.returncode == 0, whole_run.done.stderr
    index = whole_run.outputs / "tiny" / "report" / "index.html"
    assert str(index) in whole_run.done.stdout.splitlines()[-1]
    html = index.read_text()
    assert "Synthetic data" in html and "CRNN without GRU" in html
    linked = re.findall(r'href="(0\d_\w+\.html)"', html)
    assert len(linked) == 5 and all((index.parent / page).exists() for page in linked)
    assert html.count("<img ") == html.count('alt="') >= 5


def test_the_pages_fetch_nothing_from_outside(whole_run):
    for page in (whole_run.outputs / "tiny" / "report").glob("*.html"):
        fetched = re.findall(r'(?:src|<link[^>]*href)="?(https?:[^" >]+)', page.read_text())
        assert not fetched, (page.name, fetched[:3])


def test_checkpoints_logs_and_metrics_are_written(whole_run):
    folder = whole_run.outputs / "tiny"
    for model in ("baseline", "crnn", "crnn_no_gru"):
        assert (folder / "checkpoints" / f"{model}_best.pt").exists()
        assert (folder / "checkpoints" / f"{model}_last.pt").exists()
        assert len((folder / "logs" / f"{model}.csv").read_text().splitlines()) == 2
        metrics = json.loads((folder / "metrics" / f"{model}.json").read_text())
        assert metrics["synthetic"] and set(metrics["labels"]) == {"val", "test"}
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.partial.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_progress_is_shown_once_and_left_finished(name, whole_run):
    executed = whole_run.outputs / "tiny" / "notebooks" / f"{name}.ipynb"
    assert_clean_progress(nbformat.read(executed, as_version=4))


def test_a_second_run_does_nothing_and_a_lost_result_is_made_again(whole_run):
    again = whole_run.again()
    assert again.returncode == 0 and again.stdout.count("up to date") == 5
    metrics = whole_run.outputs / "tiny" / "metrics" / "crnn.json"
    metrics.unlink()
    mended = whole_run.again()
    assert mended.returncode == 0, mended.stderr
    assert mended.stdout.count("up to date") >= 3 and "04_crnn: running" in mended.stdout
    assert metrics.exists()


def test_the_comparison_runs_again_when_there_is_an_ablation_to_show(whole_run):
    folder = whole_run.outputs / "tiny"
    assert "05_comparison: up to date" in whole_run.again().stdout
    row = folder / "ablation" / "final" / "metrics" / "crnn.json"
    row.parent.mkdir(parents=True)
    shutil.copy(folder / "metrics" / "crnn.json", row)
    shown = whole_run.again()
    assert shown.returncode == 0, shown.stderr
    assert "05_comparison: running" in shown.stdout and shown.stdout.count("up to date") == 4
    assert "05_comparison: up to date" in whole_run.again().stdout


def key_of(copy: Path, name: str) -> str:
    """Return the key of a notebook in a copy of the project, which must be where the package comes from."""
    code = (
        "import sys; from fma_nb.commands import notebooks\n"
        "assert notebooks.__file__.startswith(sys.argv[1]), notebooks.__file__\n"
        "print(notebooks._key(sys.argv[2], {'dataset': 'fma_mini', 'preset': 'compact'}, 'tiny'))"
    )
    moved = {"FMA_NB_DATA": str(copy / "data"), "FMA_NB_OUTPUTS": str(copy / "outputs")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy), name],
        cwd=copy,
        env=os.environ | moved | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("edited", ["runs/fit.py", "raw/genres.toml"])
def test_an_edited_room_makes_notebooks_run_again(tmp_path, edited):
    for folder in ("fma_nb", "notebooks"):
        shutil.copytree(project_root() / folder, tmp_path / folder)
    shutil.copy(project_root() / "pyproject.toml", tmp_path)
    before = key_of(tmp_path, "03_baseline")
    assert key_of(tmp_path, "03_baseline") == before  # the key holds while nothing changes
    with (tmp_path / "fma_nb" / edited).open("a") as file:
        file.write("# edited\n")
    assert key_of(tmp_path, "03_baseline") != before


def test_a_failing_cell_stops_the_run_and_is_named(whole_run, monkeypatch):
    outputs = whole_run.outputs
    damaged = outputs / "damaged" / "metrics"
    damaged.mkdir(parents=True)
    (damaged / "baseline.json").write_text("{}")
    monkeypatch.setenv("FMA_NB_DATA", str(project_root() / "data"))
    monkeypatch.setenv("FMA_NB_OUTPUTS", str(outputs))
    given = {"dataset": "fma_mini", "preset": "compact", "device": "auto"}
    with pytest.raises(
        FmaNbError, match=r"05_comparison failed in cell \d+: FmaNbError: .*baseline"
    ) as caught:
        run_notebooks(["05_comparison"], {**given, "run": "damaged"})
    partial = str(caught.value).split()[-1]
    assert any(
        output.output_type == "error"
        for cell in nbformat.read(partial, as_version=4).cells
        for output in cell.get("outputs", [])
    )
    assert not (outputs / "damaged" / "notebooks" / "05_comparison.ipynb").exists()


BAD_COMMANDS = {
    "unknown parameter": (("-p", "epoch", "3"), "-p epoch"),
    "not a number": (("-p", "epochs", "many"), "-p epochs many"),
    "no epochs": (("-p", "epochs", "0"), "epochs=0"),
    "no batch": (("-p", "batch_size", "0"), "batch_size=0"),
    "negative learning rate": (("-p", "lr", "-1"), "lr=-1"),
    "no seeds": (("-p", "n_seeds", "0"), "n_seeds=0"),
    "unknown dataset": (("--dataset", "gtzan"), "gtzan"),
    "unknown preset": (("--preset", "tiny"), "preset='tiny'"),
    "unknown device": (("--device", "tpu"), "device='tpu'"),
    "unknown notebook": (("--only", "07"), "--only 07"),
    "unknown split": (("-p", "evaluation_split", "train"), "evaluation_split='train'"),
    "run name with a path": (("--run", "../elsewhere"), "run='../elsewhere'"),
    "missing dataset": (("--dataset", "fma_small"), "fma-nb download"),
    "missing spectrograms": (("--dataset", "fma_small", "--only", "03"), "fma-nb spectrograms"),
    "unknown kernel": (("--kernel", "cobol"), "cobol"),
}


@pytest.mark.parametrize("arguments, named", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_input_is_one_sentence_before_any_work(arguments, named, tmp_path):
    done = fma_nb("run", *arguments, FMA_NB_DATA=str(tmp_path / "data"), FMA_NB_OUTPUTS=str(tmp_path / "out"))
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "data").exists()


def test_parameters_keep_their_types():
    declared = notebook_parameters("03_baseline")
    assert (declared["epochs"], declared["lr"], declared["dataset"]) == (10, 1e-3, "fma_mini")
    assert isinstance(declared["epochs"], int) and isinstance(declared["lr"], float)
