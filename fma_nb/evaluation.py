"""Stage 8, evaluation: from predictions to honest comparisons: scores, tables and intervals.

Nothing here trains, reads a file or writes one. Metrics are what `fma_nb.runs.experiment` keeps of every
seed, so that models can be compared clip by clip. Notebook 05 works through the statistics step by step.

References
----------
Q. McNemar: "Note on the sampling error of the difference between correlated proportions", 1947.
T. G. Dietterich: "Approximate Statistical Tests for Comparing Supervised Classification Learning
Algorithms", Neural Computation 1998 (why McNemar's test).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, classification_report, f1_score
from torch import nn

from fma_nb.dataset import Pack, SpectrogramDataset, make_loader
from fma_nb.project import FmaNbError
from fma_nb.training import predict_logits

Floats = npt.NDArray[np.float64]
# What is known of one model, as `fma_nb.runs.experiment` keeps it; track ids are texts, as in JSON:
#   {"model": "crnn", "genres": ["Electronic", ...], "n_parameters": 323256, ...,
#    "labels": {"val": {"148": "Experimental", ...}},
#    "seeds": [{"seed": 0, "seconds": 61.2, "val": the result of `evaluate_split`}, ...]}
Metrics = dict[str, Any]

EVALUATION_SPLITS = ("val", "test")


def evaluate_split(
    model: nn.Module, pack: Pack, split: str, device: torch.device, bfloat16: bool = True
) -> dict[str, Any]:
    """Evaluate a model on a split.

    Returns
    -------
    result
        ``accuracy``, ``macro_f1``, and by track id ``predictions`` (a genre) and ``probabilities`` (of each
        genre, rounded to 4 digits).
    """
    clips = pack.split(split)
    loader = make_loader(SpectrogramDataset(clips, device), 256)
    logits, labels = predict_logits(model, loader, bfloat16)
    probabilities = logits.softmax(1).numpy()
    predicted = logits.argmax(1).numpy()
    ids = [str(track_id) for track_id in clips.track_ids]
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "predictions": {i: pack.genres[p] for i, p in zip(ids, predicted, strict=True)},
        "probabilities": {
            i: [round(float(p), 4) for p in row] for i, row in zip(ids, probabilities, strict=True)
        },
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


def genre_report(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return precision, recall and F1 by genre, averaged over the seeds (scikit-learn's report)."""
    reports = []
    for _, table in prediction_table(metrics, split).groupby("seed"):
        report = classification_report(
            table["genre"], table["predicted"], labels=metrics["genres"], output_dict=True, zero_division=0.0
        )
        reports.append(pd.DataFrame(report).T.loc[metrics["genres"]])
    return sum(reports[1:], start=reports[0]) / len(reports)


def result_table(found: dict[str, Metrics]) -> pd.DataFrame:
    """Return one row per model: parameters, seeds, accuracy (mean ± std over seeds), macro-F1, seconds."""
    return pd.DataFrame([_result_row(name, metrics) for name, metrics in found.items()])


def _result_row(name: str, metrics: Metrics) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": name,
        "parameters": metrics["n_parameters"],
        "seeds": len(metrics["seeds"]),
    }
    for split in metrics["labels"]:
        accuracies = [result[split]["accuracy"] for result in metrics["seeds"]]
        row[f"{split}_accuracy"] = float(np.mean(accuracies))
        row[f"{split}_std"] = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else np.nan
        row[f"{split}_macro_f1"] = float(np.mean([result[split]["macro_f1"] for result in metrics["seeds"]]))
    row["seconds"] = float(np.mean([result["seconds"] for result in metrics["seeds"]]))
    return row


def result_summary(found: dict[str, Metrics], splits: Sequence[str] = EVALUATION_SPLITS) -> pd.DataFrame:
    """Return `result_table` as texts to show: one row per model, accuracies as ``0.701 ± 0.012``."""
    return pd.DataFrame([_summary_row(row, splits) for row in result_table(found).to_dict("records")])


