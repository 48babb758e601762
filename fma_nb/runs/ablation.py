"""The ablation: the final recipe with every ingredient taken out in turn, and its cross-validation.

Each row is a recipe that differs from the final recipe in one thing, trained with several seeds and
evaluated on validation, which holds few artists and unevenly many clips of each. With folds every clip of
train and val is judged once, by a network that has heard no clip of its artist; test is left out.
Finished trainings are never repeated, so the table grows row by row.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.model_selection import StratifiedGroupKFold

from fma_nb.bulk.workers import run_locally, run_on_cluster
from fma_nb.dataset import Pack, Split, open_pack
from fma_nb.evaluation import SCORES, Metrics
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, data_dir, outputs_dir, run_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.experiment import read_metrics, train_and_evaluate
from fma_nb.runs.tables import answer_table, comparison_table, write_table

FINAL, SAME_RECIPE = "final", "baseline_with_recipe"
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
    "more_dropout": {"dropout": 0.5},
    "wider": {"width": 1.5},
    # Architecture and recipe apart.
    SAME_RECIPE: {"model": "baseline"},
}
# The final recipe in half its epochs, and the baseline with its own plain recipe.
SHORTER, BASELINE = "shorter", "baseline"
ALL_ROWS = (*ROWS, SHORTER, BASELINE)
CSV_COLUMNS = [
    *("row", "model", "seed", "epochs", "best_epoch", "val_accuracy", "val_artist_balanced_accuracy"),
    *("val_macro_f1", "last_val_accuracy", "parameters", "seconds", "device", "date"),
]
FOLD_COLUMNS = [
    *("row", "model", "fold", "folds", "seed", "epochs", "held_out_clips", "accuracy"),
    *("artist_balanced_accuracy", "macro_f1", "parameters", "seconds", "device", "date"),
]


def row_recipe(row: str, base: Recipe) -> Recipe:
    """Return a row's recipe: a change of the final recipe ``base``, or the baseline's own."""
    if row not in ALL_ROWS:
        raise FmaNbError(f"--rows {row}: choose among {', '.join(ALL_ROWS)}.")
    if row == BASELINE:
        return default_recipe("baseline")
    return replace(base, **(ROWS | {SHORTER: {"epochs": max(1, base.epochs // 2)}})[row])


def cut_folds(pack: Pack, n_folds: int) -> list[npt.NDArray[np.int64]]:
    """Cut train and val into folds by artist that are balanced by genre; return each fold's track ids.

    They depend on track ids, genres and artists alone. No genre may have fewer artists than there are folds.
    """
    if n_folds < 2:
        raise FmaNbError(f"--folds {n_folds} must be at least 2.")
    clips = _joined(pack)
    clips = clips.take(np.argsort(clips.track_ids))
    for label, genre in enumerate(pack.genres):
        n_artists = len(set(clips.artists[clips.labels == label]))
        if n_artists < n_folds:
            raise FmaNbError(
                f"--folds {n_folds}: {genre} has clips of only {n_artists} artist(s) in train and val: "
                "choose fewer folds."
            )
    cutter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it counts clips
        cuts = list(cutter.split(clips.track_ids, clips.labels, clips.artists))
    return [clips.track_ids[held_out] for _, held_out in cuts]


def _joined(pack: Pack) -> Split:
    parts = [pack.split(name) for name in ("train", "val")]
    fields = ("images", "labels", "track_ids", "artists")
    return Split(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def fold_pack(pack: Pack, held_out: npt.NDArray[np.int64]) -> Pack:
    """Return a pack that trains on all clips of train and val but those of a fold, and validates on these."""
    clips = _joined(pack)
    inside = np.isin(clips.track_ids, held_out)
    splits = {"train": clips.take(~inside), "val": clips.take(inside)}
    content = pack.fingerprint + json.dumps(held_out.tolist())
    return replace(pack, fingerprint=hashlib.sha256(content.encode()).hexdigest(), splits=splits)


def run_ablation(
    pack: Pack,
    run: str,
    rows: Sequence[str],
    base: Recipe,
    device: torch.device,
    *,
    n_seeds: int = 1,
    n_folds: int = 0,
    jobs: int = 1,
    scheduler: str = "",
) -> None:
    """Train and evaluate rows, and write the tables of what is finished after each training.

    Without folds a row trains on the training split, and its best epoch is evaluated on validation. With
    folds it is trained once for each of `cut_folds` and evaluated after its last epoch. Every training runs
    on one thread of a process of its own, so ``jobs``, the number of trainings side by side, changes no
    weight. With ``scheduler`` they are spread over the workers of that Dask scheduler instead.
    """
    run_dir(run)  # refuses a bad name before any process starts
    recipes = {row: row_recipe(row, base) for row in rows}
    if n_seeds < 1 or jobs < 1:
        raise FmaNbError(f"--seeds {n_seeds} and --jobs {jobs} must be at least 1.")
    held_out = cut_folds(pack, n_folds) if n_folds else [np.empty(0, np.int64)]
    folders = {"FMA_NB_DATA": str(data_dir()), "FMA_NB_OUTPUTS": str(outputs_dir())}
    trainings = [
        (recipe, pack.dataset, pack.preset, row_run(run, row, i, n_folds), device, n_seeds, ids, folders)
        for i, ids in enumerate(held_out, 1)
        for row, recipe in recipes.items()
    ]
    if scheduler:
        outcomes = run_on_cluster(train_row, trainings, scheduler, None, one_thread=True)
    else:
        outcomes = run_locally(train_row, trainings, min(jobs, len(trainings)), cpu_limit_s=0)
    with Progress(len(trainings), f"{len(rows)} row(s)", "training") as bar:
        for training, reason in outcomes:
            if reason:
                raise FmaNbError(f"{training[3]}: the process was killed; is there enough memory?")
            bar.update()
            write_csv(run, n_folds)


def train_row(
    recipe: Recipe,
    dataset: str,
    preset: str,
    row_run: str,
    device: torch.device,
    n_seeds: int,
    held_out: npt.NDArray[np.int64],
    folders: dict[str, str],
) -> None:
    """Train and evaluate one row in this process, on a fold when ``held_out`` has its track ids."""
    os.environ.update(folders)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(None):  # the parent has said what there is to say of the pack
        pack = open_pack(dataset, preset)
    if is_fold := len(held_out) > 0:
        pack = fold_pack(pack, held_out)
    train_and_evaluate(recipe, pack, row_run, device, n_seeds=n_seeds, last_epoch=is_fold, progress=False)


def row_run(run: str, row: str, fold: int = 0, n_folds: int = 0) -> str:
    """Return the run folder of a row, or of one of its folds."""
    return f"{run}/ablation/{row}" + (f"_fold{fold}of{n_folds}" if n_folds else "")


def finished_rows(run: str, n_folds: int = 0) -> dict[str, Metrics]:
    """Read the metrics of every finished row of a run, in the order of `ALL_ROWS`; folds are pooled."""
    found = {row: read_row(run, row, n_folds) for row in ALL_ROWS}
    return {row: pooled(metrics) if n_folds else metrics[0] for row, metrics in found.items() if metrics}


def read_row(run: str, row: str, n_folds: int = 0) -> list[Metrics]:
    """Read the metrics of a row's folds, or of its one training; nothing when one is not there yet."""
    runs = [row_run(run, row, i + 1, n_folds) for i in range(n_folds or 1)]
    paths = [path for one in runs for path in (run_dir(one) / "metrics").glob("*.json")]
    models = {path.stem for path in paths}
    if len(paths) < len(runs) or len(models) > 1:
        return []
    found = [read_metrics(one, [model])[model] for one in runs for model in models]
    made = [(metrics["config"], [result["seed"] for result in metrics["seeds"]]) for metrics in found]
    return found if all(one == made[0] for one in made) else []


