"""Checkpoints and logs: the files of one training, written atomically and read without running anything.

A checkpoint of the same content has the same bytes, so two trainings can be compared by their files.
"""

import contextlib
import io
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from fma_nb.dataset import MIN_FRAMES, Pack
from fma_nb.model import build_model
from fma_nb.project import FmaNbError, atomic_path, run_dir
from fma_nb.recipe import Recipe
from fma_nb.spectrogram import PRESETS
from fma_nb.training import to_device

# What every checkpoint holds; `fma_nb.runs.fit` adds more.
CONTENT = dict(epoch=int, model_state=dict, config=dict, genres=list, preset=str, image_shape=list)
MAX_FRAMES = 100_000  # 39 minutes of the `full` preset; a damaged file may ask for more than fits into memory
LOG_COLUMNS = ["seed", "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"]


class NotReadableError(FmaNbError):
    """A file of a training is missing or damaged, so that only training again brings it back."""


class RunFiles(NamedTuple):
    """The checkpoints of one training (a model and a seed of a run), and the log that all seeds share."""

    best: Path
    last: Path
    log: Path


def run_files(run: str, model: str, seed: int, first_seed: int) -> RunFiles:
    """Name the files of one training; a run's first seed has plain names, ``<model>_best.pt``."""
    folder = run_dir(run)
    stem = folder / "checkpoints" / (model if seed == first_seed else f"{model}_seed{seed}")
    return RunFiles(Path(f"{stem}_best.pt"), Path(f"{stem}_last.pt"), folder / "logs" / f"{model}.csv")


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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU without executing anything in it, or raise `NotReadableError`."""
    try:
        data = io.BytesIO(path.read_bytes())
    except FileNotFoundError as error:
        raise NotReadableError(f"{path} is missing: train the model first (notebooks 03 and 04).") from error
    except OSError as error:
        raise FmaNbError(f"{path} cannot be read ({error.strerror}).") from error
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # PyTorch's, of foreign files
            content = torch.load(data, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception:  # damage makes it raise nearly anything
        content = None
    if not isinstance(content, dict) or not _is_checkpoint(content):
        raise NotReadableError(f"{path} is not a checkpoint of this project: remove it.")
    return content


def _is_checkpoint(content: dict[str, Any]) -> bool:
    if not all(isinstance(content.get(name), kind) for name, kind in CONTENT.items()):
        return False
    shape, genres = content["image_shape"], content["genres"]
    return (
        len(shape) == 2
        and all(isinstance(size, int) and MIN_FRAMES <= size <= MAX_FRAMES for size in shape)
        and all(isinstance(genre, str) for genre in genres)
        and len(set(genres)) == len(genres)
        and content["preset"] in PRESETS
    )


def load_model(path: Path, model: str, pack: Pack, device: torch.device) -> nn.Module:
    """Rebuild a trained model from its checkpoint, or raise `FmaNbError` when it does not fit ``pack``."""
    saved = load_checkpoint(path)
    network = network_of(saved, path)
    for what, found, wanted in (
        ("model", saved["config"].get("model", "baseline"), model),
        ("preset", saved["preset"], pack.preset),
        ("genres", tuple(saved["genres"]), pack.genres),
    ):
        if found != wanted:
            raise FmaNbError(f"{path} is a checkpoint of {what} {found!r}, not {wanted!r}.")
    return to_device(network, device)


def network_of(saved: dict[str, Any], path: Path) -> nn.Module:
    """Build a checkpoint's network, in evaluation mode, or raise `FmaNbError` that names ``path``."""
    try:
        recipe = Recipe(**saved["config"])
    except (TypeError, FmaNbError) as error:
        raise FmaNbError(f"{path} was made by another version of this project: train again.") from error
    network = build_model(recipe.model, len(saved["genres"]), *saved["image_shape"], **recipe.architecture())
    try:
        network.load_state_dict(saved["model_state"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FmaNbError(f"{path} holds weights of another architecture: train again.") from error
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise FmaNbError(f"{path} holds weights that are not numbers: train again.")
    return network.eval()


def write_log_row(path: Path, row: dict[str, float]) -> None:
    """Append an epoch's row, replacing what an earlier run left for the same and later epochs."""
    rows = pd.DataFrame([row], columns=LOG_COLUMNS)
    with contextlib.suppress(NotReadableError):  # a damaged log is written anew
        old = load_log(path)
        stale = (old["seed"] == row["seed"]) & (old["epoch"] >= row["epoch"])
        rows = pd.concat([old[~stale], rows], ignore_index=True)
    with atomic_path(path) as temporary:
        rows.sort_values(["seed", "epoch"]).to_csv(temporary, index=False)


def read_log(run: str, model: str, seeds: Iterable[int] | None = None) -> pd.DataFrame:
    """Read the log of all or some seeds of a model: a row per epoch, from 0, columns `LOG_COLUMNS`."""
    rows = load_log(run_files(run, model, 0, 0).log)  # all seeds share it
    return rows if seeds is None else rows[rows["seed"].isin(list(seeds))]


def load_log(path: Path) -> pd.DataFrame:
    """Read a log file, or raise `NotReadableError` when it is missing, damaged or something else."""
    try:
        rows = pd.read_csv(path)
    except (FileNotFoundError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise NotReadableError(f"{path} is missing or damaged: train the model again.") from error
    if list(rows.columns) != LOG_COLUMNS:
        raise NotReadableError(f"{path} is not a training log: remove it and train again.")
    return rows
