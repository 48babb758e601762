"""Many epochs: training to the end, with a checkpoint after every epoch and an exact resume.

Every epoch seeds all generators from (seed, epoch), so an epoch does not depend on how the process got
there: a run that was killed and resumed gives the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from fma_nb.bulk.workers import keep_freed_memory
from fma_nb.dataset import Batch, Pack, SpectrogramDataset, make_loader
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import (
    RunFiles,
    load_checkpoint,
    load_log,
    network_of,
    save_checkpoint,
    write_log_row,
)
from fma_nb.training import (
    LossNotFiniteError,
    TrainingState,
    evaluate,
    make_deterministic,
    seed_everything,
    start_training,
    to_device,
    train_one_epoch,
)


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes
    ----------
    model
        With the weights of its best epoch on validation.
    best_epoch
        Counted from 1.
    log
        A row an epoch, columns `fma_nb.runs.checkpoint.LOG_COLUMNS`.
    """

    model: nn.Module
    best_epoch: int
    log: pd.DataFrame


def fit(
    recipe: Recipe, pack: Pack, files: RunFiles, device: torch.device, *, progress: bool = True
) -> Fitted:
    """Train a model, writing the log and the best and last checkpoint after every epoch.

    Goes on from ``files.last`` when that was made by the same recipe on the same data, and trains
    nothing when it is complete; otherwise starts over.

    Raises
    ------
    FmaNbError
        When a split is empty or the loss is no longer a number.
    """
    # Made once: on a GPU this is where the pack moves into device memory.
    train_set, val_set = (SpectrogramDataset(pack.split(name), device) for name in ("train", "val"))
    make_deterministic()
    keep_freed_memory()
    state, best = start_training(recipe, pack, device), Best()
    saved = _resumable(files, recipe, pack, device)
    first_epoch = _restore(state, best, saved) if saved else 0
    val_loader = make_loader(val_set, 256)
    what = f"{recipe.model}, seed {recipe.seed}"
    with Progress(recipe.epochs, what, "epoch", visible=progress) as bar:
        bar.start_at(first_epoch)
        for epoch in range(first_epoch, recipe.epochs):
            if 0 < recipe.patience <= best.stale_epochs:
                break
            row = _run_epoch(state, recipe, epoch, train_set, val_loader, device)
            improved = best.update(row)
            write_log_row(files.log, row)
            content = _checkpoint(state, recipe, pack, row)
            if improved:
                save_checkpoint(files.best, content)
            save_checkpoint(files.last, content | _resume_state(state, best))
            bar.update(1, f"val accuracy {row['val_accuracy']:.3f}")
    kept, log = load_checkpoint(files.best, device), load_log(files.log)
    model = to_device(network_of(kept, files.best), device)
    return Fitted(model, kept["epoch"] + 1, log[log["seed"] == recipe.seed])


@dataclass
class Best:
    """The best epoch so far: higher validation accuracy, then lower loss."""

    accuracy: float = -1.0
    loss: float = math.inf
    stale_epochs: int = 0

    def update(self, row: dict[str, float]) -> bool:
        """Compare an epoch's log row with the best so far; tell whether it is better."""
        self.stale_epochs = 0 if row["val_accuracy"] > self.accuracy else self.stale_epochs + 1
        improved = (row["val_accuracy"], -row["val_loss"]) > (self.accuracy, -self.loss)
        if improved:
            self.accuracy, self.loss = row["val_accuracy"], row["val_loss"]
        return improved


def _run_epoch(
    state: TrainingState,
    recipe: Recipe,
    epoch: int,
    train_set: SpectrogramDataset,
    val_loader: DataLoader[Batch],
    device: torch.device,
) -> dict[str, float]:
    started = time.perf_counter()
    seed_everything(recipe.seed, epoch + 1)
    order_seed = random.getrandbits(63)
    loader = make_loader(train_set, recipe.batch_size, shuffle=True, seed=order_seed)
    lr = state.optimizer.param_groups[0]["lr"]
    try:
        train_loss, train_accuracy = train_one_epoch(state, loader, recipe)
        val_loss, val_accuracy = evaluate(state.evaluated_model, val_loader, device, recipe.bfloat16)
        if not math.isfinite(val_loss):
            raise LossNotFiniteError("validation")
    except LossNotFiniteError as error:
        kept = (
            "the checkpoints are those of the epoch before"
            if epoch
            else "this training has saved nothing yet"
        )
        raise FmaNbError(
            f"{recipe.model}: the loss is not a number in epoch {epoch + 1}, {error}; {kept}. "
            f"Try a smaller lr. Configuration: {asdict(recipe)}"
        ) from error
    return {
        "seed": recipe.seed,
        "epoch": epoch,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "lr": lr,
        "seconds": time.perf_counter() - started,
    }


def _checkpoint(state: TrainingState, recipe: Recipe, pack: Pack, row: dict[str, float]) -> dict[str, Any]:
    return {
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


def _resume_state(state: TrainingState, best: Best) -> dict[str, Any]:
    """Return what only an exact resume needs."""
    return {
        "raw_state": state.model.state_dict(),
        "n_averaged": 0 if state.average is None else state.average.n_updates,
        "scheduler_state": state.scheduler.state_dict(),
        "best_accuracy": best.accuracy,
        "best_loss": best.loss,
        "stale_epochs": best.stale_epochs,
    }


def _restore(state: TrainingState, best: Best, saved: dict[str, Any]) -> int:
    """Take over a ``last`` checkpoint; return the epoch to go on with."""
    state.model.load_state_dict(saved["raw_state"])
    if state.average is not None:
        state.average.module.load_state_dict(saved["model_state"])
        state.average.n_updates = saved["n_averaged"]
    state.optimizer.load_state_dict(saved["optimizer_state"])
    state.scheduler.load_state_dict(saved["scheduler_state"])
    best.accuracy, best.loss = saved["best_accuracy"], saved["best_loss"]
    best.stale_epochs = saved["stale_epochs"]
    return int(saved["epoch"]) + 1


def _resumable(files: RunFiles, recipe: Recipe, pack: Pack, device: torch.device) -> dict[str, Any] | None:
    """Return the ``last`` checkpoint where it can be gone on from, with its best and its log."""
    try:
        best, saved = load_checkpoint(files.best, device), load_checkpoint(files.last, device)
        log = load_log(files.log)
    except FmaNbError:
        return None
    logged = ((log["seed"] == recipe.seed) & (log["epoch"] == saved["epoch"])).any()
    same = all(
        one["config"] == asdict(recipe) and one.get("fingerprint") == pack.fingerprint
        for one in (best, saved)
    )
    return saved if same and logged and "raw_state" in saved else None
