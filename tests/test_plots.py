"""Stage 8: figures that say what the table says."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from fma_nb.plots import confusion_matrix_plot


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