def pooled(folds: Sequence[Metrics]) -> Metrics:
    """Join the metrics of a recipe's folds as those of one evaluation; ``folds`` keeps those of each."""
    seeds = []
    for results in zip(*(metrics["seeds"] for metrics in folds), strict=True):
        parts = [result["val"] for result in results]
        answers = {name: _union(parts, name) for name in ("predictions", "probabilities")}
        last = float(np.mean([result["last_val_accuracy"] for result in results]))
        seeds.append({"seed": results[0]["seed"], "val": answers, "last_val_accuracy": last})
    return folds[0] | {
        "fingerprint": " ".join(metrics["fingerprint"] for metrics in folds),
        "labels": {"val": _union([metrics["labels"] for metrics in folds], "val")},
        "artists": {"val": _union([metrics["artists"] for metrics in folds], "val")},
        "seeds": seeds,
        "folds": [[result["val"] for result in metrics["seeds"]] for metrics in folds],
    }


def _union(parts: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part[name].items()}


def write_csv(run: str, n_folds: int = 0) -> Path:
    """Write ``ablation.csv`` or ``folds.csv``, a line per training, from the metrics of the finished rows."""
    name, columns, prefix = ("folds", FOLD_COLUMNS, "") if n_folds else ("ablation", CSV_COLUMNS, "val_")
    lines = []
    for row in ALL_ROWS:
        for fold, metrics in enumerate(read_row(run, row, n_folds), 1):
            facts = {"row": row, "parameters": metrics["n_parameters"], "fold": fold, "folds": n_folds}
            facts["held_out_clips"] = len(metrics["labels"]["val"])
            for result in metrics["seeds"]:
                scores = {prefix + score: result["val"][score] for score in SCORES.values()}
                lines.append(facts | metrics | result | scores)
    return write_table(run_dir(run) / f"{name}.csv", pd.DataFrame(lines, columns=columns))


