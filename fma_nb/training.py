"""Stage 7, training: one epoch, evaluation, and what makes both repeatable.

Notebook 03 writes the plain loop in view, notebook 04 says what each ingredient of the CRNN's recipe is
for. `fma_nb.runs.fit` calls this epoch by epoch, with checkpoints and an exact resume.
"""

import contextlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fma_nb.augmentation import augment
from fma_nb.dataset import Batch, Pack, to_input
from fma_nb.model import build_model
from fma_nb.optimization import MovingAverage, lr_factor, make_optimizer
from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe


@dataclass
class TrainingState:
    """What one epoch needs: the weights, what turns gradients into steps, and the number of genres."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    average: MovingAverage | None
    n_classes: int

    @property
    def evaluated_model(self) -> nn.Module:
        """Return the model that is evaluated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module


def start_training(recipe: Recipe, pack: Pack, device: torch.device) -> TrainingState:
    """Return a `TrainingState` with first random weights; this seeds all generators."""
    seed_everything(recipe.seed)
    model = build_model(recipe.model, len(pack.genres), *pack.image_shape, **recipe.architecture())
    model = to_device(model, device)
    optimizer = make_optimizer(model, recipe)
    steps_per_epoch = -(-len(pack.split("train")) // recipe.batch_size)
    factor = lr_factor(recipe.warmup, recipe.epochs * steps_per_epoch)
    average = MovingAverage(model, recipe.ema) if recipe.ema else None
    return TrainingState(model, optimizer, LambdaLR(optimizer, factor), average, len(pack.genres))


def train_one_epoch(state: TrainingState, loader: DataLoader[Batch], recipe: Recipe) -> tuple[float, float]:
    """Take one optimizer step per batch; return the mean loss and accuracy over the clips seen.

    Not comparable with `evaluate`: these are augmented clips, dropout is on, labels are smoothed, and the
    weights are those before averaging. Sums stay on the device until the end: asking for a number in every
    step would stall a GPU. At the end `FloatingPointError` names a batch without a finite loss.
    """
    state.model.train()
    losses, n_correct, n_clips = [], [], 0
    for images, labels in loader:
        inputs, targets = augment(images, labels, recipe, state.n_classes)
        with autocast(labels.device, recipe.bfloat16):
            logits = state.model(inputs).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.scheduler.step()
        if state.average is not None:
            state.average.update(state.model)
        losses.append(loss.detach() * len(labels))
        n_correct.append((logits.detach().argmax(1) == labels).sum())
        n_clips += len(labels)
    epoch_losses = torch.stack(losses)
    if len(bad := (~torch.isfinite(epoch_losses)).nonzero()):
        raise FloatingPointError(f"batch {int(bad[0]) + 1}")
    return float(epoch_losses.sum() / n_clips), float(torch.stack(n_correct).sum() / n_clips)


def evaluate(model: nn.Module, loader: DataLoader[Batch], bfloat16: bool) -> tuple[float, float]:
    """Return a model's mean cross-entropy and accuracy over all clips of a loader."""
    logits, labels = predict_logits(model, loader, bfloat16)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def predict_logits(model: nn.Module, loader: DataLoader[Batch], bfloat16: bool) -> tuple[Tensor, Tensor]:
    """Return the logits [shape=(n_clips, n_classes)] and labels [shape=(n_clips,)] of a loader's clips.

    Dropout is off and batch normalisation uses its running statistics.
    """
    model.eval()
    logits, targets = [], []
    with torch.inference_mode():
        for images, labels in loader:
            with autocast(labels.device, bfloat16):
                logits.append(model(to_input(images)).float())
            targets.append(labels)
    return torch.cat(logits).cpu(), torch.cat(targets).cpu()


def autocast(device: torch.device, bfloat16: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which layers compute in bfloat16, where that is wanted and done in hardware."""
    if device.type == "cuda":
        in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        in_hardware = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 and in_hardware)


def resolve_device(name: str, gpu_memory_fraction: float = 1.0) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into a device, and cap this process's share of GPU memory.

    Raises `FmaNbError` when the name is unknown, CUDA is asked for but absent, or the share is not in (0, 1].
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


def device_name(device: torch.device) -> str:
    """Return a name for the result table: the GPU's, or the number of CPU threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, its convolution weights laid out channels last, which is faster."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_deterministic() -> None:
    """Ask PyTorch for the same bits every time, on the CPU and on CUDA (see also `fma_nb.__init__`)."""
    torch.use_deterministic_algorithms(True)
    # To fill new tensors with NaN before they are written costs time and changes nothing here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed ``random``, NumPy and PyTorch (all devices) from a seed and an epoch."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
