"""``fma-nb evaluate``: trained models on a split, each with its intervals, as text and as CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack
from fma_nb.evaluation import (
    Metrics,
    bootstrap_accuracy,
    clip_table,
    correct_matrix,
    effective_artists,
    evaluate_split,
    genre_report,
    split_scores,
)
from fma_nb.project import SHIPPED_WEIGHTS, SYNTHETIC_DATASETS, FmaNbError, run_dir
from fma_nb.runs.ablation import FINAL, read_row, row_run
from fma_nb.runs.checkpoint import load_checkpoint, load_model
from fma_nb.runs.experiment import metrics_path, read_metrics, split_facts, trained_models
from fma_nb.runs.tables import answer_table, comparison_table, write_table
from fma_nb.training import resolve_device

SHIPPED, MEAN = "shipped", "final_mean"


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
        metrics = _shipped(pack, split, device)
    else:
        metrics = _trained(read_metrics(run, [model])[model], run, pack, split, device)
    what = f"{model} (the weights of the package)" if shipped else model
    return f"{what} on {dataset} ({preset}), {split}: {_evaluation_text(metrics, pack, split)}"


def _trained(metrics: Metrics, run: str, pack: Pack, split: str, device: torch.device) -> Metrics:
    networks = trained_models(run, metrics["model"], pack, device)
    bfloat16, seeds = bool(metrics["config"]["bfloat16"]), [result["seed"] for result in metrics["seeds"]]
    return _evaluated(dict(zip(seeds, networks, strict=True)), pack, split, device, bfloat16)


def _shipped(pack: Pack, split: str, device: torch.device) -> Metrics:
    config = load_checkpoint(SHIPPED_WEIGHTS)["config"]
    network = load_model(SHIPPED_WEIGHTS, config["model"], pack, device)
    return _evaluated({config["seed"]: network}, pack, split, device, bool(config["bfloat16"]))


def _evaluated(
    networks: dict[int, nn.Module], pack: Pack, split: str, device: torch.device, bfloat16: bool
) -> Metrics:
    seeds = [
        {"seed": seed, split: evaluate_split(network, pack, split, device, bfloat16)}
        for seed, network in networks.items()
    ]
    return {"genres": list(pack.genres), "seeds": seeds} | split_facts(pack, [split])


def _evaluation_text(metrics: Metrics, pack: Pack, split: str) -> str:
    correct, clips = correct_matrix(metrics, split), clip_table(metrics, split)
    artists, results = clips["artist"].tolist(), [seed[split] for seed in metrics["seeds"]]
    known = max(artists) >= 0  # an unknown artist has a negative number
    groups = "artists" if known else "clips"
    drawn = f"{groups} and seeds" if len(results) > 1 else f"{groups}, of this one network"
    hint = "" if known else "; for artists get the metadata with 'fma-nb download metadata'"
    many = f" by {len(set(artists))} artists, who count as {effective_artists(artists):.0f}" if known else ""
    synthetic = "synthetic " * (pack.dataset in SYNTHETIC_DATASETS)
    lines = [f"{len(clips)} {synthetic}clips{many}, {len(results)} seed(s)"]
    for name, genres in (("accuracy", None), ("artist-balanced accuracy", clips["genre"].tolist())):
        estimate = bootstrap_accuracy(correct, artists, genres)
        lines.append(f"{name}  {estimate.value:.4f}")
        lines.append(f"  95 % interval  {estimate.low:.4f} to {estimate.high:.4f}, over {drawn}{hint}")
    lines.append(f"macro-F1  {np.mean([result['macro_f1'] for result in results]):.4f}")
    recall = genre_report(metrics, split)["recall"]
    return "\n".join([*lines, "recall by genre:", *(f"  {g:<14}{value:.3f}" for g, value in recall.items())])


def evaluate_rows(
    run: str, rows: Sequence[str], dataset: str, preset: str, split: str, device_name: str
) -> list[Path]:
    """Evaluate every seed of rows of an ablation on a split, and the weights of the package.

    The mean of the probabilities of the final recipe's seeds is a row of its own, ``final_mean``.

    Returns
    -------
    paths
        In the run's folder ``evaluation_<split>.csv``, a line a network; ``evaluation_<split>_table.csv``, a
        line a row with its intervals, and its paired difference from ``final``; and
        ``evaluation_<split>_answers.csv``, the answers by track.

    Raises
    ------
    FmaNbError
        When a row was not trained, or the split or the device is not there.
    """
    device = resolve_device(device_name)
    pack = load_pack(dataset, preset, needed=[split])
    found = {}
    for row in dict.fromkeys([FINAL, *rows]):
        if not (trained := read_row(run, row)):
            raise FmaNbError(f"{run_dir(run)} holds no finished row {row!r}: train it with 'fma-nb ablate'.")
        found[row] = _trained(trained[0], row_run(run, row), pack, split, device)
    found[MEAN] = _mean_of_seeds(found[FINAL], split)
    found[SHIPPED] = _shipped(pack, split, device)
    tables = {
        "": pd.DataFrame([_line(row, seed, m, split) for row, m in found.items() for seed in m["seeds"]]),
        "_table": comparison_table(found, FINAL, split),
        "_answers": answer_table(found, split),
    }
    folder = run_dir(run)
    return [write_table(folder / f"evaluation_{split}{name}.csv", table) for name, table in tables.items()]


def _line(row: str, result: dict[str, Any], metrics: Metrics, split: str) -> dict[str, Any]:
    recall = genre_report(metrics | {"seeds": [result]}, split)["recall"]
    scores = {name: score for name, score in result[split].items() if isinstance(score, float)}
    facts = {"row": row, "seed": result["seed"], "split": split, "clips": len(metrics["labels"][split])}
    return facts | scores | {f"recall_{genre}": value for genre, value in recall.items()}


def _mean_of_seeds(metrics: Metrics, split: str) -> Metrics:
    """Return the answers that the mean of the seeds' probabilities gives, as those of one network."""
    labels, genres = metrics["labels"][split], metrics["genres"]
    each = [[result[split]["probabilities"][i] for i in labels] for result in metrics["seeds"]]
    probabilities = np.mean(each, axis=0)
    answers = [genres[best] for best in probabilities.argmax(axis=1)]
    artists = list(metrics["artists"][split].values())
    result: dict[str, Any] = {
        "predictions": dict(zip(labels, answers, strict=True)),
        "probabilities": dict(zip(labels, probabilities.tolist(), strict=True)),
    }
    scores = split_scores(list(labels.values()), answers, artists)
    return metrics | {"seeds": [{"seed": "mean", split: result | scores}]}
