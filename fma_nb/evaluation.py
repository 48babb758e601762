"""Stage 7, evaluation: from checkpoints to metrics files, and from those to honest comparisons.

A metrics file holds every seed's predictions by track id, so that models can be compared clip by clip
without training anything again. Notebook 05 works through the statistics step by step.

References
----------
Q. McNemar: "Note on the sampling error of the difference between correlated proportions", 1947.
T. G. Dietterich: "Approximate Statistical Tests for Comparing Supervised Classification Learning
Algorithms", Neural Computation 1998 (why McNemar's test).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, classification_report, f1_score
from torch import nn

from fma_nb.dataset import Pack, SpectrogramDataset, load_pack, make_loader
from fma_nb.metadata import read_tracks
from fma_nb.model import build_model, count_parameters
from fma_nb.project import SYNTHETIC_DATASETS, FmaNbError, atomic_path, metadata_dir, run_dir
from fma_nb.recipe import TrainConfig, seeds
from fma_nb.training import (
    fit,
    load_checkpoint,
    load_model,
    predict_logits,
    read_log,
    resolve_device,
    run_files,
)

Floats = npt.NDArray[np.float64]
Metrics = dict[str, Any]

EVALUATION_SPLITS = ("val", "test")
SHIPPED_WEIGHTS = Path(__file__).resolve().parent / "weights" / "crnn.pt"
# Largest difference between the ids of two tracks that are taken for one artist's; see `artist_groups`.
NEIGHBOUR_GAP = 3
METRICS_KEYS = ("model", "dataset", "preset", "genres", "fingerprint", "config", "labels", "seeds")


def train_and_evaluate(
    config: TrainConfig,
    pack: Pack,
    run: str,
    device: torch.device,
    *,
    n_seeds: int = 1,
    evaluation_split: str = "val",
    progress: bool = True,
) -> Metrics:
    """Train a model with several seeds, evaluate each best checkpoint, and write the metrics file.

    Everything is checked before the first epoch. What an earlier call finished is not trained again.

    Parameters
    ----------
    config
        The recipe; its seed is the first of ``n_seeds`` consecutive ones.
    evaluation_split
        ``val`` evaluates on validation only; ``test`` adds the test split.

    Raises
    ------
    FmaNbError
        When a parameter or a split cannot work.
    """
    splits = evaluation_splits(pack, evaluation_split)
    configs = list(seeds(config, n_seeds))
    for one in configs:
        fit(one, pack, run_files(run, one.model, one.seed, config.seed), device, progress=progress)
    metrics = _circumstances(config, pack, device) | {
        "labels": {split: _labels(pack, split) for split in splits},
        "seeds": [_seed_result(one, pack, run, config.seed, splits, device) for one in configs],
    }
    write_metrics(metrics_path(run, config.model), metrics)
    return metrics


def _circumstances(config: TrainConfig, pack: Pack, device: torch.device) -> Metrics:
    n_mels, n_frames = pack.splits["train"].images.shape[1:]
    network = build_model(config.model, len(pack.genres), n_mels, n_frames, **config.architecture())
    return {
        "model": config.model,
        "dataset": pack.dataset,
        "synthetic": pack.dataset in SYNTHETIC_DATASETS,
        "preset": pack.preset,
        "genres": list(pack.genres),
        "fingerprint": pack.fingerprint,
        "n_parameters": count_parameters(network),
        "config": asdict(config),
        "device": device_name(device),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def chosen_split(dataset: str, evaluation_split: str) -> str:
    """Return ``val`` or ``test``.

    An empty choice means test for a synthetic dataset and val for a real one, whose test split is opened on
    purpose or not at all.

    Raises
    ------
    FmaNbError
        When the choice is another one.
    """
    if evaluation_split not in ("", *EVALUATION_SPLITS):
        raise FmaNbError(f"evaluation_split={evaluation_split!r} is unknown: choose val or test.")
    return evaluation_split or ("test" if dataset in SYNTHETIC_DATASETS else "val")


def evaluation_splits(pack: Pack, evaluation_split: str) -> tuple[str, ...]:
    """Return the splits to evaluate on, or raise `FmaNbError` when one is unknown or empty."""
    splits = ("val",) if chosen_split(pack.dataset, evaluation_split) == "val" else ("val", "test")
    for split in splits:
        pack.split(split)
    return splits


def _seed_result(
    config: TrainConfig, pack: Pack, run: str, first_seed: int, splits: Sequence[str], device: torch.device
) -> dict[str, Any]:
    files = run_files(run, config.model, config.seed, first_seed)
    model = load_model(files.best, config.model, pack, device)
    log = read_log(files.log, [config.seed])
    return {
        "seed": config.seed,
        "epochs": len(log),
        "best_epoch": load_checkpoint(files.best)["epoch"] + 1,
        "last_val_accuracy": float(log["val_accuracy"].iloc[-1]),
        "seconds": round(float(log["seconds"].sum()), 1),
    } | {split: evaluate(model, pack, split, device, config.bfloat16) for split in splits}


def evaluate(
    model: nn.Module, pack: Pack, split: str, device: torch.device, bfloat16: bool = True
) -> dict[str, Any]:
    """Evaluate a model on a split: accuracy, macro-F1, and each track's probabilities and genre."""
    clips = pack.split(split)
    loader = make_loader(SpectrogramDataset(clips, device), 256)
    logits, labels = predict_logits(model, loader, device, bfloat16)
    probabilities = logits.softmax(1).numpy()
    predicted = probabilities.argmax(1)
    ids = [str(track_id) for track_id in clips.track_ids]
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "predictions": {i: pack.genres[p] for i, p in zip(ids, predicted, strict=True)},
        "probabilities": {
            i: [round(float(p), 4) for p in row] for i, row in zip(ids, probabilities, strict=True)
        },
    }


