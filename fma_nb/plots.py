"""Stage 8, plots: one style, one genre order and one colour a genre in every figure of the course.

Each function draws on an ``Axes`` it is given, labels it in units, and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix

from fma_nb.evaluation import Estimate
from fma_nb.metadata import GENRES

# Okabe and Ito's palette: told apart also by colour-blind readers. Yellow is darkened for white paper.
GENRE_COLORS = dict(
    zip(
        GENRES,
        ("#0072B2", "#6A6A6A", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#C9A800", "#882E72"),
        strict=True,
    )
)
MODEL_COLORS = {"baseline": "#6A6A6A", "crnn": "#0072B2", "crnn_no_gru": "#D55E00"}
MODEL_NAMES = {"baseline": "baseline CNN", "crnn": "CRNN", "crnn_no_gru": "CRNN without GRU"}


def use_style() -> None:
    """Set the course's figure style: readable at the size it is shown, no frame, light grid."""
    plt.rcParams.update(
        {
            "figure.figsize": (8, 3.5),
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )


def genre_color(genre: str) -> str:
    """Return a genre's colour; genres outside FMA-Small's eight share a grey."""
    return GENRE_COLORS.get(genre, "#999999")


def learning_curves(ax: Axes, log: pd.DataFrame, quantity: str = "accuracy") -> Axes:
    """Draw training and validation ``accuracy`` or ``loss`` by epoch: mean line, band over the seeds.

    ``log`` is a table from `fma_nb.training.read_log`.
    """
    for split, color in (("train", "#6A6A6A"), ("val", "#0072B2")):
        curve = log.groupby("epoch")[f"{split}_{quantity}"].agg(["mean", "min", "max"])
        epochs = curve.index + 1
        ax.fill_between(epochs, curve["min"], curve["max"], color=color, alpha=0.15, linewidth=0)
        ax.plot(epochs, curve["mean"], color=color, marker=".", label=split)
    ax.set(xlabel="epoch", ylabel=quantity)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def confusion_matrix_plot(ax: Axes, table: pd.DataFrame, genres: Sequence[str]) -> Axes:
    """Draw how the clips of each true genre were classified, in percent, averaged over the seeds.

    ``table`` is a `fma_nb.evaluation.prediction_table`; each row of the matrix adds up to 100 %.
    """
    matrix = confusion_matrix(table["genre"], table["predicted"], labels=list(genres), normalize="true")
    ax.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape):
        share = matrix[row, column]
        color = "white" if share > 0.5 else "#1d1d1f"
        ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=9)
    ax.set_xticks(range(len(genres)), genres, rotation=40, ha="right")
    ax.set_yticks(range(len(genres)), genres)
    ax.set(xlabel="predicted genre", ylabel="true genre")
    ax.grid(False)
    return ax


def recall_dumbbell(ax: Axes, reports: dict[str, pd.DataFrame]) -> Axes:
    """Draw each genre's recall for two models as two dots joined by a line.

    ``reports`` maps two model names to tables from `fma_nb.evaluation.genre_report`.
    """
    (first, a), (second, b) = reports.items()
    genres = list(a.index)[::-1]
    rows = range(len(genres))
    colors = [genre_color(genre) for genre in genres]
    ax.hlines(rows, a.loc[genres, "recall"], b.loc[genres, "recall"], colors=colors, linewidth=3, alpha=0.6)
    for model, report, face in ((first, a, "white"), (second, b, None)):
        recall = report.loc[genres, "recall"]
        ax.scatter(recall, rows, s=60, c=face or colors, edgecolors=colors, linewidths=2, zorder=3)
        ax.scatter([], [], s=60, c=face or "#444444", edgecolors="#444444", linewidths=2, label=model)
    ax.set_yticks(rows, genres)
    ax.set(xlabel="recall (share of the genre's clips that are found)", xlim=(-0.03, 1.03))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def interval_plot(ax: Axes, estimates: dict[str, Estimate], reference: float | None = None) -> Axes:
    """Draw named estimates with their 95 % intervals below each other, first one on top."""
    names = list(estimates)[::-1]
    for row, name in enumerate(names):
        estimate = estimates[name]
        ax.plot([estimate.low, estimate.high], [row, row], color="#0072B2", linewidth=3, alpha=0.6)
        ax.plot(estimate.value, row, "o", color="#0072B2", markersize=8)
        ax.annotate(
            f"{estimate.value:.3f}",
            (estimate.value, row),
            (0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    if reference is not None:
        ax.axvline(reference, color="#444444", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.3)
    return ax


def spectrogram_image(ax: Axes, image: npt.NDArray[np.float32], seconds: float, title: str = "") -> Axes:
    """Draw a spectrogram image [shape=(n_mels, n_frames)] as the network sees it, highest band on top."""
    n_mels = image.shape[0]
    ax.imshow(image, cmap="magma", aspect="auto", extent=(0, seconds, 0, n_mels), interpolation="nearest")
    ax.set(xlabel="time (s)", ylabel="mel band", title=title)
    ax.grid(False)
    return ax
