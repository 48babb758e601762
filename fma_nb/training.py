"""Stage 6, training: the loop, its augmentations, checkpoints, and an exact resume.

Every epoch seeds all generators from (seed, epoch), so an epoch does not depend on how the process got
there: a run that was killed and resumed gives the same weights, bit for bit, as one that was not.
Notebook 03 writes the plain loop in view, notebook 04 says what each ingredient of the CRNN's recipe is for.

References
----------
D. S. Park et al.: "SpecAugment", Interspeech 2019 (masks over time and frequency).
H. Zhang et al.: "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
I. Loshchilov, F. Hutter: "Decoupled Weight Decay Regularization", ICLR 2019 (AdamW).
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fma_nb.dataset import Batch, Pack, SpectrogramDataset, make_loader, to_input
from fma_nb.model import MODELS, POOLINGS, build_model
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, keep_freed_memory, run_dir
from fma_nb.spectrogram import DYNAMIC_RANGE_DB

CONFIG_CHOICES: tuple[tuple[str, tuple[str | bool, ...]], ...] = (
    ("model", MODELS),
    ("optimizer", ("adam", "adamw", "muon")),
    ("pooling", POOLINGS),
    ("time_shift", (True, False)),
    ("band_norm", (True, False)),
    ("bfloat16", (True, False)),
)
CONFIG_RANGES = (
    ("epochs", 1, 100_000),
    ("batch_size", 1, 100_000),
    ("lr", 1e-12, 1e12),
    ("filter_lr", 1e-12, 1e12),
    ("seed", 0, 2**31),
    ("weight_decay", 0, 1e6),
    ("label_smoothing", 0, 1),
    ("freq_mask", 0, 1),
    ("time_mask", 0, 1),
    ("crop", 0.05, 1),
    ("stretch", 0, 0.9),
    ("mel_shift", 0, 64),
    ("gain", 0, 40),
    ("mixup", 0, 1e6),
    ("ema", 0, 0.99999),
    ("dropout", 0, 0.95),
    ("width", 0.1, 8),
    ("patience", 0, 100_000),
)
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
class TrainConfig:
    """Everything that decides how a model is trained; each ingredient is one field.

    Attributes
    ----------
    model
        One of `fma_nb.model.MODELS`.
    epochs, batch_size, lr, seed
        As usual; ``lr`` is the highest learning rate.
    optimizer
        ``adam``; ``adamw`` with ``weight_decay``; or ``muon``, which is `Muon` with ``filter_lr`` for the
        convolutions' filters and AdamW for the rest.
    warmup
        Share of the steps over which ``lr`` rises from zero before it falls to zero as a cosine;
        ``None`` keeps it constant.
    label_smoothing
        Share of the target spread over all genres.
    time_shift
        Rotate each training clip in time by a random number of frames.
    crop
        Share of each training clip's frames that is seen, from a random start; the whole clip is evaluated.
    stretch
        Play each training clip faster or slower by up to this share.
    mel_shift
        Move each training clip up or down by up to this number of mel bands.
    gain
        Colour each training clip: a random smooth gain over the mel bands with this spread, in dB.
    freq_mask, time_mask
        Longest SpecAugment mask, as a share of the mel bands and of the frames.
    mixup
        Alpha of mixup's Beta distribution; 0 switches it off.
    ema
        Decay of the exponential moving average of the weights that is evaluated and kept instead of the
        last weights themselves; 0 switches it off.
    pooling, band_norm, width, dropout
        Of the CRNN's architecture, see `fma_nb.model.CRNN`.
    patience
        Stop after this many epochs without a better validation accuracy; 0 never stops early.
    bfloat16
        Run convolutions in bfloat16 where the processor computes with it.
    """

    model: str = "baseline"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    optimizer: str = "adam"
    filter_lr: float = 0.012
    weight_decay: float = 0.0
    warmup: float | None = None
    label_smoothing: float = 0.0
    time_shift: bool = False
    crop: float = 1.0
    stretch: float = 0.0
    mel_shift: int = 0
    gain: float = 0.0
    freq_mask: float = 0.0
    time_mask: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    pooling: str = "mean_max"
    band_norm: bool = True
    width: float = 1.0
    dropout: float = 0.3
    patience: int = 0
    bfloat16: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        for name, choices in CONFIG_CHOICES:
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(str, choices))
                raise FmaNbError(f"{name}={getattr(self, name)!r} is unknown: choose one of {wanted}.")
        for name, low, high in CONFIG_RANGES:
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise FmaNbError(f"{name}={value!r} must be {kind} from {low:g} to {high:g}.")
        if self.warmup is not None and not (isinstance(self.warmup, (int, float)) and 0 <= self.warmup <= 1):
            raise FmaNbError(f"warmup={self.warmup!r} must be None or a share from 0 to 1.")

    def architecture(self) -> dict[str, Any]:
        """Return the options of `fma_nb.model.build_model`."""
        if self.model == "baseline":
            return {}
        names = ("pooling", "band_norm", "width", "dropout")
        return {name: getattr(self, name) for name in names}


def default_config(model: str) -> TrainConfig:
    """Return a model's own recipe: plain Adam for the baseline, the modern one for the CRNN."""
    if model == "baseline":
        return TrainConfig(model)
    return TrainConfig(
        model,
        epochs=24,
        lr=2e-3,
        optimizer="muon",
        weight_decay=0.05,
        warmup=0.15,
        label_smoothing=0.1,
        time_shift=True,
        stretch=0.2,
        mel_shift=3,
        gain=5.0,
        freq_mask=0.15,
        time_mask=0.15,
        ema=0.995,
    )


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


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build a recipe's optimizer; weight decay is for matrices and filters only.

    Biases and the gains of batch normalisation are vectors; pulling them to zero regularises nothing.
    """
    filters = [p for p in model.parameters() if p.ndim == 4]
    matrices = [p for p in model.parameters() if 1 < p.ndim < 4]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": filters, "weight_decay": config.weight_decay},
    ]
    if config.optimizer == "muon":
        return Muon(groups[:2], filters, lr=config.lr, filter_lr=config.filter_lr)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr)


class Muon(torch.optim.AdamW):
    """Muon for the filters of convolutions, AdamW for all other parameters.

    A gradient is dominated by a few directions, and so is a step along it. Muon makes the averaged gradient
    of a layer, as a matrix [shape=(n_out, n_in * height * width)], orthogonal: the step goes equally far in
    every direction that the layer can move in, and rare patterns are learnt as fast as common ones. The
    CRNN's filters stand before batch normalisation, where their length means nothing; it is kept fixed, so
    that ``filter_lr`` is the relative length of a step. For the baseline, which has no batch normalisation,
    that fixed length is a constraint of its own.

    References
    ----------
    K. Jordan et al.: "Muon: An optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        filters: list[nn.Parameter],
        lr: float,
        filter_lr: float,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(groups, lr=lr)
        self.add_param_group({"params": filters, "lr": filter_lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters; AdamW leaves those alone that have no gradient any more."""
        group = self.param_groups[-1]
        for filters in group["params"]:
            state = self.state[filters]
            if not state:  # under the names that AdamW uses, which reads them back
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(filters)
            state["exp_avg"].lerp_(filters.grad, 1 - group["momentum"])
            direction = filters.grad.lerp(state["exp_avg"], group["momentum"])
            filters.mul_(len(filters) ** 0.5 / filters.norm())
            filters.sub_(orthogonal(direction.flatten(1)).view(filters.shape), alpha=group["lr"])
            filters.grad = None
        return super().step(closure)


def orthogonal(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """Push all singular values of a matrix towards 1, by Newton and Schulz's iteration.

    Five steps with these coefficients bring them to between 0.7 and 1.2, which is as good as 1 for a step.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class MovingAverage:
    """Exponential moving average of a model's weights and buffers, which forgets faster while it is young.

    PyTorch's `AveragedModel` counts on the device, and reading its count would stall a GPU in every step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        self.n_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model``."""
        kept = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates)) if self.n_updates else 0.0
        averages, weights = self.module.state_dict(), model.state_dict()
        for name, average in averages.items():
            if average.is_floating_point():
                average.lerp_(weights[name], 1 - kept)
            else:
                average.copy_(weights[name])
        self.n_updates += 1


