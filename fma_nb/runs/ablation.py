"""The ablation: the final recipe with every ingredient taken out in turn, and its cross-validation.

Each row is a recipe that differs from the final recipe in one thing, trained with several seeds
and evaluated on validation. Finished trainings are never repeated, so the table grows row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from fma_nb.dataset import Pack, Split
from fma_nb.evaluation import Metrics, correct_matrix, paired_difference, result_table
from fma_nb.metadata import artist_groups
from fma_nb.project import FmaNbError, atomic_path, run_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.experiment import read_metrics, train_and_evaluate

FINAL = "final"
ROWS: dict[str, dict[str, Any]] = {
    FINAL: {},
    # The question of the course.
    "no_gru": {"model": "crnn_no_gru"},
    "lstm": {"model": "crnn_lstm"},
    "one_way": {"model": "crnn_one_way"},
    "shuffled": {"model": "crnn_shuffled"},
    # One ingredient less.
    "no_time_shift": {"time_shift": False},
    "no_stretch": {"stretch": 0.0},
    "no_mel_shift": {"mel_shift": 0},
    "no_gain": {"gain": 0.0},
    "no_warp": {"stretch": 0.0, "mel_shift": 0, "gain": 0.0},
    "no_masks": {"freq_mask": 0.0, "time_mask": 0.0},
    "no_label_smoothing": {"label_smoothing": 0.0},
    "no_weight_decay": {"weight_decay": 0.0},
    "no_schedule": {"warmup": None},
    "no_muon": {"optimizer": "adamw"},
    "no_ema": {"ema": 0.0},
    "no_dropout": {"dropout": 0.0},
    "mean_pooling": {"pooling": "mean"},
    "no_band_norm": {"band_norm": False},
    # One ingredient more.
    "mixup": {"mixup": 0.3},
    # Architecture and recipe apart.
    "baseline_with_recipe": {"model": "baseline"},
}
# The final recipe in half its epochs, and the baseline with its own plain recipe.
SHORTER, BASELINE = "shorter", "baseline"
ALL_ROWS = (*ROWS, SHORTER, BASELINE)
CSV_COLUMNS = [
    *("row", "model", "seed", "epochs", "best_epoch", "val_accuracy", "val_macro_f1", "last_val_accuracy"),
    *("parameters", "seconds", "device", "date"),
]


def row_recipe(row: str, base: Recipe) -> Recipe:
    """Return a row's recipe: a change of the final recipe ``base``, or the baseline's own."""
    if row not in ALL_ROWS:
        raise FmaNbError(f"--rows {row}: choose among {', '.join(ALL_ROWS)}.")
    if row == BASELINE:
        return default_recipe("baseline")
    return replace(base, **(ROWS | {SHORTER: {"epochs": max(1, base.epochs // 2)}})[row])


def run_ablation(
    pack: Pack, run: str, rows: Sequence[str], base: Recipe, n_seeds: int, device: torch.device
) -> Path:
    """Train and evaluate rows on validation; write ``ablation.csv``, a line a training, after each row."""
    for row, recipe in {row: row_recipe(row, base) for row in rows}.items():
        print(f"{row}:", flush=True)
        train_and_evaluate(recipe, pack, _row_run(run, row), device, n_seeds=n_seeds)
        write_csv(run)
    return write_csv(run)


def _row_run(run: str, row: str) -> str:
    return f"{run}/ablation/{row}"


def finished_rows(run: str) -> dict[str, Metrics]:
    """Read the metrics of every row of a run that is finished, in the order of `ALL_ROWS`."""
    found = {}
    for row in ALL_ROWS:
        paths = list((run_dir(_row_run(run, row)) / "metrics").glob("*.json"))
        if paths:
            model = paths[0].stem
            found[row] = read_metrics(_row_run(run, row), [model])[model]
    return found


def write_csv(run: str) -> Path:
    """Write ``outputs/<run>/ablation.csv`` from the metrics of the finished rows."""
    lines = [
        {"row": row, "parameters": metrics["n_parameters"], **metrics, **result}
        | {f"val_{score}": result["val"][score] for score in ("accuracy", "macro_f1")}
        for row, metrics in finished_rows(run).items()
        for result in metrics["seeds"]
    ]
    return _write_table(run_dir(run) / "ablation.csv", pd.DataFrame(lines, columns=CSV_COLUMNS).round(5))


def _write_table(path: Path, table: pd.DataFrame) -> Path:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def ablation_table(run: str) -> pd.DataFrame:
    """Compare every finished row of a run with the final recipe, on the same validation tracks.

    Rows made from other data, or as changes of another recipe than the run's ``final``, are left out, and
    a line says so.

    Returns
    -------
    table
        ``row, seeds, epochs, val_mean, val_std, last_mean, difference, low, high``. The first means are of
        each seed's best epoch, which was chosen on these tracks; ``last_mean`` of its last one. The interval
        is the 95 % one of `fma_nb.evaluation.paired_difference`. Empty without the final recipe.
    """
    found = finished_rows(run)
    if FINAL not in found:
        return pd.DataFrame()
    kept = {row: metrics for row, metrics in found.items() if _belongs(row, metrics, found[FINAL])}
    if len(kept) < len(found):
        others = ", ".join(row for row in found if row not in kept)
        print(f"Left out, made from other data or with another recipe: {others}")
    final = correct_matrix(found[FINAL], "val")
    groups = artist_groups(found[FINAL]["dataset"], list(final.columns))
    table = result_table(kept)[["model", "seeds", "val_accuracy", "val_std"]]
    table.columns = pd.Index(["row", "seeds", "val_mean", "val_std"])
    table.insert(2, "epochs", [metrics["config"]["epochs"] for metrics in kept.values()])
    lasts = [[result["last_val_accuracy"] for result in metrics["seeds"]] for metrics in kept.values()]
    table["last_mean"] = [float(np.mean(accuracies)) for accuracies in lasts]
    gaps = [paired_difference(correct_matrix(metrics, "val"), final, groups) for metrics in kept.values()]
    table[["difference", "low", "high"]] = [[gap.value, gap.low, gap.high] for gap in gaps]
    table.loc[table["row"] == FINAL, ["difference", "low", "high"]] = np.nan
    return table


def _belongs(row: str, metrics: Metrics, final: Metrics) -> bool:
    """Tell whether a row is a change of this final recipe, on the same data."""
    try:
        wanted = asdict(row_recipe(row, Recipe(**final["config"])))
    except (TypeError, FmaNbError):  # of another version of this project
        return False
    config = metrics["config"] | {"seed": wanted["seed"]}
    return bool(config == wanted and metrics["fingerprint"] == final["fingerprint"])


def folds(pack: Pack, n_folds: int) -> Iterator[Pack]:
    """Cut the training split into folds; yield packs whose validation is one fold each.

    Folds are balanced by genre and tear no group of `fma_nb.metadata.artist_groups` apart. The official
    validation split is not touched: what comes out is an estimate that no epoch was chosen on.

    Raises
    ------
    FmaNbError
        When there are fewer than two folds, or fewer artists than folds.
    """
    if n_folds < 2:
        raise FmaNbError(f"--folds {n_folds} must be at least 2.")
    train = pack.split("train")
    groups = artist_groups(pack.dataset, train.track_ids.tolist())
    if len(set(groups)) < n_folds:
        raise FmaNbError(f"--folds {n_folds}: the training split has only {len(set(groups))} artist(s).")
    cutter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    for i, (kept, held_out) in enumerate(cutter.split(train.track_ids, train.labels, groups)):
        splits = {name: _part(train, chosen) for name, chosen in (("train", kept), ("val", held_out))}
        yield replace(pack, fingerprint=f"{pack.fingerprint}/fold {i + 1} of {n_folds}", splits=splits)


def _part(split: Split, chosen: np.ndarray[Any, Any]) -> Split:
    return Split(split.images[chosen], split.labels[chosen], split.track_ids[chosen])


def cross_validate(pack: Pack, run: str, recipe: Recipe, n_folds: int, device: torch.device) -> list[float]:
    """Train a recipe once for each fold of the training split; write ``folds.csv``, a line a fold.

    Returns the accuracy on each fold after the last epoch: the best one would have been chosen on the fold
    itself.
    """
    lines: list[dict[str, Any]] = []
    for i, fold in enumerate(folds(pack, n_folds), 1):
        print(f"fold {i} of {n_folds}:", flush=True)
        metrics = train_and_evaluate(recipe, fold, _row_run(run, f"fold{i}of{n_folds}"), device)
        line = {
            "fold": i,
            "folds": n_folds,
            "model": recipe.model,
            "seed": recipe.seed,
            "epochs": metrics["seeds"][0]["epochs"],
            "train_clips": len(fold.split("train")),
            "held_out_clips": len(fold.split("val")),
            "accuracy": round(metrics["seeds"][0]["last_val_accuracy"], 5),
            "device": metrics["device"],
            "date": metrics["date"],
        }
        lines.append(line)
        _write_table(run_dir(run) / "folds.csv", pd.DataFrame(lines))
    return [line["accuracy"] for line in lines]
