"""Stage 8, plots: one style, one genre order and one colour a genre in every figure of the course.

Each function draws on an ``Axes`` it is given, labels it in units, and returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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