def ablation_table(run: str, n_folds: int = 0) -> pd.DataFrame:
    """Compare every finished row of a run with the final recipe, on the same tracks.

    It is a `comparison_table` with each row's ``epochs``, and ``last``, the accuracy after the last epoch.
    With folds that is ``accuracy``, too, on clips that chose nothing; without them ``accuracy`` is of each
    seed's best epoch, which was chosen on these tracks. Rows made from other data, or as changes of another
    recipe than the run's ``final``, are left out, and a line says so. Without ``final`` the table is empty.
    """
    found = finished_rows(run, n_folds)
    if FINAL not in found:
        return pd.DataFrame()
    kept = {row: metrics for row, metrics in found.items() if _belongs(row, metrics, found[FINAL])}
    if others := [row for row in found if row not in kept]:
        print(f"Left out, made from other data or with another recipe: {', '.join(others)}")
    table = comparison_table(kept, FINAL, "val")
    table.insert(2, "epochs", [metrics["config"]["epochs"] for metrics in kept.values()])
    lasts = [[result["last_val_accuracy"] for result in metrics["seeds"]] for metrics in kept.values()]
    return table.assign(last=[float(np.mean(accuracies)) for accuracies in lasts])


def write_tables(run: str, table: pd.DataFrame, n_folds: int = 0) -> list[Path]:
    """Write a run's `ablation_table`, its CSV of trainings and, of folds, each track's answers."""
    path, tables = write_csv(run, n_folds), {"table": table}
    if n_folds:
        tables["answers"] = answer_table(finished_rows(run, n_folds), "val")
    return [path, *(write_table(path.with_stem(f"{path.stem}_{name}"), one) for name, one in tables.items())]


def _belongs(row: str, metrics: Metrics, final: Metrics) -> bool:
    """Tell whether a row is a change of this final recipe, on the same data."""
    try:
        wanted = asdict(row_recipe(row, Recipe(**final["config"])))
    except (TypeError, FmaNbError):  # of another version of this project
        return False
    config = metrics["config"] | {"seed": wanted["seed"]}
    return bool(config == wanted and metrics["fingerprint"] == final["fingerprint"])
