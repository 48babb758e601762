"""Checkpoints and logs: the files of one training, written atomically and read without running anything.

A checkpoint of the same content has the same bytes, so two trainings can be compared by their files.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fma_nb.dataset import MIN_FRAMES, Pack
from fma_nb.model import build_model
from fma_nb.project import FmaNbError, atomic_path, run_dir
from fma_nb.recipe import Recipe
from fma_nb.spectrogram import PRESETS
from fma_nb.training import to_device

MAX_FRAMES = 100_000  # 39 minutes of the `full` preset; a damaged file may ask for more than fits into memory
CHECKPOINT_KEYS = ("epoch", "model_state", "config", "genres", "preset", "image_shape")
# What torch.load was seen to raise for cut, flipped and foreign files.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    OSError,
    AttributeError,
    AssertionError,
)
LOG_COLUMNS = ["seed", "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"]


@dataclass(frozen=True)
class RunFiles:
    """The files of one training: a model and a seed within a run folder.

    The first seed of a run has the plain names ``<model>_best.pt`` and ``<model>_last.pt``.
    """

    best: Path
    last: Path
    log: Path


def run_files(run: str, model: str, seed: int, first_seed: int) -> RunFiles:
    """Name the checkpoints and the log of one training."""
    checkpoints = run_dir(run) / "checkpoints"
    stem = model if seed == first_seed else f"{model}_seed{seed}"
    return RunFiles(checkpoints / f"{stem}_best.pt", checkpoints / f"{stem}_last.pt", log_path(run, model))


def _interned(content: Any) -> Any:
    """Make equal texts one object: pickle refers back to an object, but writes an equal one again."""
    if isinstance(content, dict):
        return {_interned(key): _interned(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_interned(value) for value in content]
    return sys.intern(content) if isinstance(content, str) else content


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save to a path would write the path's name into the file
    torch.save(_interned(content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises
    ------
    FmaNbError
        When the file is missing or is not a checkpoint of this project.
    """
    try:
        with warnings.catch_warnings():  # of a foreign file PyTorch remarks more than its refusal
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location=device or "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FmaNbError(f"{path} is missing: train the model first (notebooks 03 and 04).") from error
    except _UNREADABLE as error:
        raise FmaNbError(f"{path} is not a checkpoint of this project: remove it.") from error
    if not _is_checkpoint(content):
        raise FmaNbError(f"{path} is not a checkpoint of this project: remove it.")
    return content


def _is_checkpoint(content: Any) -> bool:
    if not isinstance(content, dict) or not set(CHECKPOINT_KEYS) <= content.keys():
        return False
    shape, genres = content["image_shape"], content["genres"]
    return (
        all(isinstance(content[name], dict) for name in ("model_state", "config"))
        and all(isinstance(part, list) for part in (shape, genres))
        and all(isinstance(size, int) and MIN_FRAMES <= size <= MAX_FRAMES for size in shape)
        and all(isinstance(genre, str) for genre in genres)
        and (len(shape), len(set(genres))) == (2, len(genres))
        and isinstance(content["epoch"], int)
        and isinstance(content["preset"], str)
        and content["preset"] in PRESETS
    )


def saved_recipe(path: Path, saved: dict[str, Any]) -> Recipe:
    """Return the recipe in a checkpoint, or raise `FmaNbError` when it is of another version."""
    try:
        return Recipe(**saved["config"])
    except (TypeError, FmaNbError) as error:
        raise FmaNbError(f"{path} was made by another version of this project: train again.") from error


def load_model(path: Path, model: str, pack: Pack, device: torch.device) -> nn.Module:
    """Rebuild a trained model from its checkpoint, for the data of ``pack``.

    Raises
    ------
    FmaNbError
        When the checkpoint is of another model, preset or list of genres, or does not fit.
    """
    saved = load_checkpoint(path, device)
    for what, found, wanted in (
        ("model", saved_recipe(path, saved).model, model),
        ("preset", saved["preset"], pack.preset),
        ("genres", tuple(saved["genres"]), pack.genres),
    ):
        if found != wanted:
            raise FmaNbError(f"{path} is a checkpoint of {what} {found!r}, not {wanted!r}.")
    return to_device(network_of(saved, path), device)


def network_of(saved: dict[str, Any], path: Path) -> nn.Module:
    """Build the network of a checkpoint that was read from ``path``.

    Raises
    ------
    FmaNbError
        When the weights are not those of the architecture in its recipe, or not numbers.
    """
    recipe, state = saved_recipe(path, saved), saved["model_state"]
    network = build_model(recipe.model, len(saved["genres"]), *saved["image_shape"], **recipe.architecture())
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FmaNbError(f"{path} holds weights of another architecture: train again.") from error
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise FmaNbError(f"{path} holds weights that are not numbers: train again.")
    return network


def write_log_row(path: Path, row: dict[str, float]) -> None:
    """Append an epoch's row, replacing what an earlier run left for the same and later epochs."""
    rows = pd.DataFrame([row], columns=LOG_COLUMNS)
    with contextlib.suppress(FmaNbError):  # a damaged log is written anew
        old = load_log(path)
        stale = (old["seed"] == row["seed"]) & (old["epoch"] >= row["epoch"])
        rows = pd.concat([old[~stale], rows], ignore_index=True)
    with atomic_path(path) as temporary:
        rows.sort_values(["seed", "epoch"]).to_csv(temporary, index=False)


def log_path(run: str, model: str) -> Path:
    """Return where the log of all seeds of a model lies in a run folder."""
    return run_dir(run) / "logs" / f"{model}.csv"


def read_log(run: str, model: str, seeds: Iterable[int] | None = None) -> pd.DataFrame:
    """Read a model's training log: a row an epoch, columns `LOG_COLUMNS`, of all seeds or of some.

    Its epochs are counted from 0.

    Raises
    ------
    FmaNbError
        When the file is missing or damaged.
    """
    rows = load_log(log_path(run, model))
    return rows if seeds is None else rows[rows["seed"].isin(list(seeds))]


def load_log(path: Path) -> pd.DataFrame:
    """Read a log file, or raise `FmaNbError` when it is missing, damaged or something else."""
    try:
        rows = pd.read_csv(path)
    except (FileNotFoundError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise FmaNbError(f"{path} is missing or damaged: train the model again.") from error
    if list(rows.columns) != LOG_COLUMNS:
        raise FmaNbError(f"{path} is not a training log: remove it and train again.")
    return rows
