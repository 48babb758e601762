"""Tables of several models' metrics: accuracies with intervals, paired differences, and answers by track."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fma_nb import evaluation
from fma_nb.evaluation import Estimate, Metrics
from fma_nb.project import atomic_path


def comparison_table(found: dict[str, Metrics], reference: str, split: str) -> pd.DataFrame:
    """Compare models with a reference among them, on the same tracks; return a line per model.

    Columns are ``row, seeds``; ``accuracy`` and ``balanced_accuracy``, with artists weighted equally; their
    ``difference`` and ``balanced_difference`` from the reference; all with the 95 % interval of
    `fma_nb.evaluation` in ``…_low`` and ``…_high``; and the accuracies' ``spread``, the standard deviation
    over seeds, or of pooled folds the standard error over the folds.
    """
    clips = evaluation.clip_table(found[reference], split)
    artists, genres = clips["artist"].tolist(), clips["genre"].tolist()
    balanced = "balanced_", "artist_balanced_accuracy", genres
    theirs, lines = evaluation.correct_matrix(found[reference], split), []
    for row, metrics in found.items():
        line: dict[str, Any] = {"row": row, "seeds": len(metrics["seeds"])}
        ours = evaluation.correct_matrix(metrics, split)
        for prefix, score, weights in (("", "accuracy", None), balanced):
            line |= _columns(f"{prefix}accuracy", evaluation.bootstrap_accuracy(ours, artists, weights))
            line[f"{prefix}spread"] = _spread(metrics, split, score)
            gap = evaluation.paired_difference(ours, theirs, artists, weights)
            line |= _columns(f"{prefix}difference", Estimate(*[np.nan] * 3) if row == reference else gap)
        lines.append(line)
    return pd.DataFrame(lines)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _spread(metrics: Metrics, split: str, score: str) -> float:
    if "folds" in metrics:
        folds = [np.mean([result[score] for result in results]) for results in metrics["folds"]]
        return float(np.std(folds, ddof=1) / len(folds) ** 0.5)
    scores = [result[split][score] for result in metrics["seeds"]]
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else np.nan


def answer_table(found: dict[str, Metrics], split: str) -> pd.DataFrame:
    """Return a line per track: its id, and for each model and seed the number of the genre it answered."""
    answers = {}
    for row, metrics in found.items():
        for result in metrics["seeds"]:
            name = row if len(metrics["seeds"]) == 1 else f"{row}_seed{result['seed']}"
            predictions = result[split]["predictions"].items()
            answers[name] = {int(i): metrics["genres"].index(genre) for i, genre in predictions}
    return pd.DataFrame(answers).sort_index().rename_axis("track_id").reset_index()


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a table as a CSV file, numbers with five digits after the point."""
    with atomic_path(path) as temporary:
        table.round(5).to_csv(temporary, index=False)
    return path
