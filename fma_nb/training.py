"""Stage 6d, training: the loop, checkpoints, and an exact resume.

Every epoch seeds all generators from (seed, epoch), so an epoch does not depend on how the process got
there: a run that was killed and resumed gives the same weights, bit for bit, as one that was not.
Notebook 03 writes the plain loop in view, notebook 04 says what each ingredient of the CRNN's recipe is for.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import random
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fma_nb.augmentation import augment
from fma_nb.dataset import MIN_FRAMES, Batch, Pack, SpectrogramDataset, make_loader, to_input
from fma_nb.model import build_model
from fma_nb.optimization import MovingAverage, lr_factor, make_optimizer
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, keep_freed_memory, run_dir
from fma_nb.recipe import TrainConfig
from fma_nb.spectrogram import PRESETS

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
    folder = run_dir(run)
    stem = model if seed == first_seed else f"{model}_seed{seed}"
    checkpoints = folder / "checkpoints"
    return RunFiles(
        checkpoints / f"{stem}_best.pt", checkpoints / f"{stem}_last.pt", folder / "logs" / f"{model}.csv"
    )


def resolve_device(name: str, gpu_memory_fraction: float = 1.0) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device, and cap this process's share of GPU memory.

    Raises
    ------
    FmaNbError
        When the name is unknown, CUDA is asked for but absent, or the share is not in (0, 1].
    """
    if name not in ("auto", "cpu", "cuda"):
        raise FmaNbError(f"device={name!r} is unknown: choose auto, cpu or cuda.")
    if not 0 < gpu_memory_fraction <= 1:
        raise FmaNbError(f"gpu_memory_fraction={gpu_memory_fraction} must be above 0 and at most 1.")
    if name == "cuda" and not torch.cuda.is_available():
        raise FmaNbError("device='cuda', but PyTorch sees no CUDA device: use device='auto' or 'cpu'.")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction)
    return torch.device("cuda")


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolution weights laid out channels last, which is faster."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_deterministic() -> None:
    """Ask PyTorch for the same bits every time, on the CPU and on CUDA (see also `fma_nb.__init__`)."""
    torch.use_deterministic_algorithms(True)
    # A sixth of the training time went into filling new tensors with NaN before they are written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed ``random``, NumPy and PyTorch (all devices) from a seed and an epoch."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def bfloat16_pays(device: torch.device) -> bool:
    """Tell whether a device multiplies bfloat16 in hardware; elsewhere it would only be slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def fit(
    config: TrainConfig, pack: Pack, files: RunFiles, device: torch.device, *, progress: bool = True
) -> None:
    """Train a model, writing the log and the best and last checkpoint after every epoch.

    Goes on from ``files.last`` when that was made by the same configuration on the same data, and
    returns at once when it is complete; otherwise starts over.

    Raises
    ------
    FmaNbError
        When a split is empty or the loss is no longer a number.
    """
    # Made once: on a GPU this is where the pack moves into device memory.
    train_set, val_set = (SpectrogramDataset(pack.split(name), device) for name in ("train", "val"))
    make_deterministic()
    keep_freed_memory()
    state = _start(config, pack, device, steps_per_epoch=-(-len(train_set) // config.batch_size))
    saved = _matching_checkpoint(files, config, pack, device)
    first_epoch = state.restore(saved) if saved else 0
    val_loader = make_loader(val_set, 256)
    what = f"{config.model}, seed {config.seed}"
    with Progress(config.epochs, what, "epoch", visible=progress) as bar:
        bar.update(first_epoch, "resumed")
        for epoch in range(first_epoch, config.epochs):
            if state.is_stale(config.patience):
                break
            row = _run_epoch(state, config, epoch, train_set, val_loader, device)
            improved = state.note(row)
            _write_log(files.log, row)
            if improved:
                save_checkpoint(files.best, state.checkpoint(config, pack, epoch))
            save_checkpoint(files.last, state.checkpoint(config, pack, epoch) | state.resume())
            bar.update(1, f"val accuracy {row['val_accuracy']:.3f}")


@dataclass
class _TrainState:
    """What changes while a model trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    average: MovingAverage | None
    best_accuracy: float = -1.0
    best_loss: float = math.inf
    stale_epochs: int = 0

    @property
    def judged(self) -> nn.Module:
        """Return the weights that are evaluated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def note(self, row: dict[str, float]) -> bool:
        """Compare an epoch with the best so far: higher validation accuracy, then lower loss."""
        improved = (row["val_accuracy"], -row["val_loss"]) > (self.best_accuracy, -self.best_loss)
        self.stale_epochs = 0 if row["val_accuracy"] > self.best_accuracy else self.stale_epochs + 1
        if improved:
            self.best_accuracy, self.best_loss = row["val_accuracy"], row["val_loss"]
        self.val_accuracy = row["val_accuracy"]
        return improved

    def is_stale(self, patience: int) -> bool:
        return 0 < patience <= self.stale_epochs

    def checkpoint(self, config: TrainConfig, pack: Pack, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "model_state": self.judged.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "val_accuracy": self.val_accuracy,
            "config": asdict(config),
            "genres": list(pack.genres),
            "dataset": pack.dataset,
            "preset": pack.preset,
            "fingerprint": pack.fingerprint,
            "image_shape": list(pack.splits["train"].images.shape[1:]),
        }

    def resume(self) -> dict[str, Any]:
        """Return what only an exact resume needs."""
        return {
            "raw_state": self.model.state_dict(),
            "n_averaged": 0 if self.average is None else self.average.n_updates,
            "scheduler_state": self.scheduler.state_dict(),
            "best_accuracy": self.best_accuracy,
            "best_loss": self.best_loss,
            "stale_epochs": self.stale_epochs,
        }

    def restore(self, saved: dict[str, Any]) -> int:
        """Take over a ``last`` checkpoint; return the epoch to go on with."""
        self.model.load_state_dict(saved["raw_state"])
        if self.average is not None:
            self.average.module.load_state_dict(saved["model_state"])
            self.average.n_updates = saved["n_averaged"]
        self.optimizer.load_state_dict(saved["optimizer_state"])
        self.scheduler.load_state_dict(saved["scheduler_state"])
        self.best_accuracy = saved["best_accuracy"]
        self.best_loss = saved["best_loss"]
        self.stale_epochs = saved["stale_epochs"]
        return int(saved["epoch"]) + 1


def _start(config: TrainConfig, pack: Pack, device: torch.device, steps_per_epoch: int) -> _TrainState:
    seed_everything(config.seed)
    n_mels, n_frames = pack.splits["train"].images.shape[1:]
    model = build_model(config.model, len(pack.genres), n_mels, n_frames, **config.architecture())
    model = to_device(model, device)
    optimizer = make_optimizer(model, config)
    factor = lr_factor(config.warmup, config.epochs * steps_per_epoch)
    average = MovingAverage(model, config.ema) if config.ema else None
    return _TrainState(model, optimizer, LambdaLR(optimizer, factor), average)


def _run_epoch(
    state: _TrainState,
    config: TrainConfig,
    epoch: int,
    train_set: SpectrogramDataset,
    val_loader: DataLoader[Batch],
    device: torch.device,
) -> dict[str, float]:
    started = time.perf_counter()
    seed_everything(config.seed, epoch + 1)
    order_seed = random.getrandbits(63)
    loader = make_loader(train_set, config.batch_size, shuffle=True, seed=order_seed)
    lr = state.optimizer.param_groups[0]["lr"]
    train_loss, train_accuracy = train_epoch(state, config, epoch, loader, device)
    val_loss, val_accuracy = score_loader(state.judged, val_loader, device, config.bfloat16)
    if not math.isfinite(val_loss):
        raise _not_a_number(config, epoch, "validation")
    return {
        "seed": config.seed,
        "epoch": epoch,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "lr": lr,
        "seconds": time.perf_counter() - started,
    }


def train_epoch(
    state: _TrainState, config: TrainConfig, epoch: int, loader: DataLoader[Batch], device: torch.device
) -> tuple[float, float]:
    """Take one optimizer step a batch; return the mean loss and accuracy over the clips seen.

    Sums stay on the device until the end: asking for a number in every step would stall a GPU.
    Accuracy is counted on the augmented clips, against the label with the larger share in mixup.
    """
    state.model.train()
    losses, correct = [], torch.zeros((), dtype=torch.long, device=device)
    n_clips = 0
    for images, labels in loader:
        inputs, partner, share = augment(images, labels, config)
        with autocast(device, config.bfloat16):
            logits = state.model(inputs).float()
        loss = share * F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if share < 1:
            smoothing = config.label_smoothing
            loss = loss + (1 - share) * F.cross_entropy(logits, partner, label_smoothing=smoothing)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.scheduler.step()
        if state.average is not None:
            state.average.update(state.model)
        losses.append(loss.detach() * len(labels))
        correct += (logits.detach().argmax(1) == labels).sum()
        n_clips += len(labels)
    clip_losses = torch.stack(losses)
    _check_finite(clip_losses, config, epoch)
    return float(clip_losses.sum() / n_clips), float(correct / n_clips)


def _check_finite(losses: Tensor, config: TrainConfig, epoch: int) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if len(bad):
        raise _not_a_number(config, epoch, f"batch {int(bad[0]) + 1}")


def _not_a_number(config: TrainConfig, epoch: int, where: str) -> FmaNbError:
    kept = "the checkpoints are those of the epoch before" if epoch else "this training has saved nothing yet"
    return FmaNbError(
        f"{config.model}: the loss is not a number in epoch {epoch + 1}, {where}; {kept}. "
        f"Try a smaller lr. Configuration: {asdict(config)}"
    )


def autocast(device: torch.device, bfloat16: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which convolutions run in bfloat16, where that is wanted and pays."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and bfloat16_pays(device))


def score_loader(
    model: nn.Module, loader: DataLoader[Batch], device: torch.device, bfloat16: bool = True
) -> tuple[float, float]:
    """Return a model's mean cross-entropy and accuracy over all clips of a loader."""
    logits, labels = predict_logits(model, loader, device, bfloat16)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def predict_logits(
    model: nn.Module, loader: DataLoader[Batch], device: torch.device, bfloat16: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the logits [shape=(n_clips, n_classes)] and labels [shape=(n_clips,)] of a loader's clips.

    Dropout is off and batch normalisation uses its running statistics.
    """
    model.eval()
    with torch.inference_mode(), autocast(device, bfloat16):
        parts = [(model(to_input(images)).float(), labels) for images, labels in loader]
    return torch.cat([p[0] for p in parts]).cpu(), torch.cat([p[1] for p in parts]).cpu()


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


def saved_config(path: Path, saved: dict[str, Any]) -> TrainConfig:
    """Return the configuration in a checkpoint, or raise `FmaNbError` when it is of another version."""
    try:
        return TrainConfig(**saved["config"])
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
        ("model", saved_config(path, saved).model, model),
        ("preset", saved["preset"], pack.preset),
        ("genres", tuple(saved["genres"]), pack.genres),
    ):
        if found != wanted:
            raise FmaNbError(f"{path} is a checkpoint of {what} {found!r}, not {wanted!r}.")
    return to_device(build_network(path, saved), device)


def build_network(path: Path, saved: dict[str, Any]) -> nn.Module:
    """Build the network of a checkpoint that was read from ``path``.

    Raises
    ------
    FmaNbError
        When the weights are not those of the architecture in its configuration, or not numbers.
    """
    config, state = saved_config(path, saved), saved["model_state"]
    network = build_model(config.model, len(saved["genres"]), *saved["image_shape"], **config.architecture())
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FmaNbError(f"{path} holds weights of another architecture: train again.") from error
    if not all(bool(value.isfinite().all()) for value in network.state_dict().values()):
        raise FmaNbError(f"{path} holds weights that are not numbers: train again.")
    return network


def _matching_checkpoint(
    files: RunFiles, config: TrainConfig, pack: Pack, device: torch.device
) -> dict[str, Any] | None:
    """Return the ``last`` checkpoint where it can be gone on from, with its best and its log."""
    try:
        best, saved = load_checkpoint(files.best, device), load_checkpoint(files.last, device)
        log = read_log(files.log)
    except FmaNbError:
        return None
    logged = ((log["seed"] == config.seed) & (log["epoch"] == saved["epoch"])).any()
    same = all(
        one["config"] == asdict(config) and one.get("fingerprint") == pack.fingerprint
        for one in (best, saved)
    )
    return saved if same and logged and "raw_state" in saved else None


def _write_log(path: Path, row: dict[str, float]) -> None:
    """Append an epoch's row, replacing what an earlier run left for the same and later epochs."""
    rows = pd.DataFrame([row], columns=LOG_COLUMNS)
    with contextlib.suppress(FmaNbError):  # a damaged log is written anew
        old = read_log(path)
        stale = (old["seed"] == row["seed"]) & (old["epoch"] >= row["epoch"])
        rows = pd.concat([old[~stale], rows], ignore_index=True)
    with atomic_path(path) as temporary:
        rows.sort_values(["seed", "epoch"]).to_csv(temporary, index=False)


def read_log(path: Path, seeds: Iterable[int] | None = None) -> pd.DataFrame:
    """Read a training log: a row an epoch, columns `LOG_COLUMNS`, of all seeds or of some.

    Its epochs are counted from 0.

    Raises
    ------
    FmaNbError
        When the file is missing or damaged.
    """
    try:
        rows = pd.read_csv(path)
    except (FileNotFoundError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise FmaNbError(f"{path} is missing or damaged: train the model again.") from error
    if list(rows.columns) != LOG_COLUMNS:
        raise FmaNbError(f"{path} is not a training log: remove it and train again.")
    return rows if seeds is None else rows[rows["seed"].isin(list(seeds))]
