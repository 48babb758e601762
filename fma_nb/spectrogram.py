"""Stage 3, spectrogram: from the samples of one clip to its log-mel spectrogram, and to a PNG.

One 8-bit grey PNG a track, ``<dataset>-<preset>/{train,val,test}/<Genre>/000002.png``: height = mel
bands with the highest on top, width = frames, grey = ``(dB + 80) / 80 * 255``. Decibels are relative to
the clip's own maximum, which is the per-track normalisation. Notebook 02 derives every step;
`fma_nb.bulk.spectrograms` does the same for every clip of a dataset.

References
----------
M. Slaney: "Auditory Toolbox", 1998 (the mel scale used by librosa and here).
B. McFee et al.: "librosa: Audio and Music Signal Analysis in Python", SciPy 2015.
"""

import functools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from fma_nb.audio import Samples, UnreadableClipError, load_clip
from fma_nb.project import FmaNbError, atomic_path

DYNAMIC_RANGE_DB = 80.0
POWER_FLOOR = 1e-10
FRAMES_PER_BLOCK = 64
BANDS_PER_GROUP = 8

Decibels = npt.NDArray[np.float32]
GreyImage = npt.NDArray[np.uint8]
_Filters = tuple[slice, slice, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Preset:
    """How spectrograms are made."""

    name: str  # full or compact
    sample_rate: int | None  # Hz to resample to; None keeps each file's own
    n_fft: int = 2048  # window length of the short-time Fourier transform, in samples
    hop_length: int = 512  # its step, in samples
    n_mels: int = 128  # number of mel bands
    n_frames: int | None = None  # keep this many frames, evenly spaced over the clip; None keeps all


PRESETS = {
    "full": Preset("full", sample_rate=22_050),
    "compact": Preset("compact", sample_rate=None, n_frames=128),
}


def get_preset(name: str) -> Preset:
    """Return a preset by its name, or raise `FmaNbError` that lists the names."""
    if name not in PRESETS:
        raise FmaNbError(f"preset={name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def log_mel(samples: Samples, sample_rate: int, preset: Preset) -> Decibels:
    """Return the log-mel spectrogram in dB [shape=(n_mels, n_frames)], lowest band first.

    The reference is the clip's maximum over ALL frames, also where only some frames are kept. Where that
    is below 0.01, the floor lies less than 80 dB below it: powers under 1e-10 count as 1e-10, as in librosa.
    Raises `FmaNbError` when the samples have another rate than the preset.
    """
    if preset.sample_rate not in (None, sample_rate):
        raise FmaNbError(f"sample_rate={sample_rate}: preset {preset.name!r} wants {preset.sample_rate} Hz.")
    power = mel_power(samples, sample_rate, preset)
    reference = float(power.max())
    return power_to_db(power[:, frame_indices(power.shape[1], preset)], reference)


def mel_power(samples: Samples, sample_rate: int, preset: Preset) -> npt.NDArray[np.float32]:
    """Return the mel power spectrogram [shape=(n_mels, n_frames)] of mono samples.

    Slaney's mel scale with area-normalised filters and centred, zero-padded frames: the same numbers
    as ``librosa.feature.melspectrogram`` and ``torchaudio.transforms.MelSpectrogram`` (with
    ``norm="slaney", mel_scale="slaney", pad_mode="constant"``) give, two to three times faster, and
    without PyTorch's 450 MB in every worker.
    """
    padded = np.pad(samples, preset.n_fft // 2)
    frames = sliding_window_view(padded, preset.n_fft)[:: preset.hop_length]  # a view: no sample is copied
    window, filters = _window_and_filters(sample_rate, preset)
    power = np.empty((len(frames), preset.n_mels), dtype=np.float32)
    # Blocks of frames that fit into the processor's cache, which a whole clip's spectrum would not, with
    # products so small that BLAS keeps to one thread: every core has a clip of its own.
    for start in range(0, len(frames), FRAMES_PER_BLOCK):
        block = slice(start, start + FRAMES_PER_BLOCK)
        spectrum = scipy.fft.rfft(frames[block] * window, overwrite_x=True)
        energy = spectrum.real**2 + spectrum.imag**2
        for bands, bins, weights in filters:
            power[block, bands] = energy[:, bins] @ weights
    return power.T


@functools.cache
def _window_and_filters(sample_rate: int, preset: Preset) -> tuple[npt.NDArray[np.float32], list[_Filters]]:
    """Return the Hann window, and the mel filter bank in groups: nine tenths of it are zeros.

    A group is a few neighbouring mel bands, the FFT bins where their filters are not zero, and the weights.
    """
    bank = mel_filter_bank(sample_rate, preset.n_fft, preset.n_mels).T
    filters = []
    for first in range(0, preset.n_mels, BANDS_PER_GROUP):
        bands = slice(first, first + BANDS_PER_GROUP)
        used = np.flatnonzero(bank[:, bands].any(axis=1))
        bins = slice(int(used.min()), int(used.max()) + 1) if len(used) else slice(0, 1)
        filters.append((bands, bins, np.ascontiguousarray(bank[bins, bands])))
    return np.hanning(preset.n_fft + 1)[:-1].astype(np.float32), filters


def mel_filter_bank(sample_rate: int, n_fft: int, n_mels: int) -> npt.NDArray[np.float32]:
    """Return Slaney's mel filters [shape=(n_mels, n_fft // 2 + 1)]: triangles of equal area over Hz."""
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate / 2), n_mels + 2))[:, None]
    bins = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    weights: npt.NDArray[np.float64] = np.maximum(triangles, 0) * 2 / (upper - lower)
    return weights.astype(np.float32)


