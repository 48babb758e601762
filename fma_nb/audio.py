"""Stage 2, audio: from an MP3 to mono samples, or to a reason why the clip cannot be used.

Decoding is libsndfile's (through ``soundfile``), resampling libsoxr's: both are what librosa uses
underneath, called without the detours. Notebook 02 takes the same steps one by one.

Read are MP3, OGG (Vorbis, Opus), FLAC, WAV, AIFF and all else that libsndfile knows. M4A, AAC, WMA and
WebM are not read: ``ffmpeg -i song.m4a song.wav`` converts them. A damaged clip is used
where three quarters of the length in its header decode.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from fma_nb.codec.decoding import ENDLESS, open_audio
from fma_nb.codec.decoding import Samples as Samples
from fma_nb.codec.decoding import UnreadableClipError as UnreadableClipError

CLIP_SECONDS = 30.0
MIN_SECONDS = 5.0
# A clip must hold this share of what its header promises.
MIN_SHARE = 0.75
# Left and right cancel each other where their mean is so much softer than they are: 60 dB.
CANCELLED = 1e-3


@dataclass(frozen=True)
class ClipInfo:
    """What a file's header says: sample rate (Hz), number of channels, duration (s)."""

    sample_rate: int
    n_channels: int
    seconds: float


def probe(path: Path) -> ClipInfo:
    """Read a clip's sample rate (Hz), channels and duration (s); decode it only where no header has that.

    Raises `UnreadableClipError` when the file is missing, empty or holds no audio that libsndfile knows.
    """
    with open_audio(path) as audio:
        n_frames = audio.promised if audio.promised is not None else audio.skip(ENDLESS)
        return ClipInfo(audio.sample_rate, audio.n_channels, n_frames / audio.sample_rate)


def load_clip(
    path: Path,
    sample_rate: int | None = None,
    *,
    offset: float = 0.0,
    seconds: float = CLIP_SECONDS,
    min_seconds: float = MIN_SECONDS,
) -> tuple[Samples, int]:
    """Decode a clip, average its channels to mono, resample it; return samples [shape=(n_samples,)] and rate.

    At most ``seconds`` are read, from ``offset`` on: however long a file is, it costs no more memory. The
    samples are float32. ``sample_rate`` is the rate to resample to in Hz; ``None`` keeps the file's own.
    ``min_seconds`` is the shortest excerpt that is still worth classifying; 0 takes whatever is left of a
    broken file. Raises `UnreadableClipError` when the file cannot be decoded, is too short, holds less than
    its header promises, or has no sound that can be used.
    """
    with open_audio(path) as audio:
        rate = audio.sample_rate
        start = audio.skip(int(offset * rate))
        channels = audio.read(int(seconds * rate))
    decoded = len(channels) / rate
    if decoded < min(min_seconds, seconds) or not decoded:
        raise UnreadableClipError(f"too short ({decoded:.1f} s)")
    promised = min(seconds, (audio.promised or 0) / rate - start / rate)
    if min_seconds and decoded < MIN_SHARE * promised:
        # The preset `compact` spreads 128 frames over a clip: in half a clip each stood for half the time.
        raise UnreadableClipError(f"cut off ({decoded:.1f} s of {promised:.1f} s)")
    samples = to_mono(channels)
    if fault := _fault(samples, channels, rate):
        raise UnreadableClipError(fault)
    return _resampled(samples, rate, sample_rate)


def load_windows(
    path: Path, sample_rate: int | None = None, *, seconds: float = CLIP_SECONDS
) -> Iterator[tuple[Samples, int]]:
    """Decode a file of any length window by window; yield mono samples and their rate in Hz.

    Every window is ``seconds`` long: the last one reaches back over the one before, and a file that is
    shorter than one window is repeated. Windows without usable sound, and a rest of less than 5 s, are left
    out. Memory does not grow with the file. Raises `UnreadableClipError` when the file cannot be decoded, is
    shorter than 1 s, or has no usable sound in any window.
    """
    found, fault, before = False, "holds no audio", np.zeros((0, 1), dtype=np.float32)
    with open_audio(path) as audio:
        rate, length = audio.sample_rate, round(seconds * audio.sample_rate)
        while len(block := audio.read(length)):
            if not len(before) and len(block) < rate:
                raise UnreadableClipError(f"too short ({len(block) / rate:.1f} s)")
            if not len(before) or len(block) >= MIN_SECONDS * rate:
                is_rest = len(before) and len(block) < length
                whole = np.concatenate([before, block])[-length:] if is_rest else block
                mono = to_mono(whole)
                if reason := _fault(mono, whole, rate):
                    fault = reason
                else:
                    found = True
                    yield _resampled(np.resize(mono, length), rate, sample_rate)
            before = block
    if not found:
        raise UnreadableClipError(fault)


def to_mono(channels: Samples) -> Samples:
    """Average the channels of ``channels`` [shape=(n_samples, n_channels)] to [shape=(n_samples,)]."""
    # Column by column: a mean over the short, innermost axis is ten times slower, and a matrix-vector
    # product wakes a second thread that waits in a loop, which halves the speed of two workers.
    return functools.reduce(np.add, channels.T) / np.float32(channels.shape[1])


def _fault(mono: Samples, channels: Samples, rate: int) -> str | None:
    """Return why decoded sound is of no use, or ``None``."""
    peak = max(mono.max(), -mono.min())
    if not np.isfinite(peak):
        sample = int(np.isfinite(mono).argmin())
        channel = int(np.isfinite(channels[sample]).argmin()) + 1
        return f"not finite: channel {channel} holds no number at {sample / rate:.1f} s"
    if peak < CANCELLED:
        loudest = np.abs(channels).max()
        if not loudest:
            return "silent: digital silence"
        if peak < CANCELLED * loudest:
            way_out = "'ffmpeg -i song.wav -af pan=mono|c0=c0 left.wav'"
            return f"left and right cancel each other: keep one of them, {way_out}"
    return None


def _resampled(samples: Samples, rate: int, wanted: int | None) -> tuple[Samples, int]:
    if wanted is None or wanted == rate:
        return samples, rate
    return soxr.resample(samples, rate, wanted, quality="HQ"), wanted