def _summary_row(row: dict[str, Any], splits: Sequence[str]) -> dict[str, str]:
    shown = {"model": row["model"]}
    for split in splits:
        if f"{split}_accuracy" in row:
            spread = "" if pd.isna(row[f"{split}_std"]) else f" ± {row[f'{split}_std']:.3f}"
            shown[f"{split} accuracy"] = f"{row[f'{split}_accuracy']:.3f}{spread}"
            shown[f"{split} macro-F1"] = f"{row[f'{split}_macro_f1']:.3f}"
    return shown | {
        "parameters": f"{row['parameters']:,}",
        "seeds": str(row["seeds"]),
        "seconds a seed": f"{row['seconds']:.0f}",
    }


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return ``+0.083 [+0.021, +0.146]``."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bootstrap_accuracy(correct: pd.DataFrame, groups: Sequence[int], *, n_resamples: int = 5000) -> Estimate:
    """Estimate accuracy with a percentile bootstrap over seeds and groups of tracks.

    Parameters
    ----------
    correct [shape=(n_seeds, n_tracks)]
        From `correct_matrix`.
    groups [shape=(n_tracks,)]
        Tracks of one group (an artist) are drawn together.
    """
    rng = np.random.default_rng(0)
    tracks = _resampled_tracks(groups, n_resamples, rng)
    return _estimate(float(correct.to_numpy().mean()), _resampled_means(correct, tracks, rng))


def paired_difference(
    correct: pd.DataFrame,
    baseline: pd.DataFrame,
    groups: Sequence[int],
    *,
    same_networks: bool = False,
    n_resamples: int = 5000,
) -> Estimate:
    """Estimate how much more accurate one model is than another on the same tracks.

    Each resample draws groups of tracks, the same for both models, and seeds.

    Parameters
    ----------
    correct, baseline [shape=(n_seeds, n_tracks)]
        From `correct_matrix`: the model in question, and the one to compare it with.
    groups [shape=(n_tracks,)]
        Tracks of one group (an artist) are drawn together.
    same_networks
        Row i of both is the same trained network under two conditions: seeds are drawn for both at once.

    Raises
    ------
    FmaNbError
        When the two were not evaluated on the same tracks.
    """
    if list(correct.columns) != list(baseline.columns):
        raise FmaNbError("a paired comparison needs predictions for the same tracks, in one order.")
    rng = np.random.default_rng(0)
    tracks = _resampled_tracks(groups, n_resamples, rng)
    if same_networks:
        resampled = _resampled_means(correct - baseline.to_numpy(), tracks, rng)
    else:
        resampled = _resampled_means(correct, tracks, rng) - _resampled_means(baseline, tracks, rng)
    return _estimate(float(correct.to_numpy().mean() - baseline.to_numpy().mean()), resampled)


def _resampled_tracks(groups: Sequence[int], n_resamples: int, rng: np.random.Generator) -> Floats:
    """Draw groups with replacement; return each track's weight [shape=(n_resamples, n_tracks)]."""
    # How often a group is drawn in n draws with replacement is a multinomial count.
    names, members = np.unique(groups, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    weights = counts[:, members].astype(float)
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _resampled_means(correct: pd.DataFrame, tracks: Floats, rng: np.random.Generator) -> Floats:
    n_seeds = len(correct)
    seeds_drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=len(tracks)) / n_seeds
    # r: resample, s: seed, t: track.
    means: Floats = np.einsum("rs,st,rt->r", seeds_drawn, correct.to_numpy(), tracks, optimize=True)
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

    Both have the shape (n_clips,). Only the clips that exactly one model gets right count: of two equal
    models each would win such a clip with probability one half.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise FmaNbError(f"McNemar's test needs answers to the same clips, not {a.size} and {b.size}.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    n_different = only_first + only_second
    p = scipy.stats.binomtest(only_first, n_different).pvalue if n_different else 1.0
    return McNemar(only_first, only_second, float(p))
