"""How fast the CRNN trains, choice by choice, against a plain loop over an image folder.

    python benchmarks/bench_training.py [--dataset fma_mini] [--preset compact] [--device cpu] [--steps 12]

Every choice is added to those above it; each runs in a process of its own, several rounds in turns, because
machines drift. The share of the peak compares the network's arithmetic (forward and backward, counted by
PyTorch) with a large bfloat16 matrix product on the same device.
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
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from fma_nb.augmentation import augment
from fma_nb.dataset import SpectrogramDataset, load_pack, make_loader
from fma_nb.model import build_model
from fma_nb.optimization import make_optimizer
from fma_nb.project import keep_freed_memory, spectrogram_dir
from fma_nb.recipe import default_config
from fma_nb.training import autocast, make_deterministic, to_device

CHOICES = (
    "plain image folder, float32",
    "+ pack, batches by index",
    "+ channels_last",
    "+ freed memory is kept",
    "+ bfloat16 autocast",
    "+ the recipe's augmentation",
    "+ the recipe's optimizer",
)


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
    if level == 0:
        folder = ImageFolder(spectrogram_dir(options.dataset, options.preset) / "train")
        loader = DataLoader(folder, batch_size=32, shuffle=True, drop_last=True)
    else:
        split = load_pack(options.dataset, options.preset).split("train")
        loader = make_loader(SpectrogramDataset(split, device), 32, shuffle=True)
    while True:
        for images, labels in loader:
            if len(images) == 32:
                yield images.to(device), labels.to(device)


def images_per_second(level: int, options: argparse.Namespace) -> float:
    """Return the speed of training steps with the first ``level`` choices."""
    make_deterministic()
    if level >= 3:
        keep_freed_memory()
    device, config = torch.device(options.device), default_config("crnn")
    config = replace(config, bfloat16=level >= 4)
    stream = batches(level, options)
    images, _ = next(stream)
    model = build_model("crnn", 8, *images.shape[-2:], **config.architecture()).to(device).train()
    model = to_device(model, device) if level >= 2 else model
    kind = config.optimizer if level >= 6 else "adamw"
    optimizer = make_optimizer(model, replace(config, optimizer=kind))
    plain = replace(
        config, time_shift=False, stretch=0, mel_shift=0, gain=0, freq_mask=0, time_mask=0, mixup=0
    )
    started = 0.0
    for step in range(options.steps + 3):
        if step == 3:  # the first steps warm up
            _wait_for(device)
            started = time.perf_counter()
        images, labels = next(stream)
        inputs = images
        if level:
            inputs, _, _ = augment(images, labels, config if level >= 5 else plain)
        with autocast(device, config.bfloat16):
            logits = model(inputs).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait_for(device)
    return options.steps * 32 / (time.perf_counter() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_own_process(level: int) -> tuple[float, float]:
    """Return images per second and the peak memory in MB of one choice."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--level", str(level)], capture_output=True, text=True, check=True
    )
    speed, memory = json.loads(done.stdout)
    return speed, memory


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_flops(options: argparse.Namespace) -> float:
    """Return the floating-point operations of one training step, per image."""
    images, _ = next(batches(1, options))
    model = build_model("crnn", 8, *images.shape[-2:])
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(8, 1, *images.shape[-2:])).sum().backward()
    return counter.get_total_flops() / 8


def matrix_peak(device: torch.device, n: int = 2048) -> float:
    """Return the floating-point operations a second of a bfloat16 matrix product of n × n."""
    a = torch.rand(n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(8):
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
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--level", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.level is not None:
        speed = images_per_second(options.level, options)
        print(json.dumps([speed, peak_memory(torch.device(options.device))]))
        return
    device = torch.device(options.device)
    print(f"CRNN on {options.dataset} {options.preset}, batches of 32, {options.device}, ", end="")
    print(f"{os.cpu_count()} CPU cores, {options.rounds} rounds in turns")
    rounds = [[in_own_process(level) for level in range(len(CHOICES))] for _ in range(options.rounds)]
    peak, flops = matrix_peak(device), step_flops(options)
    for level, choice in enumerate(CHOICES):
        speed = statistics.median(r[level][0] for r in rounds)
        ratio = statistics.median(r[level][0] / r[0][0] for r in rounds)
        memory = max(r[level][1] for r in rounds)
        share = speed * flops / peak
        print(
            f"  {choice:32}{speed:8.0f} images/s {ratio:6.2f} x   {share:5.1%} of the peak   {memory:6.0f} MB"
        )
    epochs, n_images = default_config("crnn").epochs, 6394
    minutes = epochs * n_images / speed / 60
    print(f"  {flops / 1e9:.2f} GFLOP an image; matrix peak {peak / 1e12:.2f} TFLOP/s (bfloat16)")
    print(f"  the final recipe, {epochs} epochs of FMA-Small's {n_images} clips: {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
