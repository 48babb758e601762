"""Many epochs: training to the end, with a checkpoint after every epoch and an exact resume.

Every epoch seeds all generators from (seed, epoch), so an epoch does not depend on how the process got
there: killed and resumed on the same machine, a run gives the same weights, bit for bit, as one that was not.
"""

import math
import random
import time
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from torch import nn

from fma_nb import training
from fma_nb.bulk.workers import keep_freed_memory
from fma_nb.dataset import Pack, SpectrogramDataset, make_loader
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import (
    NotReadableError,
    RunFiles,
    load_checkpoint,
    load_log,
    save_checkpoint,
    write_log_row,
)
from fma_nb.training import TrainingState


def fit(
    recipe: Recipe,
    pack: Pack,
    files: RunFiles,
    device: torch.device,
    *,
    last_epoch: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, int, pd.DataFrame]:
    """Train a model, writing the log and the best and last checkpoint after every epoch.

    Best is the higher validation accuracy, then the lower loss. Goes on from ``files.last`` when that was
    made by the same recipe on the same data, and trains nothing when it is complete; otherwise starts over.
    Returns the model with its best weights, or with ``last_epoch`` those after the last epoch; the best
    epoch, counted from 1; and the log, a row per epoch. Raises `FmaNbError` when a split is empty, a file
    cannot be read or written, or the loss is no number.
    """
    clips = {name: SpectrogramDataset(pack.split(name), device) for name in ("train", "val")}
    training.make_deterministic()
    keep_freed_memory()
    state = training.start_training(recipe, pack, device)
    first_epoch, best = 0, {"best_accuracy": -1.0, "best_loss": math.inf, "stale_epochs": 0}
    if saved := _resumed(state, files, recipe, pack):
        first_epoch, best = saved["epoch"] + 1, {name: saved[name] for name in best}
    with Progress(recipe.epochs, f"{recipe.model}, seed {recipe.seed}", "epoch", visible=progress) as bar:
        bar.start_at(first_epoch)
        for epoch in range(first_epoch, recipe.epochs):
            if 0 < recipe.patience <= best["stale_epochs"]:
                break
            row = _run_epoch(state, recipe, epoch, clips)
            accuracy, loss = row["val_accuracy"], row["val_loss"]
            best["stale_epochs"] = 0 if accuracy > best["best_accuracy"] else best["stale_epochs"] + 1
            write_log_row(files.log, row)
            content, resume = _contents(state, recipe, pack, row)
            if (accuracy, -loss) > (best["best_accuracy"], -best["best_loss"]):
                best |= {"best_accuracy": accuracy, "best_loss": loss}
                save_checkpoint(files.best, content)
            save_checkpoint(files.last, content | resume | best)
            bar.update(1, f"val accuracy {accuracy:.3f}")
    kept, log = load_checkpoint(files.best), load_log(files.log)
    weights = load_checkpoint(files.last) if last_epoch else kept
    state.model.load_state_dict(weights["model_state"])
    return state.model, kept["epoch"] + 1, log[log["seed"] == recipe.seed]


def _run_epoch(
    state: TrainingState, recipe: Recipe, epoch: int, clips: dict[str, SpectrogramDataset]
) -> dict[str, float]:
    started = time.perf_counter()
    training.seed_everything(recipe.seed, epoch + 1)
    loader = make_loader(clips["train"], recipe.batch_size, shuffle=True, seed=random.getrandbits(63))
    row: dict[str, float] = {"seed": recipe.seed, "epoch": epoch, "lr": state.optimizer.param_groups[0]["lr"]}
    try:
        row["train_loss"], row["train_accuracy"] = training.train_one_epoch(state, loader, recipe)
        judged = training.evaluate(state.evaluated_model, make_loader(clips["val"], 256), recipe.bfloat16)
        row["val_loss"], row["val_accuracy"] = judged
        if not math.isfinite(row["val_loss"]):
            raise FloatingPointError("validation")
    except FloatingPointError as error:
        kept = "the checkpoints are those of the epoch before"
        if epoch == 0:
            kept = "this training has saved nothing yet"
        raise FmaNbError(
            f"{recipe.model}: the loss is not a number in epoch {epoch + 1}, {error}; {kept}. "
            f"Try a smaller lr. Configuration: {asdict(recipe)}"
        ) from error
    return row | {"seconds": time.perf_counter() - started}


def _contents(
    state: TrainingState, recipe: Recipe, pack: Pack, row: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both checkpoints hold, and what an exact resume needs besides."""
    content = {
        "epoch": row["epoch"],
        "model_state": state.evaluated_model.state_dict(),
        "optimizer_state": state.optimizer.state_dict(),
        "val_accuracy": row["val_accuracy"],
        "config": asdict(recipe),
        "genres": list(pack.genres),
        "dataset": pack.dataset,
        "preset": pack.preset,
        "fingerprint": pack.fingerprint,
        "image_shape": list(pack.image_shape),
    }
    return content, {
        "raw_state": state.model.state_dict(),
        "n_averaged": 0 if state.average is None else state.average.n_updates,
        "scheduler_state": state.scheduler.state_dict(),
    }


def _resumed(state: TrainingState, files: RunFiles, recipe: Recipe, pack: Pack) -> dict[str, Any] | None:
    """Restore the last checkpoint where it can be gone on from, with its best and its log, and return it."""
    try:
        best, last, log = load_checkpoint(files.best), load_checkpoint(files.last), load_log(files.log)
    except NotReadableError:
        return None
    ours = asdict(recipe), pack.fingerprint
    same = all((one["config"], one.get("fingerprint")) == ours for one in (best, last))
    logged = ((log["seed"] == recipe.seed) & (log["epoch"] == last["epoch"])).any()
    if not (same and logged and "raw_state" in last):
        return None
    state.model.load_state_dict(last["raw_state"])
    if state.average is not None:
        state.average.module.load_state_dict(last["model_state"])
        state.average.n_updates = last["n_averaged"]
    state.optimizer.load_state_dict(last["optimizer_state"])
    state.scheduler.load_state_dict(last["scheduler_state"])
    return last
