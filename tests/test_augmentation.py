"""Stage 6b: what is random about a training clip, and what stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from training_data import batch

from fma_nb.augmentation import augment, random_equalizer, shift_and_stretch
from fma_nb.dataset import to_input
from fma_nb.recipe import Recipe
from fma_nb.spectrogram import DYNAMIC_RANGE_DB


def test_without_ingredients_a_batch_stays_as_it_is() -> None:
    images, labels = batch()
    inputs, targets = augment(images, labels, Recipe(), 8)
    assert torch.equal(inputs, to_input(images))
    assert torch.equal(targets, labels)


# ----- shifts and stretches -----


def numbered(n_clips: int = 64, n_mels: int = 40, n_frames: int = 50) -> torch.Tensor:
    """Clips in which every pixel has a number of its own, which `origins` reads."""
    numbers = torch.arange(n_clips * 100 * 100).reshape(n_clips, 100, 100)
    return numbers[:, :n_mels, :n_frames]


def origins(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the source frame of every frame and the source band of every band of each clip.

    Whole frames and bands have moved, and no clip has got anything from another one.
    """
    clips, bands, frames = images // 10_000, images // 100 % 100, images % 100
    assert torch.equal(clips, torch.arange(len(images))[:, None, None].expand(images.shape))
    assert torch.equal(frames, frames[:, :1].expand(images.shape))
    assert torch.equal(bands, bands[:, :, :1].expand(images.shape))
    return frames[:, 0], bands[:, :, 0]


