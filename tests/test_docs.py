"""The pages' tables are those of the CSV files, and the CSV files agree with each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fma_nb.project import project_root

RESULTS = project_root() / "assets" / "results"
GRU_ROWS = ("final", "no_gru")


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docs/write_results.py", "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A copy of everything that the tables are written from and to."""
    for name in ("docs", "assets", "fma_nb/weights"):
        shutil.copytree(project_root() / name, tmp_path / name)
    shutil.copy(project_root() / "README.md", tmp_path)
    return tmp_path


def test_the_tables_are_those_of_the_csv_files(pages: Path) -> None:
    found = check(pages)
    assert (found.returncode, found.stdout.strip()) == (0, "")


@pytest.mark.parametrize("name", ["evaluation_test_table", "folds_compact_table", "artists"])
def test_a_table_that_differs_from_its_csv_file_is_named(pages: Path, name: str) -> None:
    path = pages / "assets" / "results" / f"{name}.csv"
    table = pd.read_csv(path)
    column = "accuracy" if "accuracy" in table else "artists"
    path.write_text(table.assign(**{column: table[column] + 1}).to_csv(index=False))
    found = check(pages)
    assert found.returncode > 0
    assert "docs/results.md: a table differs from its CSV file" in found.stdout


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_row_s_accuracy_is_the_mean_of_its_networks(split: str) -> None:
    networks = pd.read_csv(RESULTS / f"evaluation_{split}.csv").groupby("row")["accuracy"].mean()
    table = pd.read_csv(RESULTS / f"evaluation_{split}_table.csv").set_index("row")["accuracy"]
    pd.testing.assert_series_equal(table.sort_index(), networks.sort_index(), atol=2e-5)


@pytest.mark.parametrize("scale", ["compact", "first3s"])
def test_the_folds_table_follows_from_the_trainings(scale: str) -> None:
    """Over all clips the accuracy is the mean over the folds, weighted by their clips."""
    lines = pd.read_csv(RESULTS / f"folds_{scale}.csv")
    table = pd.read_csv(RESULTS / f"folds_{scale}_table.csv").set_index("row")
    for row, group in lines.groupby("row"):
        assert sorted(group["fold"]) == [1, 2, 3, 4, 5]
        assert group["held_out_clips"].sum() == 7194
        pooled = (group["accuracy"] * group["held_out_clips"]).sum() / group["held_out_clips"].sum()
        assert table.loc[row, "accuracy"] == pytest.approx(pooled, abs=2e-5)
        assert table.loc[row, "spread"] == pytest.approx(group["accuracy"].std() / 5**0.5, abs=2e-5)


@pytest.mark.parametrize("scale", ["compact", "first3s"])
def test_the_answers_of_the_folds_give_their_differences(scale: str) -> None:
    answers = pd.read_csv(RESULTS / f"folds_{scale}_answers.csv")
    table = pd.read_csv(RESULTS / f"folds_{scale}_table.csv").set_index("row")
    assert len(answers) == 7194 and answers["track_id"].is_unique
    differ = (answers["final"] != answers["no_gru"]).mean()
    assert abs(table.loc["no_gru", "difference"]) <= differ


def test_the_interval_of_the_gru_is_at_most_two_points_wide_each_way() -> None:
    table = pd.read_csv(RESULTS / "folds_compact_table.csv").set_index("row").loc["no_gru"]
    assert (table["difference_high"] - table["difference_low"]) / 2 <= 0.02