def _hz_to_mel(hz: float) -> float:
    """Slaney's mel: 66.7 Hz a mel up to 1 kHz; above, 27 mels for each factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000, 6.4)


def _mel_to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def power_to_db(power: npt.NDArray[np.float32], reference: float) -> Decibels:
    """Convert power to decibels relative to ``reference``, limited to the range -80 to 0 dB."""
    db = 10 * np.log10(np.maximum(power, np.float32(POWER_FLOOR)))
    db -= np.float32(10 * math.log10(max(reference, POWER_FLOOR)))
    limited: Decibels = np.clip(db, -DYNAMIC_RANGE_DB, 0, out=db)
    return limited


def frame_indices(n_frames: int, preset: Preset) -> npt.NDArray[np.int64]:
    """Return which of a clip's ``n_frames`` frames a preset keeps: frame ``int((i + 0.5) * T / n)``."""
    if preset.n_frames is None:
        return np.arange(n_frames)
    return ((np.arange(preset.n_frames) + 0.5) * n_frames / preset.n_frames).astype(np.int64)


def to_grey(db: Decibels) -> GreyImage:
    """Turn decibels from -80 to 0 [shape=(n_mels, n_frames)] into grey levels, the highest band on top."""
    grey = (db[::-1] + DYNAMIC_RANGE_DB) / DYNAMIC_RANGE_DB * 255
    return np.rint(grey.clip(0, 255)).astype(np.uint8)


def to_decibels(grey: GreyImage) -> Decibels:
    """Turn grey levels back into decibels [shape=(n_mels, n_frames)], lowest band first."""
    shares: Decibels = grey[::-1].astype(np.float32) / np.float32(255)
    return (shares - 1) * np.float32(DYNAMIC_RANGE_DB)


def read_png(path: Path) -> GreyImage:
    """Read a spectrogram PNG [shape=(n_mels, n_frames)]; 16-bit grey and grey saved as colour are converted.

    Raises `FmaNbError` when the file is not a picture in grey.
    """
    try:
        with Image.open(path) as image:
            grey, mode = _grey_levels(image), image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FmaNbError(f"{path} is not a readable PNG: remove it and make it again.") from error
    if grey is None:
        raise FmaNbError(f"{path} is not a picture in grey ({mode}): save it as 8-bit grey, or remove it.")
    return grey


def _grey_levels(image: Image.Image) -> GreyImage | None:
    """Return an image as 8-bit grey levels, or ``None`` where that would lose a colour or transparency."""
    if image.mode == "L":
        return np.asarray(image)
    if image.mode.startswith("I"):  # 16 bit
        return np.rint(np.asarray(image) / 257).astype(np.uint8)
    rgba = np.asarray(image.convert("RGBA"))
    grey: GreyImage = rgba[..., 0]
    return grey if (rgba == np.dstack([grey, grey, grey, np.full_like(grey, 255)])).all() else None


def clip_to_grey(path: Path, preset: Preset) -> GreyImage:
    """Turn one audio file into the grey image of its log-mel spectrogram, or raise `UnreadableClipError`."""
    samples, sample_rate = load_clip(path, preset.sample_rate)
    return to_grey(log_mel(samples, sample_rate, preset))


def make_spectrogram(audio: Path, png: Path, preset: Preset) -> str | None:
    """Make one clip's PNG; return the reason when the clip has to be skipped, else ``None``."""
    try:
        grey = clip_to_grey(audio, preset)
    except UnreadableClipError as error:
        return str(error)
    with atomic_path(png) as temporary:
        # Run-length coding suits spectrograms: many neighbouring pixels are at the floor.
        Image.fromarray(grey).save(temporary, format="PNG", compress_type=zlib.Z_RLE)
    return None


def png_path(folder: Path, split: str, genre: str, track_id: int) -> Path:
    """Return where a track's PNG lies below a spectrogram folder."""
    return folder / split / genre / png_name(track_id)


def png_name(track_id: int) -> str:
    """Return the file name of a track's spectrogram."""
    return f"{track_id:06d}.png"