def _labels(pack: Pack, split: str) -> dict[str, str]:
    clips = pack.split(split)
    return {
        str(track_id): pack.genres[label]
        for track_id, label in zip(clips.track_ids, clips.labels, strict=True)
    }


def device_name(device: torch.device) -> str:
    """Return a name for the result table: the GPU's, or the number of CPU threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def metrics_path(run: str, model: str) -> Path:
    """Return where a model's metrics file lies in a run folder."""
    return run_dir(run) / "metrics" / f"{model}.json"


def write_metrics(path: Path, metrics: Metrics) -> None:
    """Write a metrics file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")


def read_metrics(run: str, models: Sequence[str]) -> dict[str, Metrics]:
    """Read the metrics files of a run, and check that they speak of the same data.

    Raises
    ------
    FmaNbError
        When a file is missing or damaged, or two were made from different data, genres or splits.
    """
    if not models:
        raise FmaNbError("read_metrics needs the name of at least one model.")
    found = {model: _read_one(metrics_path(run, model), model) for model in models}
    first = found[models[0]]
    for model, metrics in found.items():
        for key in ("dataset", "preset", "genres", "fingerprint", "labels"):
            if metrics[key] != first[key]:
                raise FmaNbError(
                    f"{metrics_path(run, model)} was made with another {key} than that of "
                    f"{models[0]}: run notebooks 03 and 04 again with the same parameters."
                )
    return found


def _read_one(path: Path, model: str) -> Metrics:
    try:
        metrics: Metrics = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FmaNbError(f"{path} is missing: run notebooks 03 and 04 first.") from error
    except ValueError as error:
        raise FmaNbError(f"{path} is damaged: run notebooks 03 and 04 again.") from error
    if not isinstance(metrics, dict) or not set(METRICS_KEYS) <= metrics.keys() or not metrics["seeds"]:
        raise FmaNbError(f"{path} is not a metrics file: run notebooks 03 and 04 again.")
    if "last_val_accuracy" not in metrics["seeds"][0]:
        raise FmaNbError(f"{path} was made by another version of this project: remove it and run again.")
    if metrics["model"] != model:
        raise FmaNbError(f"{path} speaks of model {metrics['model']!r}, not {model!r}.")
    return metrics


def prediction_table(metrics: Metrics, split: str) -> pd.DataFrame:
    """Return one row a seed and track: ``seed, track_id, genre, predicted, confidence, correct``."""
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
    """Return which tracks each seed got right: a row a seed, a column a track id, 0 or 1."""
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
    """Return one row a model: parameters, seeds, accuracy (mean ± std over seeds), macro-F1, seconds."""
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
    """Return `result_table` as texts to show: one row a model, accuracies as ``0.701 ± 0.012``."""
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


def artists_known(dataset: str) -> bool:
    """Tell whether the metadata that names each track's artist is at hand."""
    return (metadata_dir(dataset) / "tracks.csv").exists()


def artist_groups(dataset: str, track_ids: Sequence[int]) -> list[int]:
    """Return the artist of each track, or a guess at it where the metadata is not at hand.

    Tracks of one artist tend to be right or wrong together; intervals that ignore this are too narrow.
    FMA numbers the tracks of an album one after another. So the guess is that neighbours by number share
    the artist: of the first tracks of FMA-Small that follow each other within `NEIGHBOUR_GAP` 89 % do, and
    89 % of those that do are found that way (58 tracks). Denser subsets were not checked, and an artist's
    other albums are missed.
    """
    if not artists_known(dataset):
        return _runs_of_neighbours(np.asarray(track_ids))
    artists = read_tracks(metadata_dir(dataset) / "tracks.csv")["artist", "id"]
    return [int(artists.get(track_id, -track_id)) for track_id in track_ids]


