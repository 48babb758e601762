"""Stage 8, plots: one style, one genre order and one colour a genre in every figure of the course.

Each function draws on an ``Axes`` it is given, labels it in units, and returns it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import librosa
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import soundfile as sf
from IPython.display import HTML, Audio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.metrics import confusion_matrix

from fma_nb.audio import Samples
from fma_nb.evaluation import Estimate
from fma_nb.metadata import GENRES
from fma_nb.model import LayerTrace
from fma_nb.project import SPLITS, atomic_path, run_dir
from fma_nb.spectrogram import Decibels, GreyImage

# Okabe and Ito's palette: told apart also by colour-blind readers. Yellow is darkened for white paper.
GENRE_COLORS = dict(
    zip(
        GENRES,
        ("#0072B2", "#6A6A6A", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#C9A800", "#882E72"),
        strict=True,
    )
)
MODEL_COLORS = {"baseline": "#6A6A6A", "crnn": "#0072B2", "crnn_no_gru": "#D55E00"}
N_COLORS = 12  # of a spectrogram figure: more of them make a notebook heavy and show little more
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


def save_figure(figure: Figure, run: str, name: str, caption: str) -> None:
    """Write a figure for the report; its caption, which is also its alternative text, goes inside."""
    path = run_dir(run) / "figures" / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144, metadata={"Description": caption})


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


def ablation_plot(ax: Axes, table: pd.DataFrame) -> Axes:
    """Draw a `fma_nb.runs.ablation.ablation_table`: each row's change in accuracy, in points.

    Dark intervals exclude zero; the text on the right is the row's own accuracy.
    """
    first, rows = table.iloc[0], table.iloc[:0:-1]
    for height, row in enumerate(rows.itertuples()):
        color = "#A8A8A8" if row.low <= 0 <= row.high else "#0072B2"
        ax.plot([100 * row.low, 100 * row.high], [height, height], color=color, linewidth=3)
        ax.plot(100 * row.difference, height, "o", color=color, markersize=7)
        spread = "" if pd.isna(row.val_std) else f" ± {row.val_std:.3f}"
        ax.text(1.02, height, f"{row.val_mean:.3f}{spread}", transform=ax.get_yaxis_transform(), va="center")
    ax.axvline(0, color="#444444", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(rows)), [f"{row.row} ({row.seeds})" for row in rows.itertuples()])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.set_xlabel(f"change in val accuracy against {first['row']} ({first['val_mean']:.3f}), points")
    return ax


def reliability_plot(ax: Axes, tables: dict[str, pd.DataFrame]) -> Axes:
    """Draw named `fma_nb.calibration.reliability` tables; a dot's area tells its number of clips."""
    ax.plot([0, 1], [0, 1], color="#444444", linewidth=1, linestyle="--", label="as sure as right")
    for (name, table), color in zip(tables.items(), ("#D55E00", "#0072B2"), strict=False):
        ax.plot(table["confidence"], table["accuracy"], color=color, linewidth=1.5, label=name)
        area = 25 + 300 * table["clips"] / table["clips"].sum()
        ax.scatter(table["confidence"], table["accuracy"], s=area, color=color, alpha=0.7)
    ax.set(xlabel="probability of the answer", ylabel="share of right answers", xlim=(0, 1), ylim=(0, 1))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def embedding_map(ax: Axes, points: npt.NDArray[np.float64], clip_genres: Sequence[str]) -> Axes:
    """Draw clips as dots in the plane [shape=(n_clips, 2)], coloured by their true genre."""
    for genre in sorted(set(clip_genres)):
        chosen = np.array([g == genre for g in clip_genres])
        ax.scatter(
            points[chosen, 0],
            points[chosen, 1],
            s=28,
            color=genre_color(genre),
            alpha=0.8,
            label=genre,
            linewidths=0,
        )
    ax.set(xticks=[], yticks=[])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def probability_bars(ax: Axes, probabilities: Mapping[str, float]) -> Axes:
    """Draw the probability of each genre as a bar."""
    names = list(probabilities)[::-1]
    ax.barh(names, [probabilities[name] for name in names], color=[genre_color(name) for name in names])
    ax.set(xlabel="probability", xlim=(0, 1))
    ax.grid(axis="y", visible=False)
    return ax


