"""Stage 8, evaluation: from predictions to honest comparisons: scores, tables and intervals.

Nothing here trains, reads a file or writes one. Metrics are what `fma_nb.runs.experiment` keeps of every
seed, so that models can be compared clip by clip. Notebook 05 works through the statistics step by step.

References
----------
A. Flexer: "A Closer Look on Artist Filters for Musical Genre Classification", ISMIR 2007 (why artists count).
B. Efron: "Bootstrap Methods: Another Look at the Jackknife", The Annals of Statistics 1979.
Q. McNemar: "Note on the sampling error of the difference between correlated proportions", 1947.
T. G. Dietterich: "Approximate Statistical Tests for Comparing Supervised Classification Learning
Algorithms", Neural Computation 1998 (why McNemar's test).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, classification_report, f1_score
from torch import nn

from fma_nb.dataset import Pack, SpectrogramDataset, make_loader
from fma_nb.project import FmaNbError
from fma_nb.training import predict_logits

Floats = npt.NDArray[np.float64]
# What is known of one model, as `fma_nb.runs.experiment` keeps it; track ids are texts, as in JSON:
#   {"model": "crnn", "genres": ["Electronic", ...], "n_parameters": 323256, ...,
#    "labels": {"val": {"148": "Experimental", ...}}, "artists": {"val": {"148": 54, ...}},
#    "seeds": [{"seed": 0, "seconds": 61.2, "val": the result of `evaluate_split`}, ...]}
Metrics = dict[str, Any]

N_RESAMPLES = 5000
EVALUATION_SPLITS = ("val", "test")
SCORES = {"accuracy": "accuracy", "artist-balanced": "artist_balanced_accuracy", "macro-F1": "macro_f1"}


def evaluate_split(
    model: nn.Module, pack: Pack, split: str, device: torch.device, bfloat16: bool = True
) -> dict[str, Any]:
    """Return a model's `split_scores` on a split, and its answers by track id.

    They are ``predictions`` (a genre) and ``probabilities`` (of each genre, rounded to 4 digits).
    """
    clips = pack.split(split)
    loader = make_loader(SpectrogramDataset(clips, device), 256)
    logits, labels = predict_logits(model, loader, bfloat16)
    probabilities = logits.softmax(1).numpy()
    predicted = logits.argmax(1).numpy()
    ids = [str(track_id) for track_id in clips.track_ids]
    return split_scores(labels.numpy(), predicted, clips.artists) | {
        "predictions": {i: pack.genres[p] for i, p in zip(ids, predicted, strict=True)},
        "probabilities": {
            i: [round(float(p), 4) for p in row] for i, row in zip(ids, probabilities, strict=True)
        },
    }


def split_scores(labels: npt.ArrayLike, predicted: npt.ArrayLike, artists: npt.ArrayLike) -> dict[str, float]:
    """Return the `SCORES` of answers; artist-balanced, our term, is recall by artist, averaged by genre."""
    clips = pd.DataFrame({"label": labels, "artist": artists})
    weights = 1 / clips.groupby(["label", "artist"])["label"].transform("size")
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "artist_balanced_accuracy": float(balanced_accuracy_score(labels, predicted, sample_weight=weights)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
    }


def prediction_table(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return one row per seed and track: ``seed, track_id, genre, predicted, confidence, correct``."""
    labels = metrics["labels"][split]
    rows = [
        {
            "seed": result["seed"],
            "track_id": int(track_id),
            "genre": labels[track_id],
            "predicted": predicted,
            "confidence": max(result[split]["probabilities"][track_id]),
            "correct": predicted == labels[track_id],
        }
        for result in metrics["seeds"]
        for track_id, predicted in result[split]["predictions"].items()
    ]
    return pd.DataFrame(rows)