def _runs_of_neighbours(track_ids: npt.NDArray[np.int64]) -> list[int]:
    """Return the first track id of the run of neighbours that each track belongs to."""
    ordered = np.sort(track_ids)
    starts = ordered[np.diff(ordered, prepend=-NEIGHBOUR_GAP - 1) > NEIGHBOUR_GAP]
    runs: list[int] = starts[np.searchsorted(starts, track_ids, side="right") - 1].tolist()
    return runs


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

    Each resample draws the same tracks for both models, by group, and seeds for each on its own; or the
    same seeds for both, where rows of equal number are the same trained network under two conditions.

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
    names, members = np.unique(groups, return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    weights = counts[:, members].astype(float)
    shares: Floats = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _resampled_means(correct: pd.DataFrame, tracks: Floats, rng: np.random.Generator) -> Floats:
    n_seeds = len(correct)
    seeds_drawn = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=len(tracks)) / n_seeds
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

    Only the clips that exactly one model gets right carry information; if the models were equally
    good, each would win such a clip with probability one half.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise FmaNbError(f"McNemar's test needs answers to the same clips, not {a.size} and {b.size}.")
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    n_different = only_first + only_second
    p = scipy.stats.binomtest(only_first, n_different).pvalue if n_different else 1.0
    return McNemar(only_first, only_second, float(p))


def trained_models(run: str, model: str, pack: Pack, device: torch.device) -> Iterator[nn.Module]:
    """Yield the best checkpoint of every seed of a model, in the order of the seeds."""
    metrics = _read_one(metrics_path(run, model), model)
    first_seed = metrics["config"]["seed"]
    for result in metrics["seeds"]:
        files = run_files(run, model, result["seed"], first_seed)
        yield load_model(files.best, model, pack, device)


def evaluate_run(run: str, model: str, dataset: str, preset: str, split: str, device_name: str) -> str:
    """Evaluate every trained seed of a model on a split; return the result as a text table.

    Where the run has no such model, the CRNN that comes with the package is evaluated, and the text says so.

    Raises
    ------
    FmaNbError
        When the run, the split or the device is not there, or the checkpoints do not fit the data.
    """
    device = resolve_device(device_name)
    pack = load_pack(dataset, preset, needed=[split])
    shipped = not metrics_path(run, model).exists() and model == "crnn" and SHIPPED_WEIGHTS.exists()
    if shipped:
        networks: Iterable[nn.Module] = [load_model(SHIPPED_WEIGHTS, model, pack, device)]
        bfloat16 = bool(load_checkpoint(SHIPPED_WEIGHTS)["config"]["bfloat16"])
    else:
        bfloat16 = bool(_read_one(metrics_path(run, model), model)["config"]["bfloat16"])
        networks = trained_models(run, model, pack, device)
    results = [evaluate(network, pack, split, device, bfloat16) for network in networks]
    what = f"{model} (the weights of the package)" if shipped else model
    return f"{what} on {dataset} ({preset}), {split}: {_evaluation_text(results, pack, split)}"


def _evaluation_text(results: Sequence[dict[str, Any]], pack: Pack, split: str) -> str:
    clips = pack.split(split)
    labels = np.array([pack.genres[label] for label in clips.labels])
    predicted = [list(result["predictions"].values()) for result in results]
    correct = pd.DataFrame(np.array(predicted) == labels, columns=clips.track_ids).astype(float)
    interval = bootstrap_accuracy(correct, artist_groups(pack.dataset, clips.track_ids.tolist()))
    recall = correct.T.groupby(labels).mean().mean(axis=1)
    groups = "artists" if artists_known(pack.dataset) else "neighbouring tracks"
    drawn = f"{groups} and seeds" if len(results) > 1 else f"{groups}, of this one network"
    lines = [
        f"{len(clips)} {'synthetic ' * (pack.dataset in SYNTHETIC_DATASETS)}clips, {len(results)} seed(s)",
        f"accuracy  {interval.value:.4f}",
        f"95 % interval  {interval.low:.4f} to {interval.high:.4f}, over {drawn}",
        f"macro-F1  {np.mean([result['macro_f1'] for result in results]):.4f}",
        "recall by genre:",
    ]
    return "\n".join(lines + [f"  {genre:<14}{value:.3f}" for genre, value in recall.items()])