def lr_factor(warmup: float | None, n_steps: int) -> Callable[[int], float]:
    """Return the share of the learning rate at each step: linear rise, then half a cosine to zero."""
    if warmup is None:
        return lambda _: 1.0
    rise = max(1, round(warmup * n_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, n_steps - rise)))

    return factor


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
        raise _not_a_number(config, epoch, f"batch {int(bad[0])}")


def _not_a_number(config: TrainConfig, epoch: int, where: str) -> FmaNbError:
    return FmaNbError(
        f"{config.model}: the loss is not a number in epoch {epoch}, {where}; the checkpoints are those of "
        f"the epoch before. Try a smaller lr. Configuration: {asdict(config)}"
    )


def autocast(device: torch.device, bfloat16: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which convolutions run in bfloat16, where that is wanted and pays."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and bfloat16_pays(device))


def augment(images: Tensor, labels: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor, float]:
    """Turn a training batch of grey levels into inputs, each ingredient where the recipe has it.

    Returns
    -------
    inputs [shape=(batch, 1, n_mels, n_frames)]
        The augmented spectrograms.
    partner [shape=(batch,)]
        The second label of each mixed clip.
    share
        The weight of the first label; 1 without mixup.
    """
    images = warp(images, config)
    inputs = to_input(images)
    if config.gain:
        inputs = colour(inputs, config.gain / DYNAMIC_RANGE_DB)
    n_mels, n_frames = inputs.shape[2:]
    if config.freq_mask:
        width = round(config.freq_mask * n_mels)
        inputs = torchaudio.transforms.FrequencyMasking(width, iid_masks=True)(inputs)
    if config.time_mask:
        width = round(config.time_mask * n_frames)
        inputs = torchaudio.transforms.TimeMasking(width, iid_masks=True)(inputs)
    if not config.mixup:
        return inputs, labels, 1.0
    share = random.betavariate(config.mixup, config.mixup)
    share = max(share, 1 - share)
    return torch.lerp(inputs.roll(1, 0), inputs, share), labels.roll(1, 0), share


def warp(images: Tensor, config: TrainConfig) -> Tensor:
    """Rotate, crop, stretch and transpose each clip by its own random amounts.

    ``images`` has the shape (batch, n_mels, n_frames). A clip is rotated in time: what leaves at its end
    comes in at its start. Mel bands that come in from beyond the edge repeat the band at the edge.
    """
    if not (config.time_shift or config.stretch or config.mel_shift or config.crop < 1):
        return images
    n_clips, n_mels, n_frames = images.shape
    n_kept = max(1, round(config.crop * n_frames))
    draw = torch.rand(3, n_clips, 1, device=images.device)
    if config.time_shift or config.stretch or n_kept < n_frames:
        start = (draw[0] * (n_frames if config.time_shift else n_frames - n_kept + 1)).floor()
        speed = 1 + config.stretch * (2 * draw[1] - 1)
        frames = (start + speed * torch.arange(n_kept, device=images.device)).long() % n_frames
        images = images.gather(2, frames[:, None, :].expand(-1, n_mels, -1))
    if config.mel_shift:
        shift = ((2 * config.mel_shift + 1) * draw[2]).long() - config.mel_shift
        bands = (torch.arange(n_mels, device=images.device) + shift).clamp(0, n_mels - 1)
        images = images.gather(1, bands[:, :, None].expand(-1, -1, images.shape[2]))
    return images


def colour(inputs: Tensor, spread: float, n_knots: int = 6) -> Tensor:
    """Add a random smooth curve over the mel bands to each clip's levels, as another recording would have.

    ``inputs`` [shape=(batch, 1, n_mels, n_frames)] are levels from 0 to 1; what is at the floor stays there.
    """
    n_mels = inputs.shape[2]
    knots = spread * torch.randn(len(inputs), n_knots, device=inputs.device)
    place = torch.linspace(0, n_knots - 1, n_mels, device=inputs.device)
    left = place.long().clamp(max=n_knots - 2)
    curve = torch.lerp(knots[:, left], knots[:, left + 1], place - left)
    return torch.where(inputs > 0, inputs + curve[:, None, :, None], 0).clamp_(min=0)


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
    if not isinstance(content, dict) or not set(CHECKPOINT_KEYS) <= content.keys():
        raise FmaNbError(f"{path} is not a checkpoint of this project: remove it.")
    return content


def saved_config(path: Path, saved: dict[str, Any]) -> TrainConfig:
    """Return the configuration in a checkpoint, or raise `FmaNbError` when it is of another version."""
    try:
        return TrainConfig(**saved["config"])
    except TypeError as error:
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
        ("model", saved["config"]["model"], model),
        ("preset", saved["preset"], pack.preset),
        ("genres", tuple(saved["genres"]), pack.genres),
    ):
        if found != wanted:
            raise FmaNbError(f"{path} is a checkpoint of {what} {found!r}, not {wanted!r}.")
    config = saved_config(path, saved)
    network = build_model(model, len(pack.genres), *saved["image_shape"], **config.architecture())
    try:
        network.load_state_dict(saved["model_state"])
    except RuntimeError as error:
        raise FmaNbError(f"{path} holds weights of another architecture: train again.") from error
    return to_device(network, device)


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


