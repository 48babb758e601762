"""Stage 8: figures that say what the table says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fma_nb.plots import ablation_plot, confusion_matrix_plot


def test_a_row_of_the_confusion_matrix_is_a_true_genre() -> None:
    genres = ["Folk", "Pop", "Rock"]
    table = pd.DataFrame(
        [
            ("Folk", "Folk"),
            ("Folk", "Rock"),
            ("Folk", "Rock"),
            ("Folk", "Rock"),
            ("Pop", "Pop"),
            ("Rock", "Pop"),
        ],
        columns=["genre", "predicted"],
    )
    ax = confusion_matrix_plot(Figure().subplots(), table, genres)
    shown = {tuple(text.get_position()[::-1]): text.get_text() for text in ax.texts}
    rows = [[shown[row, column] for column in range(3)] for row in range(3)]
    assert rows == [["25", "0", "75"], ["0", "100", "0"], ["0", "100", "0"]]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true genre", "predicted genre")
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == genres


def test_the_ablation_is_drawn_against_its_first_row() -> None:
    table = pd.DataFrame(
        [
            ("final", 3, 0.600, 0.010, 0.0, 0.0, 0.0),
            ("no_gru", 3, 0.580, 0.020, -0.02, -0.04, 0.01),
            ("no_ema", 1, 0.550, np.nan, -0.05, -0.08, -0.02),
        ],
        columns=["row", "seeds", "val_mean", "val_std", "difference", "low", "high"],
    )
    ax = ablation_plot(Figure().subplots(), table)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["no_ema (1)", "no_gru (3)"]  # from below: the first row is on top
    assert [text.get_text() for text in ax.texts] == ["0.550", "0.580 ± 0.020"]
    bars = [
        line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-"
    ]
    assert bars == [pytest.approx([-8, -2]), pytest.approx([-4, 1])]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([-5, -2])
    assert len({line.get_color() for line in dots}) == 2  # only one of the two excludes zero
    assert "final (0.600)" in ax.get_xlabel()
