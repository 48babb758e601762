"""``fma-nb evaluate``: a trained model's accuracy on a split, with its interval, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack
from fma_nb.evaluation import bootstrap_accuracy, effective_artists, evaluate_split
from fma_nb.metadata import artists_known
from fma_nb.project import SHIPPED_WEIGHTS, SYNTHETIC_DATASETS
from fma_nb.runs.checkpoint import load_checkpoint, load_model
from fma_nb.runs.experiment import metrics_path, read_metrics, trained_models
from fma_nb.training import resolve_device


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
        bfloat16 = bool(read_metrics(run, [model])[model]["config"]["bfloat16"])
        networks = trained_models(run, model, pack, device)
    results = [evaluate_split(network, pack, split, device, bfloat16) for network in networks]
    what = f"{model} (the weights of the package)" if shipped else model
    return f"{what} on {dataset} ({preset}), {split}: {_evaluation_text(results, pack, split)}"


def _evaluation_text(results: Sequence[dict[str, Any]], pack: Pack, split: str) -> str:
    clips = pack.split(split)
    artists = clips.artists.tolist()
    labels = np.array([pack.genres[label] for label in clips.labels])
    predicted = [list(result["predictions"].values()) for result in results]
    correct = pd.DataFrame(np.array(predicted) == labels, columns=clips.track_ids).astype(float)
    estimates = {
        "accuracy": bootstrap_accuracy(correct, artists),
        "artist-balanced accuracy": bootstrap_accuracy(correct, artists, labels.tolist()),
    }
    recall = correct.T.groupby(labels).mean().mean(axis=1)
    known = artists_known(pack.dataset)
    groups = "artists" if known else "clips"
    drawn = f"{groups} and seeds" if len(results) > 1 else f"{groups}, of this one network"
    hint = "" if known else "; for artists get the metadata with 'fma-nb download metadata'"
    many = f" by {len(set(artists))} artists, who count as {effective_artists(artists):.0f}" if known else ""
    synthetic = "synthetic " * (pack.dataset in SYNTHETIC_DATASETS)
    lines = [f"{len(clips)} {synthetic}clips{many}, {len(results)} seed(s)"]
    for name, estimate in estimates.items():
        lines += [
            f"{name}  {estimate.value:.4f}",
            f"  95 % interval  {estimate.low:.4f} to {estimate.high:.4f}, over {drawn}{hint}",
        ]
    lines += [
        f"macro-F1  {np.mean([result['macro_f1'] for result in results]):.4f}",
        "recall by genre:",
    ]
    return "\n".join(lines + [f"  {genre:<14}{value:.3f}" for genre, value in recall.items()])