def spectrogram_image(ax: Axes, image: npt.NDArray[np.float32], seconds: float, title: str = "") -> Axes:
    """Draw a spectrogram image [shape=(n_mels, n_frames)] as the network sees it, highest band on top."""
    n_mels = image.shape[0]
    ax.imshow(image, cmap="magma", aspect="auto", extent=(0, seconds, 0, n_mels), interpolation="nearest")
    ax.set(xlabel="time (s)", ylabel="mel band", title=title)
    ax.grid(False)
    return ax


def saliency_map(
    ax: Axes, support: npt.NDArray[np.float32], seconds: float, n_mels: int, title: str = ""
) -> Axes:
    """Draw how much each block [shape=(n_rows, n_columns)] supports an answer: red for, blue against."""
    largest = float(np.abs(support).max()) or 1.0
    extent = (0, seconds, 0, n_mels)
    ax.imshow(support, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", extent=extent)
    ax.set(xlabel="time (s)", ylabel="mel band", title=title)
    ax.grid(False)
    return ax


def genre_counts(ax: Axes, tracks: pd.DataFrame) -> Axes:
    """Draw how many tracks each genre has in training, validation (lighter) and test (lightest)."""
    counts = pd.crosstab(tracks["genre"], tracks["split"])[::-1]
    colors = [genre_color(genre) for genre in counts.index]
    left = np.zeros(len(counts))
    for split, alpha in zip(SPLITS, (1.0, 0.6, 0.3), strict=True):
        ax.barh(counts.index, counts[split], left=left, color=colors, alpha=alpha)
        ax.barh(counts.index[0], 0, color="#444444", alpha=alpha, label=split)
        left += counts[split].to_numpy()
    ax.set(xlabel="tracks")
    ax.grid(axis="y", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def network_diagram(
    ax: Axes, traces: Sequence[LayerTrace], image: npt.NDArray[np.float32], genres: Sequence[str]
) -> Axes:
    """Draw the path of one clip [shape=(n_mels, n_frames)] through a network, a box a layer.

    A box is as high and wide as the square roots of the mel bands and frames that the layer gives. Above it
    stands the layer, below it the shape and the receptive field of one number; the largest receptive field
    is outlined in the clip.
    """
    n_mels, n_frames = image.shape
    height, width = _drawn_size(n_mels, n_frames)
    _draw_clip(ax, image, max(trace.field for trace in traces if trace.field))
    _label_box(ax, width / 2, "clip", f"1 × {n_mels} × {n_frames}")
    left = width + 0.35
    for trace in traces:
        height, width = _drawn_size(*(trace.shape[1:] if len(trace.shape) == 3 else (1, trace.shape[0])))
        if len(trace.shape) == 1:
            _draw_genres(ax, left, genres)
        else:
            color = "#F0E442" if trace.field is None else "#9DBFD9"
            ax.add_patch(Rectangle((left, -height / 2), width, height, facecolor=color, edgecolor="#333333"))
        seen = "sees all" if trace.field is None else f"sees {trace.field[0]} × {trace.field[1]}"
        shape = " × ".join(map(str, trace.shape))
        _label_box(ax, left + width / 2, trace.name.replace(", ", "\n"), f"{shape}\n{seen}")
        left += max(width, 0.9) + 0.35
    ax.set(xlim=(-0.1, left + 0.2), ylim=(-1.05, 1.05), aspect="equal")
    ax.axis("off")
    return ax


def _drawn_size(n_bands: int, n_frames: int) -> tuple[float, float]:
    return math.sqrt(n_bands) / 10, math.sqrt(n_frames) / 10


def _draw_clip(ax: Axes, image: npt.NDArray[np.float32], field: tuple[int, int]) -> None:
    """Draw the clip, and in its middle the outline of a receptive field."""
    height, width = _drawn_size(*image.shape)
    extent = (0, width, -height / 2, height / 2)
    ax.imshow(image, extent=extent, cmap="magma", aspect="auto")
    seen = [min(1, n / whole) for n, whole in zip(field, image.shape, strict=True)]
    corner = (width / 2 * (1 - seen[1]), -height / 2 * seen[0])
    ax.add_patch(Rectangle(corner, width * seen[1], height * seen[0], fill=False, edgecolor="white"))


def _draw_genres(ax: Axes, left: float, genres: Sequence[str]) -> None:
    for i, genre in enumerate(genres):
        bottom = (len(genres) / 2 - 1 - i) * 0.15
        ax.add_patch(Rectangle((left, bottom), 0.12, 0.12, color=genre_color(genre)))
        ax.text(left + 0.17, bottom + 0.06, genre, va="center", fontsize=6.5)


def _label_box(ax: Axes, middle: float, above: str, below: str) -> None:
    ax.text(middle, 0.7, above, ha="center", va="bottom", fontsize=7.5)
    ax.text(middle, -0.7, below, ha="center", va="top", fontsize=7.5, linespacing=1.4)


def waveform(ax: Axes, samples: Samples, sample_rate: int, color: str) -> Axes:
    """Draw mono samples over time; where a pixel holds many of them, their range from lowest to highest."""
    scale, unit = (1, "s") if len(samples) > sample_rate / 2 else (1000, "ms")
    step = max(len(samples) // 1000, 1)
    columns = samples[: len(samples) // step * step].reshape(-1, step)
    time = np.arange(len(columns)) * step * scale / sample_rate
    if step == 1:
        ax.plot(time, samples, color=color, linewidth=1.2)
    else:
        ax.fill_between(time, columns.min(axis=1), columns.max(axis=1), color=color, linewidth=0)
    ax.set(xlabel=f"time ({unit})", ylabel="amplitude", xlim=(0, len(samples) * scale / sample_rate))
    return ax


def mel_spectrogram(ax: Axes, db: Decibels, seconds: float, sample_rate: int, title: str = "") -> Axes:
    """Draw a mel spectrogram [shape=(n_mels, n_frames)], lowest band first, with frequencies in Hz."""
    spectrogram_image(ax, db[::-1], seconds, title)
    ax.images[-1].set_cmap(plt.get_cmap("magma", N_COLORS))
    ax.set_yticks(*hertz_ticks(sample_rate, len(db), (500, 1000, 2000, 4000, 8000)))
    ax.set_ylabel("frequency")
    return ax


def thumbnail(ax: Axes, image: GreyImage) -> Axes:
    """Draw a spectrogram image [shape=(n_mels, n_frames)] small and without axes, for a gallery."""
    small = Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)
    colors = plt.get_cmap("magma", N_COLORS)
    ax.imshow(small, cmap=colors, aspect="auto", interpolation="nearest", vmin=0, vmax=255)
    ax.axis("off")
    return ax


def hertz_ticks(
    sample_rate: int, n_mels: int, hertz: Sequence[int] = (0, 500, 1000, 2000, 4000, 8000, 16000)
) -> tuple[list[float], list[str]]:
    """Return where frequencies lie on an axis of mel bands, and their labels in Hz or kHz."""
    centres = librosa.mel_frequencies(n_mels + 2, fmin=0, fmax=sample_rate / 2)[1:-1]
    shown = [f for f in hertz if f <= sample_rate / 2]
    labels = [f"{f // 1000} kHz" if f >= 1000 else f"{f} Hz" for f in shown]
    return [float(np.interp(f, centres, np.arange(n_mels))) for f in shown], labels


def mel_profiles(ax: Axes, profiles: pd.DataFrame, sample_rate: int) -> Axes:
    """Draw each genre's mean level by mel band; ``profiles`` in dB [shape=(n_genres, n_mels)]."""
    for genre, profile in profiles.iterrows():
        ax.plot(profile.to_numpy(), color=genre_color(str(genre)), linewidth=1.5, label=genre)
    ax.set_xticks(*hertz_ticks(sample_rate, profiles.shape[1]))
    ax.set(xlabel="frequency of the mel band", ylabel="mean level (dB re peak)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def audio_player(samples: Samples, sample_rate: int) -> Audio:
    """Return a player for a short mono excerpt, kept in the notebook as MP3 of 24 kbit/s."""
    buffer = io.BytesIO()
    settings = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.9}
    sf.write(buffer, samples, sample_rate, format="MP3", **settings)
    return Audio(buffer.getvalue(), embed=True)


def player_grid(players: Mapping[str, Audio]) -> HTML:
    """Return named players side by side, each under its name; a genre's name has the genre's colour."""
    colors = {name: GENRE_COLORS.get(name, "inherit") for name in players}
    cells = "".join(
        f"<div><b style='color:{colors[name]}'>{name}</b><br>{player._repr_html_()}</div>"
        for name, player in players.items()
    )
    return HTML(f"<div style='display:flex;flex-wrap:wrap;gap:0.6em 2em'>{cells}</div>")
