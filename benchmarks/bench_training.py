"""How fast the CRNN trains, choice by choice, against a plain loop over an image folder.

    python benchmarks/bench_training.py [--dataset fma_mini] [--device cpu] [--steps 40] [--rounds 3]

The first two lines are plain loops. From the third on every choice is added to those above it; the last is
the recipe itself, several times. Each line runs in processes of its own, several rounds in turns, because
machines drift. The share of the peak compares the network's arithmetic (forward and backward, counted by
PyTorch) with a large matrix product on the same device, in float32 or bfloat16, whichever is faster. Memory
is that of the training processes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from fma_nb.augmentation import augment
from fma_nb.bulk.pack import load_pack
from fma_nb.bulk.workers import keep_freed_memory
from fma_nb.dataset import SpectrogramDataset, make_loader
from fma_nb.model import build_model
from fma_nb.optimization import MovingAverage, make_optimizer
from fma_nb.project import spectrogram_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.training import autocast, make_deterministic, to_device

CHOICES = (
    "plain image folder, float32",
    "the same, a loading process a core",
    "pack, batches by index",
    "+ channels_last",
    "+ freed memory is kept",
    "+ bfloat16 autocast",
    "+ the recipe's augmentation",
    "+ the recipe's optimizer and average",
    "a training a core, side by side",
)
# Places in this list from which on a choice is made.
PACK, CHANNELS_LAST, KEPT_MEMORY, BFLOAT16, AUGMENTATION, RECIPE = 2, 3, 4, 5, 6, 7
SIDE_BY_SIDE = 8  # several seeds are trained anyway, and a training makes poor use of a second thread
NO_AUGMENTATION = {
    "time_shift": False,
    "stretch": 0,
    "mel_shift": 0,
    "gain": 0,
    "freq_mask": 0,
    "time_mask": 0,
}
WARM_UP_STEPS = 3
N_GENRES = 8


class ImageFolder(Dataset):
    """One PNG at a time, as most tutorials read them."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.png"))
        self.genres = sorted({path.parent.name for path in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path = self.files[index]
        image = np.asarray(Image.open(path), dtype=np.float32) / 255
        return torch.from_numpy(image)[None], self.genres.index(path.parent.name)


def batches(level: int, options: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    device = torch.device(options.device)
    if level < PACK:
        folder = ImageFolder(spectrogram_dir(options.dataset, options.preset) / "train")
        n_workers = level * (os.cpu_count() or 1)
        loader = DataLoader(
            folder,
            batch_size=32,
            shuffle=True,
            drop_last=True,
            num_workers=n_workers,
            persistent_workers=level > 0,
        )
    else:
        split = load_pack(options.dataset, options.preset).split("train")
        loader = make_loader(SpectrogramDataset(split, device), 32, shuffle=True)
    while True:
        for images, labels in loader:
            if len(images) == 32:
                yield images.to(device), labels.to(device)


def recipe_up_to(level: int) -> Recipe:
    recipe = replace(default_recipe("crnn"), bfloat16=level >= BFLOAT16)
    recipe = recipe if level >= AUGMENTATION else replace(recipe, **NO_AUGMENTATION)
    return recipe if level >= RECIPE else replace(recipe, optimizer="adamw", ema=0)


def images_per_second(level: int, options: argparse.Namespace) -> float:
    """Return the speed of training steps with the first ``level`` choices."""
    make_deterministic()
    if level >= KEPT_MEMORY:
        keep_freed_memory()
    device, recipe = torch.device(options.device), recipe_up_to(level)
    stream = batches(level, options)
    images, _ = next(stream)
    model = build_model("crnn", N_GENRES, *images.shape[-2:], **recipe.architecture()).to(device).train()
    model = to_device(model, device) if level >= CHANNELS_LAST else model
    optimizer = make_optimizer(model, recipe)
    average = MovingAverage(model, recipe.ema) if recipe.ema else None
    for step in range(options.steps + WARM_UP_STEPS):
        if step == WARM_UP_STEPS:
            _wait_for(device)
            started = time.perf_counter()
        images, labels = next(stream)
        inputs = augment(images, labels, recipe, N_GENRES)[0] if level >= PACK else images
        train_step(model, optimizer, inputs, labels, recipe)
        if average is not None:
            average.update(model)
    _wait_for(device)
    return options.steps * 32 / (time.perf_counter() - started)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
) -> None:
    with autocast(inputs.device, recipe.bfloat16):
        logits = model(inputs).float()
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_own_processes(level: int) -> tuple[float, float]:
    """Return images per second and the peak memory in MB of one choice."""
    count, threads = (os.cpu_count() or 1, {"OMP_NUM_THREADS": "1"}) if level == SIDE_BY_SIDE else (1, {})
    command = [sys.executable, *sys.argv, "--level", str(min(level, RECIPE))]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | threads) for _ in range(count)
    ]
    printed = [process.communicate()[0] for process in running]
    speeds, memories = zip(*map(json.loads, printed), strict=True)
    return sum(speeds), sum(memories)


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_flops(options: argparse.Namespace) -> float:
    """Return the floating-point operations of one training step, per image."""
    images, _ = next(batches(PACK, options))
    model = build_model("crnn", N_GENRES, *images.shape[-2:])
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(8, 1, *images.shape[-2:])).sum().backward()
    return counter.get_total_flops() / 8


def matrix_peak(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """Return the floating-point operations a second of a matrix product of n × n."""
    a = torch.rand(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(60):  # the best of many: other work on the machine only slows
        started = time.perf_counter()
        a @ a
        _wait_for(device)
        times.append(time.perf_counter() - started)
    return 2 * n**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fma_mini")
    parser.add_argument("--preset", default="compact")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--level", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.level is not None:
        speed = images_per_second(options.level, options)
        print(json.dumps([speed, peak_memory(torch.device(options.device))]))
        return
    print(f"CRNN on {options.dataset} {options.preset}, batches of 32, {options.device}, ", end="")
    print(f"{os.cpu_count()} CPU cores, {options.rounds} rounds in turns")
    n_levels = len(CHOICES) if options.device == "cpu" else SIDE_BY_SIDE
    rounds = [[in_own_processes(level) for level in range(n_levels)] for _ in range(options.rounds)]
    print_table(rounds, options)


def print_table(rounds: list[list[tuple[float, float]]], options: argparse.Namespace) -> None:
    device, flops = torch.device(options.device), step_flops(options)
    peak = max(matrix_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    speeds = [statistics.median(r[level][0] for r in rounds) for level in range(len(rounds[0]))]
    print(f"  {'':36}images/s  against the faster plain loop  of the peak  memory")
    for level, (choice, speed) in enumerate(zip(CHOICES, speeds, strict=False)):
        ratio = statistics.median(r[level][0] / max(r[0][0], r[1][0]) for r in rounds)
        memory = max(r[level][1] for r in rounds)
        print(f"  {choice:36}{speed:8.0f}{ratio:29.2f} x{speed * flops / peak:14.1%}{memory:6.0f} MB")
    epochs, n_images = default_recipe("crnn").epochs, 6394
    print(f"  {flops / 1e9:.2f} GFLOP an image; matrix peak {peak / 1e12:.2f} TFLOP/s")
    print(
        f"  the final recipe, {epochs} epochs of FMA-Small's {n_images} clips, at the recipe's speed: ",
        end="",
    )
    print(f"{epochs * n_images / speeds[RECIPE] / 60:.0f} minutes")


if __name__ == "__main__":
    main()
