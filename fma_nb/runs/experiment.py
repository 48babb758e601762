"""One experiment: a recipe trained with several seeds, and the metrics file that it leaves.

The file holds every seed's answers by track id, so that models can be compared clip by clip later.
"""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fma_nb import training
from fma_nb.dataset import Pack
from fma_nb.evaluation import EVALUATION_SPLITS, Metrics, evaluate_split
from fma_nb.model import count_parameters
from fma_nb.project import SYNTHETIC_DATASETS, FmaNbError, run_dir, write_text
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import load_model, run_files
from fma_nb.runs.fit import fit

METRICS_KEYS = ("model", "dataset", "preset", "genres", "fingerprint", "config", "labels", "seeds")


def chosen_split(dataset: str, evaluation_split: str) -> str:
    """Return the choice; an empty one is test of synthetic data and val of real, whose test comes last."""
    if evaluation_split not in ("", *EVALUATION_SPLITS):
        raise FmaNbError(f"evaluation_split={evaluation_split!r} is unknown: choose val or test.")
    return evaluation_split or ("test" if dataset in SYNTHETIC_DATASETS else "val")


def evaluation_splits(pack: Pack, evaluation_split: str) -> tuple[str, ...]:
    """Return the splits to evaluate on, or raise `FmaNbError` when one is unknown or empty."""
    splits = ("val",) if chosen_split(pack.dataset, evaluation_split) == "val" else ("val", "test")
    for split in splits:
        pack.split(split)
    return splits


def train_and_evaluate(
    recipe: Recipe,
    pack: Pack,
    run: str,
    device: torch.device,
    *,
    n_seeds: int = 1,
    evaluation_split: str = "val",
    last_epoch: bool = False,
    progress: bool = True,
) -> Metrics:
    """Train a model with several seeds, evaluate each one's best checkpoint, and write the metrics file.

    The recipe's seed is the first of ``n_seeds`` consecutive ones. ``evaluation_split`` ``val`` evaluates on
    validation only, ``test`` on both. With ``last_epoch`` the weights after the last epoch are evaluated: no
    clip had a say in which epoch that is. What cannot work raises `FmaNbError` before the first epoch. What
    an earlier call finished is not trained again.
    """
    splits = evaluation_splits(pack, evaluation_split)
    if n_seeds < 1:
        raise FmaNbError(f"n_seeds={n_seeds} must be at least 1.")
    results = []
    for one in [replace(recipe, seed=recipe.seed + i) for i in range(n_seeds)]:
        files = run_files(run, one.model, one.seed, recipe.seed)
        model, best_epoch, log = fit(one, pack, files, device, last_epoch=last_epoch, progress=progress)
        result = {
            "seed": one.seed,
            "epochs": len(log),
            "best_epoch": best_epoch,
            "last_val_accuracy": float(log["val_accuracy"].iloc[-1]),
            "seconds": round(float(log["seconds"].sum()), 1),
        }
        evaluated = {split: evaluate_split(model, pack, split, device, one.bfloat16) for split in splits}
        results.append(result | evaluated)
    metrics = {
        "model": recipe.model,
        "dataset": pack.dataset,
        "synthetic": pack.dataset in SYNTHETIC_DATASETS,
        "preset": pack.preset,
        "genres": list(pack.genres),
        "fingerprint": pack.fingerprint,
        "n_parameters": count_parameters(model),
        "config": asdict(recipe),
        "checkpoint": "last" if last_epoch else "best",
        "device": training.device_name(device),
        "versions": versions(),
        "date": date.today().isoformat(),
        "seeds": results,
    } | split_facts(pack, splits)
    write_text(metrics_path(run, recipe.model), json.dumps(metrics, indent=1) + "\n")
    return metrics


def split_facts(pack: Pack, splits: Sequence[str]) -> Metrics:
    """Return ``labels`` and ``artists`` of the splits' clips by track id, for a metrics file."""
    facts: Metrics = {"labels": {}, "artists": {}}
    for split in splits:
        clips = pack.split(split)
        ids = [str(track_id) for track_id in clips.track_ids]
        genres = [pack.genres[label] for label in clips.labels]
        facts["labels"][split] = dict(zip(ids, genres, strict=True))
        facts["artists"][split] = dict(zip(ids, clips.artists.tolist(), strict=True))
    return facts


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def metrics_path(run: str, model: str) -> Path:
    """Return where a model's metrics file lies in a run folder."""
    return run_dir(run) / "metrics" / f"{model}.json"


def read_metrics(run: str, models: Sequence[str], pack: Pack | None = None) -> dict[str, Metrics]:
    """Read the metrics files of a run, and check that they are of the same data, and of ``pack`` if given."""
    if not models:
        raise FmaNbError("read_metrics needs the name of at least one model.")
    found = {model: _read_metrics_file(metrics_path(run, model), model) for model in models}
    first = found[models[0]]
    for model, metrics in found.items():
        for key in ("dataset", "preset", "genres", "fingerprint", "labels"):
            if metrics[key] != first[key]:
                raise FmaNbError(
                    f"{metrics_path(run, model)} was made with another {key} than that of "
                    f"{models[0]}: run notebooks 03 and 04 again with the same parameters."
                )
    if pack is not None and first["fingerprint"] != pack.fingerprint:
        raise FmaNbError(
            f"{metrics_path(run, models[0])} was made from other spectrograms than those that are there now: "
            "run notebooks 03 and 04 again."
        )
    return found


def _read_metrics_file(path: Path, model: str) -> Metrics:
    try:
        metrics: Metrics = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FmaNbError(f"{path} is missing: run notebooks 03 and 04 first.") from error
    except ValueError as error:
        raise FmaNbError(f"{path} is damaged: run notebooks 03 and 04 again.") from error
    if not isinstance(metrics, dict) or not set(METRICS_KEYS) <= metrics.keys() or not metrics["seeds"]:
        raise FmaNbError(f"{path} is not a metrics file: run notebooks 03 and 04 again.")
    if "artists" not in metrics:
        raise FmaNbError(f"{path} was made by another version of this project: remove it and run again.")
    if metrics["model"] != model:
        raise FmaNbError(f"{path} speaks of model {metrics['model']!r}, not {model!r}.")
    return metrics


def trained_models(run: str, model: str, pack: Pack, device: torch.device) -> Iterator[nn.Module]:
    """Yield the best checkpoint of every seed of a model, in the order of the seeds."""
    metrics = read_metrics(run, [model])[model]
    for result in metrics["seeds"]:
        files = run_files(run, model, result["seed"], metrics["config"]["seed"])
        yield load_model(files.best, model, pack, device)
