"""Stage 8, plots: one style, one genre order and one colour per genre in every figure of the course.

Each function draws on an ``Axes`` it is given, labels it in units, and returns it. The notebooks that use it
stand in its docstring.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import librosa
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
import soundfile as sf
from IPython import get_ipython
from IPython.display import HTML, Audio
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.metrics import confusion_matrix

from fma_nb.audio import Samples
from fma_nb.evaluation import Estimate
from fma_nb.metadata import GENRES
from fma_nb.model import LayerTrace
from fma_nb.project import atomic_path, run_dir
from fma_nb.spectrogram import Decibels, GreyImage

Bands = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

# Okabe and Ito's palette: told apart also by colour-blind readers. Yellow is darkened for white paper.
PALETTE = ("#0072B2", "#6A6A6A", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#C9A800", "#882E72")
GENRE_COLORS = dict(zip(GENRES, PALETTE, strict=True))
MODEL_NAMES = {
    "baseline": "baseline CNN",
    "baseline_with_recipe": "baseline with CRNN's recipe",
    "crnn_no_gru": "CRNN without GRU",
    "crnn": "CRNN",
}
BLUE, ORANGE, GREY, DARK_GREY = "#0072B2", "#D55E00", "#6A6A6A", "#444444"
# More colours would make a notebook heavy and show little more.
COARSE: dict[str, Any] = {"cmap": plt.get_cmap("magma", 12), "interpolation": "nearest"}
CLIP_WIDTH, MIN_WIDTH, GAP = 1.6, 1.0, 0.3  # of a network diagram, in heights of the clip


def use_style() -> None:
    """Set the course's style: readable at the size it is shown, no frame, light grid. All notebooks.

    Figures are shown in a notebook also where the shell has set ``MPLBACKEND=Agg``.
    """
    shell = get_ipython()
    if hasattr(shell, "kernel") and plt.get_backend().lower() == "agg":
        shell.run_line_magic("matplotlib", "inline")
    plt.rc("figure", figsize=(8, 3.5), dpi=80)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("savefig", dpi=80)
    plt.rc("font", size=11)
    plt.rc("axes", titlesize=12, titleweight="bold", titlelocation="left", grid=True, axisbelow=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", alpha=0.25)
    plt.rc("legend", frameon=False)


def save_figure(figure: Figure, run: str, name: str, caption: str) -> None:
    """Write a figure for the report, its caption inside as its alternative text. Notebooks 03, 04, 05."""
    path = run_dir(run) / "figures" / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=144, metadata={"Description": caption})


def genre_color(genre: str) -> str:
    """Return a genre's colour; genres outside FMA-Small's eight share a grey. Notebooks 01, 02."""
    return GENRE_COLORS.get(genre, "#999999")


def _palette(genres: Iterable[str]) -> dict[str, str]:
    return {genre: genre_color(genre) for genre in genres}


def genre_counts(ax: Axes, tracks: pd.DataFrame) -> Axes:
    """Draw how many tracks each genre has in train, val (lighter) and test (lightest). Notebook 01."""
    table = tracks.sort_values("genre")
    shades = {"test": "#C7C7C7", "val": "#8F8F8F", "train": DARK_GREY}
    options = {"hue_order": shades, "palette": shades, "multiple": "stack", "shrink": 0.8, "alpha": 1}
    sns.histplot(table, y="genre", hue="split", edgecolor="none", ax=ax, **options)
    for bars, alpha in zip(ax.containers, (1, 0.6, 0.3), strict=True):
        for bar, genre in zip(bars, table["genre"].unique(), strict=True):
            bar.set(facecolor=genre_color(genre), alpha=alpha)
    ax.set(xlabel="tracks", ylabel="")
    ax.grid(axis="y", visible=False)
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), title=None, reverse=True)
    return ax


def waveform(ax: Axes, samples: Samples, sample_rate: int, color: str) -> Axes:
    """Draw mono samples over time; where a pixel holds many, from lowest to highest. Notebook 01."""
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


def audio_player(samples: Samples, sample_rate: int) -> Audio:
    """Return a player for a short mono excerpt, kept as a small MP3. Notebooks 01, 02, 05."""
    buffer = io.BytesIO()
    settings = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.9}
    sf.write(buffer, samples, sample_rate, format="MP3", **settings)
    return Audio(buffer.getvalue(), embed=True)


def player_grid(players: Mapping[str, Audio]) -> HTML:
    """Return named players side by side; before a genre a square of its colour. Notebooks 01, 02, 05."""
    squares = {genre: f"<span style='color:{color}'>■</span> " for genre, color in GENRE_COLORS.items()}
    cells = "".join(
        f"<div>{squares.get(name, '')}<b>{name}</b><br>{player._repr_html_()}</div>"
        for name, player in players.items()
    )
    return HTML(f"<div style='display:flex;flex-wrap:wrap;gap:0.6em 2em'>{cells}</div>")


def mel_spectrogram(ax: Axes, db: Decibels, seconds: float, sample_rate: int, title: str = "") -> Axes:
    """Draw a mel spectrogram [shape=(n_mels, n_frames)], lowest band first, in Hz. Notebook 02."""
    _show_bands(ax, db[::-1], seconds, len(db), title, **COARSE)
    places, labels = _hertz_ticks(sample_rate, len(db), (500, 1000, 2000, 4000, 8000))
    ax.set_yticks(places + 0.5, labels)  # a band's centre is in the middle of its row
    ax.set_ylabel("frequency")
    return ax


def _show_bands(ax: Axes, values: Bands, seconds: float, n_mels: int, title: str, **options: Any) -> Axes:
    ax.imshow(values, aspect="auto", extent=(0, seconds, 0, n_mels), **options)
    ax.set(xlabel="time (s)", ylabel="mel band", title=title)
    ax.grid(False)
    return ax


def _hertz_ticks(sample_rate: int, n_mels: int, hertz: Sequence[int]) -> tuple[Floats, list[str]]:
    """Return where frequencies lie on an axis of mel bands, and their labels in Hz or kHz."""
    centres = librosa.mel_frequencies(n_mels + 2, fmin=0, fmax=sample_rate / 2)[1:-1]
    shown = [f for f in hertz if f <= sample_rate / 2]
    labels = [f"{f // 1000} kHz" if f >= 1000 else f"{f} Hz" for f in shown]
    return np.interp(shown, centres, np.arange(n_mels)), labels


def thumbnail(ax: Axes, image: GreyImage) -> Axes:
    """Draw a spectrogram image [shape=(n_mels, n_frames)] small and without axes. Notebook 02."""
    small = Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)
    ax.imshow(small, aspect="auto", vmin=0, vmax=255, **COARSE)
    ax.axis("off")
    return ax


def mel_profiles(ax: Axes, profiles: pd.DataFrame, sample_rate: int) -> Axes:
    """Draw each genre's mean level by mel band, in dB [shape=(n_genres, n_mels)]. Notebook 02."""
    sns.lineplot(profiles.T, palette=_palette(profiles.index), dashes=False, ax=ax)
    ax.set_xticks(*_hertz_ticks(sample_rate, profiles.shape[1], (0, 500, 1000, 2000, 4000, 8000, 16000)))
    ax.set(xlabel="frequency of the mel band", ylabel="mean level (dB re peak)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def learning_curves(ax: Axes, log: pd.DataFrame, quantity: str = "accuracy") -> Axes:
    """Draw training and validation ``accuracy`` or ``loss`` by epoch: mean line, band over the seeds.

    ``log`` is a table from `fma_nb.runs.checkpoint.read_log`. Notebooks 03, 04.
    """
    for split, color in (("train", GREY), ("val", BLUE)):
        x, y = log["epoch"] + 1, log[f"{split}_{quantity}"]
        sns.lineplot(x=x, y=y, errorbar=("pi", 100), color=color, marker=".", mec=color, label=split, ax=ax)
    ax.set(xlabel="epoch", ylabel=quantity)
    ax.locator_params(axis="x", integer=True)
    return ax


def confusion_matrix_plot(ax: Axes, table: pd.DataFrame, genres: Sequence[str]) -> Axes:
    """Draw how the clips of each true genre were classified, in percent, averaged over the seeds.

    ``table`` is a `fma_nb.evaluation.prediction_table`; each row adds up to 100 %. Notebooks 03, 05.
    """
    matrix = confusion_matrix(table["genre"], table["predicted"], labels=list(genres), normalize="true")
    shown = pd.DataFrame(100 * matrix, index=genres, columns=genres)
    sns.heatmap(shown, vmin=0, vmax=100, annot=True, fmt=".0f", cmap="Blues", cbar=False, square=True, ax=ax)
    ax.set(xlabel="predicted genre", ylabel="true genre")
    plt.setp(ax.get_xticklabels(), rotation=40, ha="right")
    return ax


def network_diagram(ax: Axes, traces: Sequence[LayerTrace], image: Bands, genres: Sequence[str]) -> Axes:
    """Draw the path of one clip [shape=(n_mels, n_frames)] through a network. Notebooks 03, 04.

    A box is as high and wide as the square roots of the mel bands and frames that the layer gives. Above it
    stands the layer, below it the shape and the receptive field of one number; the largest receptive field
    is outlined in the clip.
    """
    ax.imshow(image, extent=(0, CLIP_WIDTH, -0.5, 0.5), cmap="magma", aspect="auto")
    largest = max(trace.field for trace in traces if trace.field)
    _draw_box(ax, CLIP_WIDTH / 2, np.divide(largest, image.shape), edgecolor="white", fill=False)
    left = 0.0
    for trace in (LayerTrace("clip", (1, *image.shape), (1, 1)), *traces):
        size = trace.shape[1:] if len(trace.shape) == 3 else (1, trace.shape[0])
        share = np.sqrt(np.divide(size, image.shape))
        middle = left + max(share[1] * CLIP_WIDTH, MIN_WIDTH) / 2
        if len(trace.shape) == 1:
            _draw_genres(ax, left, genres)
        elif left > 0:
            color = "#F0E442" if trace.field is None else "#9DBFD9"
            _draw_box(ax, middle, share, edgecolor=DARK_GREY, facecolor=color)
        seen = "sees all" if trace.field is None else f"sees {trace.field[0]} × {trace.field[1]}"
        ax.text(middle, 0.58, trace.name.replace(", ", "\n"), ha="center", va="bottom")
        ax.text(middle, -0.58, f"{' × '.join(map(str, trace.shape))}\n{seen}", ha="center", va="top")
        left = 2 * middle - left + GAP
    ax.set(xlim=(0, left), ylim=(-0.95, 0.95))
    ax.axis("off")
    return ax


def _draw_box(ax: Axes, middle: float, share: Floats, **style: Any) -> None:
    """Draw a rectangle whose height and width are shares of the clip's."""
    height, width = np.minimum(share, 1) * (1, CLIP_WIDTH)
    ax.add_patch(Rectangle((middle - width / 2, -height / 2), width, height, **style))


def _draw_genres(ax: Axes, left: float, genres: Sequence[str]) -> None:
    heights = np.linspace(0.5, -0.5, 2 * len(genres) + 1)[1::2]
    for genre, height in zip(genres, heights, strict=True):
        ax.plot(left, height, "s", color=genre_color(genre), markersize=8)
        ax.text(left + 0.12, height, genre, va="center", fontsize=9)


def spectrogram_image(ax: Axes, image: Bands, seconds: float, title: str = "") -> Axes:
    """Draw levels from 0 to 1 [shape=(n_mels, n_frames)], highest band on top. Notebooks 04, 05."""
    return _show_bands(ax, image, seconds, len(image), title, vmin=0, vmax=1, **COARSE)


def recall_dumbbell(ax: Axes, reports: dict[str, pd.DataFrame]) -> Axes:
    """Draw each genre's recall for two models: a hollow and a filled dot, joined by a line. Notebook 05.

    ``reports`` maps the models' names to tables from `fma_nb.evaluation.genre_report`.
    """
    recall = pd.DataFrame({model: report["recall"] for model, report in reports.items()})
    for genre, color in _palette(recall.index).items():
        ax.plot(recall.loc[genre], [genre, genre], color=color, linewidth=3, alpha=0.6)
        for model, face in zip(recall, ("white", color), strict=True):
            ax.plot(recall[model][genre], genre, "o", color=color, markerfacecolor=face, markeredgewidth=2)
    for model, face in zip(recall, ("white", DARK_GREY), strict=True):
        ax.plot([], [], "o", color=DARK_GREY, markerfacecolor=face, markeredgewidth=2, label=model)
    ax.set(xlabel="recall (share of the genre's clips that are found)", xlim=(-0.03, 1.03))
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def interval_plot(
    ax: Axes, estimates: dict[str, Estimate], reference: float = 0, texts: Sequence[str] | None = None
) -> Axes:
    """Draw named estimates with their 95 % intervals, first one on top. Notebook 05.

    The dashed line is the ``reference``; intervals that hold it are grey. ``texts`` stand on the right.
    """
    for row, e in enumerate(estimates.values()):
        color = "#A8A8A8" if e.low <= reference <= e.high else BLUE
        ax.plot([e.low, e.high], [row, row], color=color, linewidth=3, alpha=0.6)
        ax.plot(e.value, row, "o", color=color, markersize=8)
        text = texts[row] if texts else f"{e.value:.3f}"
        ax.text(1.02, row, text, transform=ax.get_yaxis_transform(), va="center")
    ax.axvline(reference, color=DARK_GREY, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set_ylim(len(estimates) - 0.4, -0.6)
    return ax


def ablation_plot(ax: Axes, table: pd.DataFrame) -> Axes:
    """Draw a `fma_nb.runs.ablation.ablation_table`: each row's change in accuracy, in points. Notebook 05.

    The text on the right is the row's own accuracy.
    """
    first, *rows = table.itertuples()
    points = 100 * table[["difference", "difference_low", "difference_high"]][1:]
    changes = {f"{r.row} ({r.seeds})": Estimate(*points.loc[r.Index]) for r in rows}
    texts = [f"{r.accuracy:.3f}" + ("" if pd.isna(r.spread) else f" ± {r.spread:.3f}") for r in rows]
    interval_plot(ax, changes, texts=texts)
    ax.set_xlabel(f"change in accuracy against {first.row} ({first.accuracy:.3f}), points")
    return ax


def reliability_plot(ax: Axes, tables: dict[str, pd.DataFrame]) -> Axes:
    """Draw two named `fma_nb.calibration.reliability` tables; a dot's area tells its clips. Notebook 05."""
    ax.plot([0, 1], [0, 1], color=DARK_GREY, linewidth=1, linestyle="--", label="perfect calibration")
    for (name, table), color in zip(tables.items(), (ORANGE, BLUE), strict=True):
        ax.plot(table["confidence"], table["accuracy"], color=color, label=name)
        area = 25 + 300 * table["clips"] / table["clips"].sum()
        ax.scatter(table["confidence"], table["accuracy"], s=area, color=color, alpha=0.7)
    limits = (-0.05, 1.05)
    ax.set(xlabel="probability of the answer", ylabel="share of right answers", xlim=limits, ylim=limits)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def embedding_map(ax: Axes, points: Floats, clip_genres: Sequence[str]) -> Axes:
    """Draw clips as dots in the plane [shape=(n_clips, 2)], coloured by their true genre. Notebook 05."""
    (x, y), palette = points.T, _palette(sorted(set(clip_genres)))
    sns.scatterplot(
        x=x, y=y, hue=clip_genres, hue_order=palette, palette=palette, alpha=0.8, linewidth=0, ax=ax
    )
    ax.set(xticks=[], yticks=[])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def probability_bars(ax: Axes, probabilities: Mapping[str, float]) -> Axes:
    """Draw the probability of each genre as a bar. Notebook 05."""
    ax.barh(list(probabilities), list(probabilities.values()), color=_palette(probabilities).values())
    ax.set(xlabel="probability", xlim=(0, 1))
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    return ax


def saliency_map(ax: Axes, support: Bands, seconds: float, n_mels: int, title: str = "") -> Axes:
    """Draw what supports an answer [shape=(n_rows, n_columns)]: red for, blue against it. Notebook 05."""
    largest = float(np.abs(support).max()) or 1.0
    return _show_bands(ax, support, seconds, n_mels, title, cmap="RdBu_r", vmin=-largest, vmax=largest)
