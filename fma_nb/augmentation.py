"""Stage 6b, augmentation: no training clip looks the same twice.

Everything happens on whole batches, on the device that holds them.

References
----------
D. S. Park et al.: "SpecAugment", Interspeech 2019 (masks over time and frequency).
H. Zhang et al.: "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

from __future__ import annotations

import random

import torch
import torchaudio
from torch import Tensor

from fma_nb.dataset import to_input
from fma_nb.recipe import TrainConfig
from fma_nb.spectrogram import DYNAMIC_RANGE_DB


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