def correct_matrix(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return which tracks each seed got right: rows are seeds, columns track ids, values 0 or 1."""
    table = prediction_table(metrics, split)
    return table.pivot(index="seed", columns="track_id", values="correct").astype(float)


def clip_table(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return the ``genre`` and ``artist`` of each track, in the order of the columns of `correct_matrix`."""
    table = pd.DataFrame({"genre": metrics["labels"][split], "artist": metrics["artists"][split]})
    return table.set_axis(table.index.astype(int)).sort_index().rename_axis("track_id")


def effective_artists(artists: Sequence[int]) -> float:
    """Return how many artists with equally many clips would be as good as these: n² / Σ nᵢ².

    It is L. Kish's effective sample size ("Survey Sampling", 1965) for clips that are alike within an artist.
    """
    sizes = np.unique(artists, return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def genre_report(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return precision, recall and F1 by genre, averaged over the seeds (scikit-learn's report)."""
    reports = []
    for _, table in prediction_table(metrics, split).groupby("seed"):
        report = classification_report(
            table["genre"], table["predicted"], labels=metrics["genres"], output_dict=True, zero_division=0.0
        )
        reports.append(pd.DataFrame(report).T.loc[metrics["genres"]])
    return sum(reports[1:], start=reports[0]) / len(reports)


def result_summary(found: dict[str, Metrics], splits: Sequence[str] = EVALUATION_SPLITS) -> pd.DataFrame:
    """Return a row per model, as texts to show; scores are mean ± standard deviation over seeds."""
    return pd.DataFrame([_summary_row(name, metrics, splits) for name, metrics in found.items()])


def _summary_row(name: str, metrics: Metrics, splits: Sequence[str]) -> dict[str, str]:
    row, seeds = {"model": name}, metrics["seeds"]
    for split in [split for split in splits if split in metrics["labels"]]:
        for shown, score in SCORES.items():
            row[f"{split} {shown}"] = _mean_and_spread([result[split][score] for result in seeds])
    seconds = np.mean([result["seconds"] for result in seeds])
    row |= {"parameters": f"{metrics['n_parameters']:,}", "seeds": str(len(seeds))}
    return row | {"seconds a seed": f"{seconds:.0f}"}


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return ``+0.083 [+0.021, +0.146]``."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap_accuracy(
    correct: pd.DataFrame, artists: Sequence[int], genres: Sequence[str] | None = None
) -> Estimate:
    """Estimate accuracy with a percentile cluster bootstrap over artists and, if there are several, seeds.

    ``correct`` [shape=(n_seeds, n_tracks)] is from `correct_matrix`; tracks of one of the ``artists``
    [shape=(n_tracks,)] are drawn together. With ``genres`` [shape=(n_tracks,)] it is the artist-balanced
    accuracy: artists count equally within a genre, genres equally.
    """
    rng = np.random.default_rng(0)
    drawn = _draw(len(set(artists)), N_RESAMPLES, rng)
    resampled = _seeds_drawn(_accuracies(correct, artists, genres, drawn), rng)
    return _estimate(_accuracy(correct, artists, genres), resampled)


def paired_difference(
    correct: pd.DataFrame,
    baseline: pd.DataFrame,
    artists: Sequence[int],
    genres: Sequence[str] | None = None,
    *,
    same_networks: bool = False,
) -> Estimate:
    """Estimate how much more accurate one model is than another on the same tracks, see `bootstrap_accuracy`.

    ``correct`` is the model in question, ``baseline`` the one to compare it with [shape=(n_seeds, n_tracks)].
    Each resample draws artists, the same for both models, and seeds. With ``same_networks`` row i of both is
    the same trained network under two conditions: seeds are drawn for both at once. Raises `FmaNbError` when
    the two were not evaluated on the same tracks.
    """
    if list(correct.columns) != list(baseline.columns):
        raise FmaNbError("a paired comparison needs predictions for the same tracks, in one order.")
    rng = np.random.default_rng(0)
    drawn = _draw(len(set(artists)), N_RESAMPLES, rng)
    ours, theirs = (_accuracies(matrix, artists, genres, drawn) for matrix in (correct, baseline))
    if same_networks:
        resampled = _seeds_drawn(ours - theirs, rng)
    else:
        resampled = _seeds_drawn(ours, rng) - _seeds_drawn(theirs, rng)
    value = _accuracy(correct, artists, genres) - _accuracy(baseline, artists, genres)
    return _estimate(value, resampled)


def _draw(n: int, n_resamples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw n of n with replacement; return how often each was drawn [shape=(n_resamples, n)]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)


def _accuracies(
    correct: pd.DataFrame, artists: Sequence[int], genres: Sequence[str] | None, drawn: npt.NDArray[np.int64]
) -> Floats:
    """Return each seed's accuracy [shape=(n_resamples, n_seeds)] when artists are drawn that often.

    A genre of which no artist is drawn does not count in that resample.
    """
    names, artist = np.unique(artists, return_inverse=True)
    genre = np.zeros_like(artist) if genres is None else np.unique(genres, return_inverse=True)[1]
    answers = np.vstack([correct.to_numpy(), np.ones(len(artist))])  # the last row counts the clips
    shape = len(names), int(genre.max()) + 1
    cells = np.ravel_multi_index((artist, genre), shape)
    sums = np.stack([np.bincount(cells, row, shape[0] * shape[1]).reshape(shape) for row in answers])
    if genres is not None:
        sums = sums / np.maximum(sums[-1], 1)  # the mean over an artist's clips of a genre
    totals = np.tensordot(drawn, sums, axes=(1, 1))  # (n_resamples, n_seeds + 1, n_genres)
    with np.errstate(invalid="ignore"):
        means: Floats = np.nanmean(totals[:, :-1] / totals[:, -1:], axis=2)
    return means


def _accuracy(correct: pd.DataFrame, artists: Sequence[int], genres: Sequence[str] | None) -> float:
    once = np.ones((1, len(set(artists))), dtype=np.int64)
    return float(_accuracies(correct, artists, genres, once).mean())


def _seeds_drawn(accuracies: Floats, rng: np.random.Generator) -> Floats:
    """Average the accuracies [shape=(n_resamples, n_seeds)] over as many seeds, drawn with replacement."""
    n_seeds = accuracies.shape[1]
    means: Floats = (accuracies * _draw(n_seeds, len(accuracies), rng)).sum(axis=1) / n_seeds
    return means


def _estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


@dataclass(frozen=True)
class McNemar:
    """Clips on which two models differ, and how surprising the imbalance would be by luck alone."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: npt.ArrayLike, second: npt.ArrayLike) -> McNemar:
    """Compare two models' right (1) and wrong (0) answers with McNemar's exact test.

    Both have the shape (n_clips,). Only clips that exactly one model gets right count. Clips are taken as
    independent: where an artist has several, p is too small. Notebook 05 tosses one coin an artist instead.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise FmaNbError(f"McNemar's test needs answers to the same clips, not {a.size} and {b.size}.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    n_different = only_first + only_second
    p = scipy.stats.binomtest(only_first, n_different).pvalue if n_different else 1.0
    return McNemar(only_first, only_second, float(p))
