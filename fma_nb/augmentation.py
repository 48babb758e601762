"""Stage 6, augmentation: random changes of the training clips that leave their genre as it is.

Everything happens on whole batches, on the device that holds them.

References
----------
D. S. Park et al.: "SpecAugment", Interspeech 2019 (masks over time and frequency).
H. Nam et al.: "FilterAugment", ICASSP 2022 (random curves over frequency).
H. Zhang et al.: "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

import random

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from fma_nb.dataset import to_input
from fma_nb.recipe import Recipe
from fma_nb.spectrogram import DYNAMIC_RANGE_DB

EQUALIZER_KNOTS = 6


def augment(images: Tensor, labels: Tensor, recipe: Recipe, n_classes: int) -> tuple[Tensor, Tensor]:
    """Turn a training batch into inputs and targets, with each ingredient that the recipe has.

    ``images`` are grey levels [shape=(batch, n_mels, n_frames)], ``labels`` their genres [shape=(batch,)].
    Inputs are the augmented spectrograms [shape=(batch, 1, n_mels, n_frames)]; masks hold 0, the floor.
    Targets are the labels as they are, or with mixup each genre's probability [shape=(batch, n_classes)].
    """
    inputs = to_input(shift_and_stretch(images, recipe))
    if recipe.gain:
        inputs = random_equalizer(inputs, recipe.gain / DYNAMIC_RANGE_DB)
    n_mels, n_frames = inputs.shape[2:]
    if recipe.freq_mask:
        width = round(recipe.freq_mask * n_mels)
        inputs = torchaudio.transforms.FrequencyMasking(width, iid_masks=True)(inputs)
    if recipe.time_mask:
        width = round(recipe.time_mask * n_frames)
        inputs = torchaudio.transforms.TimeMasking(width, iid_masks=True)(inputs)
    return mixup(inputs, labels, recipe.mixup, n_classes) if recipe.mixup else (inputs, labels)


def mixup(inputs: Tensor, labels: Tensor, alpha: float, n_classes: int) -> tuple[Tensor, Tensor]:
    """Blend each clip and its one-hot label with its neighbour's; the larger share, from Beta, is its own."""
    weight = random.betavariate(alpha, alpha)
    weight = max(weight, 1 - weight)
    one_hot = F.one_hot(labels, n_classes).float()
    return torch.lerp(inputs.roll(1, 0), inputs, weight), torch.lerp(one_hot.roll(1, 0), one_hot, weight)


def shift_and_stretch(images: Tensor, recipe: Recipe) -> Tensor:
    """Shift each clip in time and along the mel axis, crop and stretch it, by its own random amounts.

    ``images`` has the shape (batch, n_mels, n_frames). Time is circular: what leaves at a clip's end comes
    in at its start. A stretch takes the nearest frame. Mel bands that come in from beyond the edge repeat
    the band at the edge.
    """
    if not (recipe.time_shift or recipe.stretch or recipe.mel_shift or recipe.crop < 1):
        return images
    n_clips, n_mels, n_frames = images.shape
    n_kept = max(1, round(recipe.crop * n_frames))
    draw = torch.rand(3, n_clips, 1, device=images.device)
    if recipe.time_shift or recipe.stretch or n_kept < n_frames:
        start = (draw[0] * (n_frames if recipe.time_shift else n_frames - n_kept + 1)).floor()
        speed = 1 + recipe.stretch * (2 * draw[1] - 1)
        frames = (start + speed * torch.arange(n_kept, device=images.device)).long() % n_frames
        images = images.gather(2, frames[:, None, :].expand(-1, n_mels, -1))
    if recipe.mel_shift:
        shift = ((2 * recipe.mel_shift + 1) * draw[2]).long() - recipe.mel_shift
        bands = (torch.arange(n_mels, device=images.device) + shift).clamp(0, n_mels - 1)
        images = images.gather(1, bands[:, :, None].expand(-1, -1, images.shape[2]))
    return images


def random_equalizer(inputs: Tensor, spread: float) -> Tensor:
    """Add a random curve over the mel bands to each clip's levels, as an equalizer does.

    ``inputs`` are levels from 0 to 1 [shape=(batch, 1, n_mels, n_frames)]. What is at the floor stays there;
    the loudest may exceed 1. The curve is made of straight lines between knots; ``spread`` is its standard
    deviation there, in the units of ``inputs``: 1 is 80 dB.
    """
    knots = spread * torch.randn(len(inputs), EQUALIZER_KNOTS, device=inputs.device)
    place = torch.linspace(0, EQUALIZER_KNOTS - 1, inputs.shape[2], device=inputs.device)
    left = place.long().clamp(max=EQUALIZER_KNOTS - 2)
    curve = torch.lerp(knots[:, left], knots[:, left + 1], place - left)
    return torch.where(inputs > 0, inputs + curve[:, None, :, None], 0).clamp_(min=0)