def moved(seed: int = 0, **ingredients: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return origins(shift_and_stretch(numbered(), Recipe(**ingredients)))


def test_nothing_moves_without_being_asked_for() -> None:
    images = numbered()
    others = Recipe(gain=5.0, freq_mask=0.3, time_mask=0.3, mixup=0.3)
    for recipe in (Recipe(), others):
        assert torch.equal(shift_and_stretch(images, recipe), images)


@pytest.mark.parametrize("time_shift", [True, False])
def test_a_crop_is_a_stretch_of_each_clip_from_a_random_start(time_shift: bool) -> None:
    frames, _ = moved(crop=0.4, time_shift=time_shift)
    assert frames.shape == (64, 20)
    torch.testing.assert_close(frames, (frames[:, :1] + torch.arange(20)) % 50)
    wraps = (frames.diff(dim=1) < 0).any(dim=1)
    assert wraps.any() if time_shift else not wraps.any()
    starts = set(frames[:, 0].tolist())
    for seed in range(1, 9):
        starts |= set(moved(seed, crop=0.4, time_shift=time_shift)[0][:, 0].tolist())
    assert starts == set(range(50 if time_shift else 31))  # every start occurs, the last one too


def test_shifting_rotates_every_clip_on_its_own() -> None:
    images, labels = batch(32)
    torch.manual_seed(0)
    shifted = shift_and_stretch(images, Recipe(time_shift=True))
    assert shifted.dtype == images.dtype
    shifts = []
    for before, after in zip(images, shifted, strict=True):
        fitting = [k for k in range(50) if torch.equal(before.roll(k, dims=1), after)]
        assert len(fitting) == 1
        shifts += fitting
    assert len(set(shifts)) > 10

    torch.manual_seed(0)
    inputs, _ = augment(images, labels, Recipe(time_shift=True), 32)
    assert torch.equal(inputs, to_input(shifted))


def test_every_shift_occurs() -> None:
    frames, bands = moved(time_shift=True)
    more, _ = moved(seed=1, time_shift=True)
    starts = torch.cat([frames[:, 0], more[:, 0]])
    assert starts.min() < 5 and starts.max() >= 45
    assert torch.equal(bands, torch.arange(40).expand(bands.shape))


@pytest.mark.parametrize("stretch", [0.1, 0.5, 0.9])
def test_stretching_plays_every_clip_at_its_own_speed(stretch: float) -> None:
    frames, bands = moved(stretch=stretch)
    assert torch.equal(bands, torch.arange(40).expand(bands.shape))
    assert (frames[:, 0] == 0).all()
    advance = frames.diff(dim=1) % 50  # it begins again where the clip ends
    speeds = advance.sum(dim=1) / 49
    assert (speeds > 1 - stretch - 1 / 49).all() and (speeds <= 1 + stretch).all()
    assert speeds.min() < 1 - 0.8 * stretch and speeds.max() > 1 + 0.8 * stretch
    assert len({tuple(clip) for clip in frames.tolist()}) > 20
    # A speed that is steady: each step is one of two neighbouring whole numbers.
    assert (advance.amax(dim=1) - advance.amin(dim=1) <= 1).all()
    for clip, speed in zip(frames, speeds.tolist(), strict=True):
        ideal = speed * np.arange(50)
        away = np.abs((clip.numpy() - ideal + 25) % 50 - 25)
        assert away.max() <= 2


@pytest.mark.parametrize("furthest", [1, 3])
def test_mel_shift_moves_every_clip_by_whole_bands(furthest: int) -> None:
    frames, bands = moved(mel_shift=furthest)
    assert torch.equal(frames, torch.arange(50).expand(frames.shape))
    shifts = (bands[:, 20] - 20).tolist()
    for clip, shift in zip(bands, shifts, strict=True):
        assert torch.equal(clip, (torch.arange(40) + shift).clamp(0, 39))  # the edge is repeated
    assert set(shifts) == set(range(-furthest, furthest + 1))
    assert max(shifts.count(shift) for shift in shifts) < 64 * 2 / (2 * furthest + 1)


def test_a_mel_shift_beyond_the_image_leaves_the_edge() -> None:
    torch.manual_seed(0)
    _, bands = origins(shift_and_stretch(numbered(n_mels=4), Recipe(mel_shift=64)))
    assert {tuple(clip) for clip in bands.tolist()} >= {(0, 0, 0, 0), (3, 3, 3, 3)}


def test_shifts_and_speeds_are_drawn_apart() -> None:
    """All at once: frames stay frames of their clip, and no draw can be told from another one."""
    frames, bands = moved(time_shift=True, stretch=0.2, mel_shift=3)
    assert len({tuple(clip) for clip in frames.tolist()}) > 60
    speeds = (frames.diff(dim=1) % 50).sum(dim=1) / 49
    draws = torch.stack([frames[:, 0].float(), speeds, (bands[:, 20] - 20).float()])
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.4
    again, _ = moved(time_shift=True, stretch=0.2, mel_shift=3)
    other, _ = moved(seed=1, time_shift=True, stretch=0.2, mel_shift=3)
    assert torch.equal(frames, again)
    assert not torch.equal(frames, other)


# ----- the equalizer -----


def levels(n_clips: int = 400, n_mels: int = 41, n_frames: int = 6) -> torch.Tensor:
    """Inputs in the middle of their range."""
    generator = torch.Generator().manual_seed(0)
    return 0.4 + 0.2 * torch.rand(n_clips, 1, n_mels, n_frames, generator=generator)


def curves(equalized: torch.Tensor, inputs: torch.Tensor) -> np.ndarray:
    """Return what was added to each clip's mel bands; it must be the same in all frames."""
    added = equalized - inputs
    torch.testing.assert_close(added, added[..., :1].expand(added.shape), atol=1e-6, rtol=0)
    return added[:, 0, :, 0].numpy()


def test_the_equalizer_is_a_smooth_curve_of_each_clip() -> None:
    torch.manual_seed(0)
    added = curves(random_equalizer(levels(), 0.02), levels())
    knots = added[:, ::8]  # 41 bands: 6 knots with 8 steps between them
    for curve, at_knots in zip(added, knots, strict=True):
        straight = np.interp(np.arange(41), np.arange(0, 41, 8), at_knots)
        np.testing.assert_allclose(curve, straight, atol=1e-6)
    assert knots.std(axis=0) == pytest.approx(0.02, rel=0.15)  # between clips
    assert knots.std(axis=1).mean() == pytest.approx(0.02, rel=0.15)  # and within one: not one loudness
    assert np.abs(knots.mean(axis=0)).max() < 0.004
    assert len(np.unique(added.round(6), axis=0)) == 400

    torch.manual_seed(0)
    np.testing.assert_allclose(curves(random_equalizer(levels(), 0.04), levels()), 2 * added, atol=1e-6)


def test_the_equalizer_leaves_silence_silent() -> None:
    torch.manual_seed(0)
    inputs = levels()
    inputs[:, :, 5:30, 2:4] = 0
    equalized = random_equalizer(inputs, 0.5)
    assert (equalized[inputs == 0] == 0).all()
    assert equalized.min() == 0  # what falls below the floor is at the floor
    assert (equalized[inputs > 0] > 0.6).any()
    assert torch.equal(inputs[:, :, 0], levels()[:, :, 0])  # and the batch itself is left alone


def test_gain_is_in_decibels() -> None:
    images = torch.full((400, 41, 6), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    inputs, _ = augment(images, torch.zeros(400), Recipe(gain=5.0), 8)
    added = curves(inputs, to_input(images)) * DYNAMIC_RANGE_DB
    assert added[:, ::8].std() == pytest.approx(5.0, rel=0.1)


# ----- masks and mixup -----


@pytest.mark.parametrize(("name", "axis", "longest"), [("freq_mask", 2, 12), ("time_mask", 3, 15)])
def test_masks_blank_one_stretch_of_each_clip(name: str, axis: int, longest: int) -> None:
    images, labels = batch(64)
    torch.manual_seed(0)
    inputs, targets = augment(images, labels, Recipe(**{name: 0.3}), 64)
    original = to_input(images)
    assert torch.equal(targets, labels)
    masked = inputs == 0  # no grey level of the batch is 0
    assert torch.equal(inputs[~masked], original[~masked])
    widths = []
    for clip in masked:
        lines = clip.unsqueeze(0).all(dim=5 - axis)[0, 0]  # which whole bands or frames are blank
        assert clip.sum() == lines.sum() * clip.shape[4 - axis]  # and nothing else is
        where = lines.nonzero().flatten()
        widths.append(len(where))
        assert len(where) == 0 or where[-1] - where[0] + 1 == len(where)
    assert longest * 0.6 < max(widths) <= longest
    assert len(set(widths)) > 5


def test_mixup_blends_clips_and_their_labels_in_pairs() -> None:
    """The labels number the clips, so a clip's targets must be its shares of all clips."""
    images, labels = batch()
    original = to_input(images)
    shares = []
    for _ in range(50):
        inputs, targets = augment(images, labels, Recipe(mixup=0.3), 10)
        assert targets.shape == (8, 10)
        blended = torch.einsum("bk,kcmt->bcmt", targets[:, :8], original)
        torch.testing.assert_close(inputs, blended)
        for axis in (0, 1):  # every clip is given away as often as it is kept
            torch.testing.assert_close(targets[:, :8].sum(axis), torch.ones(8))
        assert ((targets > 0).sum(1) <= 2).all()
        own = targets.diagonal()
        assert torch.equal(own, own[:1].expand(8))  # one share for the batch, and no clip is its own partner
        shares.append(float(own[0]))
    assert 0.5 <= min(shares) < max(shares) <= 1
    assert len(set(shares)) > 40
