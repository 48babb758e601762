"""Stage 8: figures that say what the table says."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from fma_nb.audio import Samples
from fma_nb.metadata import GENRES
from fma_nb.model import build_model, trace_layers
from fma_nb.plots import (
    GENRE_COLORS,
    ablation_plot,
    audio_player,
    confusion_matrix_plot,
    embedding_map,
    genre_counts,
    learning_curves,
    network_diagram,
    player_grid,
    recall_dumbbell,
    reliability_plot,
    use_style,
)


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
    shown = {tuple(np.floor(text.get_position()[::-1])): text.get_text() for text in ax.texts}
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
        columns=["row", "seeds", "accuracy", "spread", "difference", "difference_low", "difference_high"],
    )
    ax = ablation_plot(Figure().subplots(), table)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["no_gru (3)", "no_ema (1)"]
    assert ax.yaxis_inverted()  # so the first row is on top
    assert [text.get_text() for text in ax.texts] == ["0.580 ± 0.020", "0.550"]
    bars = [list(line.get_xdata()) for line in ax.lines[:-1] if line.get_marker() != "o"]
    assert bars == [pytest.approx([-4, 1]), pytest.approx([-8, -2])]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([-2, -5])
    assert len({line.get_color() for line in dots}) == 2  # only one of the two excludes zero
    assert "final (0.600)" in ax.get_xlabel()


def test_a_learning_curve_is_the_mean_and_its_band_the_range_over_the_seeds() -> None:
    log = pd.DataFrame(
        {
            "epoch": [0, 1, 0, 1, 0, 1],
            "train_loss": [2.0, 1.0, 2.3, 1.2, 2.0, 1.4],
            "val_loss": [3.0, 2.0, 3.0, 2.0, 3.0, 2.0],
        }
    )
    ax = learning_curves(Figure().subplots(), log, "loss")
    assert [text.get_text() for text in ax.get_legend().texts] == ["train", "val"]
    line, band = ax.lines[0], ax.collections[0].get_paths()[0].vertices
    assert list(line.get_xdata()) == [1, 2]  # epochs are shown from 1
    assert line.get_ydata() == pytest.approx([2.1, 1.2])
    for epoch, low, high in ((1, 2.0, 2.3), (2, 1.0, 1.4)):
        heights = band[band[:, 0] == epoch, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))


def test_genre_counts_stack_the_splits_in_the_genre_s_colour() -> None:
    rows = {("Rock", "train"): 5, ("Rock", "test"): 2, ("Folk", "train"): 3, ("Folk", "val"): 1}
    rows |= {("Jazz", "train"): 4}
    tracks = pd.DataFrame([row for row, n in rows.items() for _ in range(n)], columns=["genre", "split"])
    ax = genre_counts(Figure().subplots(), tracks)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["Folk", "Jazz", "Rock"]
    assert ax.yaxis_inverted()  # so the first genre is on top
    colors = {"Folk": GENRE_COLORS["Folk"], "Jazz": "#999999", "Rock": GENRE_COLORS["Rock"]}
    starts = dict.fromkeys(colors, 0)
    for split, bars in zip(("train", "val", "test"), ax.containers, strict=True):
        for genre, bar in zip(colors, bars, strict=True):
            assert (bar.get_x(), bar.get_width()) == (starts[genre], rows.get((genre, split), 0))
            assert to_hex(bar.get_facecolor()).upper() == colors[genre]
            starts[genre] += rows.get((genre, split), 0)
    assert [text.get_text() for text in ax.get_legend().texts] == ["train", "val", "test"]


def test_the_first_model_s_recall_is_hollow_and_the_second_s_filled() -> None:
    first = pd.DataFrame({"recall": [0.2, 0.9]}, index=["Folk", "Rock"])
    ax = recall_dumbbell(Figure().subplots(), {"CNN": first, "CRNN": 1 - first})
    hollow, filled = (
        {
            line.get_ydata()[0]: line.get_xdata()[0]
            for line in ax.lines
            if wanted(line) and line.get_xdata().size
        }
        for wanted in (
            lambda line: line.get_marker() == "o" and line.get_markerfacecolor() == "white",
            lambda line: line.get_marker() == "o" and line.get_markerfacecolor() != "white",
        )
    )
    assert hollow == pytest.approx({"Folk": 0.2, "Rock": 0.9})
    assert filled == pytest.approx({"Folk": 0.8, "Rock": 0.1})
    assert [text.get_text() for text in ax.get_legend().texts] == ["CNN", "CRNN"]


def test_a_sure_and_right_answer_lies_inside_the_reliability_plot() -> None:
    table = pd.DataFrame({"confidence": [0.0, 1.0], "accuracy": [0.0, 1.0], "clips": [1, 1]})
    figure = Figure(figsize=(6.6, 3.8))
    ax = reliability_plot(figure.subplots(), {"as trained": table, "temperature": table})
    radius = np.sqrt(ax.collections[0].get_sizes().max() / np.pi) / 72 * figure.dpi
    for corner, inward in ((0.0, -1), (1.0, 1)):
        dot = ax.transData.transform((corner, corner)) + inward * radius
        assert ax.bbox.x0 <= dot[0] <= ax.bbox.x1
        assert ax.bbox.y0 <= dot[1] <= ax.bbox.y1


def test_a_dot_of_the_embedding_map_has_its_genre_s_colour() -> None:
    genres = ["Rock", "Folk", "Rock"]
    ax = embedding_map(Figure().subplots(), np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), genres)
    dots = ax.collections[0]
    assert dots.get_offsets().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [to_hex(c).upper() for c in dots.get_facecolors()] == [GENRE_COLORS[genre] for genre in genres]
    assert [text.get_text() for text in ax.get_legend().texts] == ["Folk", "Rock"]


@pytest.mark.parametrize(("model", "width"), [("baseline", 9), ("crnn", 11)])
@pytest.mark.parametrize("n_frames", [128, 1292])
def test_the_words_of_a_network_diagram_are_large_and_apart(model: str, width: int, n_frames: int) -> None:
    traces = trace_layers(build_model(model, len(GENRES), 128, n_frames), 128, n_frames)
    with plt.rc_context():
        use_style()
        figure = Figure(figsize=(width, 3))
        image = np.zeros((128, n_frames), dtype=np.float32)
        ax = network_diagram(figure.subplots(), traces, image, GENRES)
        ax.set_title("A clip's way")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in ax.texts]
    assert min(text.get_fontsize() for text in ax.texts) >= 9
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)
    assert all(figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1) for box in boxes)


def test_a_player_s_name_is_in_the_page_s_own_colour() -> None:
    silence: Samples = np.zeros(2205, dtype=np.float32)
    page = player_grid({name: audio_player(silence, 22_050) for name in ("Folk", "original")}).data
    assert f"<span style='color:{GENRE_COLORS['Folk']}'>■</span> <b>Folk</b>" in page
    assert "<div><b>original</b>" in page


def test_plots_load_nothing_that_only_the_report_needs() -> None:
    code = "import sys, fma_nb.plots; print(sorted({'nbconvert', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