def read_log(path: Path) -> pd.DataFrame:
    """Read a training log: a row an epoch, columns `LOG_COLUMNS`.

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
    return rows


def keep_seeds(path: Path, kept: Sequence[int]) -> None:
    """Drop the rows of other seeds from a log: what an earlier run with more seeds left there."""
    log = read_log(path)
    if not log["seed"].isin(kept).all():
        with atomic_path(path) as temporary:
            log[log["seed"].isin(kept)].to_csv(temporary, index=False)


def changed_config(config: TrainConfig, changes: Iterable[tuple[str, str]]) -> TrainConfig:
    """Return a configuration with fields changed by name, their values given as text.

    Raises
    ------
    FmaNbError
        When there is no such field, or its value is of another type or out of range.
    """
    types = {field.name: type(field.default) for field in fields(TrainConfig)} | {"warmup": float}
    given: dict[str, Any] = {}
    for name, text in changes:
        if name not in types:
            raise FmaNbError(f"-p {name}: the recipe has no such field; it has {', '.join(sorted(types))}.")
        given[name] = typed(name, text, types[name])
    return replace(config, **given)


def typed(name: str, text: str, kind: type) -> Any:
    """Turn the text of ``-p NAME TEXT`` into a value of a type, or raise `FmaNbError`."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise FmaNbError(f"-p {name} {text}: not a value of type {kind.__name__}.") from error


def seeds(config: TrainConfig, n_seeds: int) -> Iterator[TrainConfig]:
    """Yield the configuration with ``n_seeds`` consecutive seeds."""
    if n_seeds < 1:
        raise FmaNbError(f"n_seeds={n_seeds} must be at least 1.")
    for i in range(n_seeds):
        yield replace(config, seed=config.seed + i)
