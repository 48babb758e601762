"""``fma-nb evaluate``: trained models on a split, each with its intervals, as text and as CSV files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fma_nb import evaluation
from fma_nb.dataset import Pack
from fma_nb.evaluation import Metrics, effective_artists, evaluate_split, genre_report
from fma_nb.project import SHIPPED_WEIGHTS, SYNTHETIC_DATASETS, FmaNbError, run_dir
from fma_nb.runs.ablation import FINAL, read_row, row_run
from fma_nb.runs.checkpoint import load_checkpoint, load_model
from fma_nb.runs.experiment import metrics_path, read_metrics, split_facts, trained_models
from fma_nb.runs.tables import answer_table, comparison_table, write_table


def evaluate_run(run: str, model: str, pack: Pack, split: str, device: torch.device) -> str:
    """Evaluate every trained seed of a model on a split; return the result as a text table.

    Where the run has no such model, the CRNN that comes with the package is evaluated, and the text says so.
    `FmaNbError` when the run or the split is not there, or the checkpoints do not fit the data.
    """
    shipped = model == "crnn" and not metrics_path(run, model).exists() and SHIPPED_WEIGHTS.exists()
    metrics = _evaluated(None if shipped else run, model, pack, split, device)
    what = f"{model} (the weights of the package)" if shipped else model
    return f"{what} on {pack.dataset} ({pack.preset}), {split}: {_evaluation_text(metrics, pack, split)}"


def _evaluated(run: str | None, model: str, pack: Pack, split: str, device: torch.device) -> Metrics:
    """Evaluate every seed of a run's model, or without a run the weights of the package."""
    if run is None:
        config = load_checkpoint(SHIPPED_WEIGHTS)["config"]
        seeds, networks = [config["seed"]], iter([load_model(SHIPPED_WEIGHTS, model, pack, device)])
    else:
        trained = read_metrics(run, [model])[model]
        config, seeds = trained["config"], [result["seed"] for result in trained["seeds"]]
        networks = trained_models(run, model, pack, device)
    results = [
        {"seed": seed, split: evaluate_split(network, pack, split, device, bool(config["bfloat16"]))}
        for seed, network in zip(seeds, networks, strict=True)
    ]
    return {"genres": list(pack.genres), "seeds": results} | split_facts(pack, [split])


def _evaluation_text(metrics: Metrics, pack: Pack, split: str) -> str:
    correct, clips = evaluation.correct_matrix(metrics, split), evaluation.clip_table(metrics, split)
    artists, results = clips["artist"].tolist(), [seed[split] for seed in metrics["seeds"]]
    known = max(artists) >= 0  # an unknown artist has a negative number
    groups = "artists" if known else "clips"
    drawn = f"{groups} and seeds" if len(results) > 1 else f"{groups}, of this one network"
    hint = "" if known else "; for artists get the metadata with 'fma-nb download metadata'"
    many = f" by {len(set(artists))} artists, who count as {effective_artists(artists):.0f}" if known else ""
    synthetic = "synthetic " * (pack.dataset in SYNTHETIC_DATASETS)
    lines = [f"{len(clips)} {synthetic}clips{many}, {len(results)} seed(s)"]
    for name, genres in (("accuracy", None), ("artist-balanced accuracy", clips["genre"].tolist())):
        estimate = evaluation.bootstrap_accuracy(correct, artists, genres)
        lines.append(f"{name}  {estimate.value:.4f}")
        lines.append(f"  95 % interval  {estimate.low:.4f} to {estimate.high:.4f}, over {drawn}{hint}")
    lines.append(f"macro-F1  {np.mean([result['macro_f1'] for result in results]):.4f}")
    recall = genre_report(metrics, split)["recall"]
    return "\n".join([*lines, "recall by genre:", *(f"  {g:<14}{value:.3f}" for g, value in recall.items())])


def evaluate_rows(run: str, rows: Sequence[str], pack: Pack, split: str, device: torch.device) -> list[Path]:
    """Evaluate every seed of rows of an ablation on a split, and the weights of the package.

    The mean of the probabilities of the final recipe's seeds is a row of its own, ``final_mean``. Files:
    ``evaluation_<split>.csv`` has a line per network, ``evaluation_<split>_table.csv`` a line per row with
    its intervals and its paired difference from ``final``, ``evaluation_<split>_answers.csv`` the answers by
    track. `FmaNbError` when a row was not trained, or the split is not there.
    """
    found = {}
    for row in dict.fromkeys([FINAL, *rows]):
        if not (trained := read_row(run, row)):
            raise FmaNbError(f"{run_dir(run)} holds no finished row {row!r}: train it with 'fma-nb ablate'.")
        found[row] = _evaluated(row_run(run, row), trained[0]["model"], pack, split, device)
    found["final_mean"] = _mean_of_seeds(found[FINAL], split)
    found["shipped"] = _evaluated(None, "crnn", pack, split, device)
    tables = {
        "": pd.DataFrame([_line(row, seed, m, split) for row, m in found.items() for seed in m["seeds"]]),
        "_table": comparison_table(found, FINAL, split),
        "_answers": answer_table(found, split),
    }
    folder = run_dir(run)
    return [write_table(folder / f"evaluation_{split}{name}.csv", table) for name, table in tables.items()]


def _line(row: str, result: dict[str, Any], metrics: Metrics, split: str) -> dict[str, Any]:
    facts = {"row": row, "seed": result["seed"], "split": split, "clips": len(metrics["labels"][split])}
    scores = {name: result[split][name] for name in evaluation.SCORES.values()}
    recall = genre_report(metrics | {"seeds": [result]}, split)["recall"]
    return facts | scores | dict(recall.add_prefix("recall_"))


def _mean_of_seeds(metrics: Metrics, split: str) -> Metrics:
    """Return the answers that the mean of the seeds' probabilities gives, as those of one network."""
    labels, genres = metrics["labels"][split], metrics["genres"]
    each = [[result[split]["probabilities"][i] for i in labels] for result in metrics["seeds"]]
    probabilities = np.mean(each, axis=0)
    answers = [genres[best] for best in probabilities.argmax(axis=1)]
    result: dict[str, Any] = {
        "predictions": dict(zip(labels, answers, strict=True)),
        "probabilities": dict(zip(labels, probabilities.tolist(), strict=True)),
    }
    scores = evaluation.split_scores(list(labels.values()), answers, list(metrics["artists"][split].values()))
    return metrics | {"seeds": [{"seed": "mean", split: result | scores}]}
