"""Stage 2, audio: from an MP3 to mono samples, or to a reason why the clip cannot be used.

Decoding is libsndfile's (through ``soundfile``), resampling libsoxr's: both are what librosa uses
underneath, called without the detours. Notebook 02 takes the same steps one by one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile as sf
import soxr

CLIP_SECONDS = 30.0
MIN_SECONDS = 5.0
# Without a header that tells it, the length of a variable-rate MP3 is a guess that can be a tenth off.
MIN_SHARE = 0.75

Samples = npt.NDArray[np.float32]


class UnreadableClipError(Exception):
    """A clip that cannot be used; its text is the reason, in a few words, for the list of skipped clips."""


@dataclass(frozen=True)
class ClipInfo:
    """What a file's header says: sample rate (Hz), number of channels, duration (s)."""

    sample_rate: int
    n_channels: int
    seconds: float


def probe(path: Path) -> ClipInfo:
    """Read a clip's sample rate (Hz), channels and duration (s) without decoding it.

    Raises
    ------
    UnreadableClipError
        When the file is missing, empty or holds no audio that libsndfile knows.
    """
    with _open(path) as file:
        return ClipInfo(file.samplerate, file.channels, file.frames / file.samplerate)


def load_clip(
    path: Path,
    sample_rate: int | None = None,
    *,
    offset: float = 0.0,
    seconds: float = CLIP_SECONDS,
    min_seconds: float = MIN_SECONDS,
) -> tuple[Samples, int]:
    """Decode a clip, average its channels to mono, and resample it.

    Parameters
    ----------
    path
        Any audio file that libsndfile decodes: MP3, OGG, FLAC, WAV.
    sample_rate
        The rate to resample to in Hz; ``None`` keeps the file's own.
    offset
        Where to begin, in s.
    seconds
        How much to read at most. A longer file, however long, costs no more memory than this.
    min_seconds
        The shortest excerpt that is still worth classifying; 0 takes whatever is left of a broken file.

    Returns
    -------
    samples [shape=(n_samples,)], sample_rate
        Mono float32 samples, and their rate in Hz.

    Raises
    ------
    UnreadableClipError
        When the file cannot be decoded, is too short, holds less than its header promises, or is digital
        silence.
    """
    stereo, native_rate, promised = _decode(path, offset, seconds)
    decoded = len(stereo) / native_rate
    if decoded < min_seconds:
        raise UnreadableClipError(f"too short ({decoded:.1f} s)")
    if min_seconds and decoded < MIN_SHARE * promised:
        # Its frames would stand for another length of time than those of every other clip.
        raise UnreadableClipError(f"cut off ({decoded:.1f} s of {promised:.1f} s)")
    samples = to_mono(stereo)
    if not np.isfinite(samples).all():
        raise UnreadableClipError("decodes to numbers that are not finite")
    if not samples.any():
        raise UnreadableClipError("digital silence")
    return _resampled(samples, native_rate, sample_rate)


def load_windows(
    path: Path, sample_rate: int | None = None, *, seconds: float = CLIP_SECONDS
) -> Iterator[tuple[Samples, int]]:
    """Decode a file of any length window by window; yield mono samples and their rate in Hz.

    Every window is ``seconds`` long: the last one reaches back over the one before, and a file that is
    shorter than one window is repeated. Windows of digital silence, and a rest of less than 5 s, are left
    out. Memory does not grow with the file.

    Raises
    ------
    UnreadableClipError
        When the file cannot be decoded, is shorter than 1 s, or is silent throughout.
    """
    found, before = False, np.zeros((0, 1), dtype=np.float32)
    with quiet_decoder(), _open(path) as file:
        rate, length = file.samplerate, round(seconds * file.samplerate)
        while len(block := _read(file, length)):
            if not len(before) and len(block) < rate:
                raise UnreadableClipError(f"too short ({len(block) / rate:.1f} s)")
            if not len(before) or len(block) >= MIN_SECONDS * rate:
                whole = np.concatenate([before, block])[-length:] if len(before) else block
                samples = np.resize(to_mono(whole), length)
                if np.isfinite(samples).all() and samples.any():
                    found = True
                    yield _resampled(samples, rate, sample_rate)
            before = block
    if not found:
        raise UnreadableClipError("silent" if len(before) else "holds no audio")


def _read(file: sf.SoundFile, n_frames: int) -> Samples:
    try:
        return file.read(n_frames, dtype="float32", always_2d=True)
    except sf.LibsndfileError as error:
        raise UnreadableClipError(f"broken audio ({error.error_string.rstrip('.').lower()})") from error


def _resampled(samples: Samples, rate: int, wanted: int | None) -> tuple[Samples, int]:
    if wanted is None or wanted == rate:
        return samples, rate
    return soxr.resample(samples, rate, wanted, quality="HQ"), wanted


@contextlib.contextmanager
def quiet_decoder() -> Iterator[None]:
    """Silence what the MP3 decoder's C code writes to the standard error, inside a ``with`` block."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def to_mono(channels: Samples) -> Samples:
    """Average the channels of ``channels`` [shape=(n_samples, n_channels)] to [shape=(n_samples,)]."""
    # Column by column: a mean over the short, innermost axis is ten times slower, and a matrix-vector
    # product wakes a second thread that waits in a loop, which halves the speed of two workers.
    return functools.reduce(np.add, channels.T) / np.float32(channels.shape[1])


def _decode(path: Path, offset: float, seconds: float) -> tuple[Samples, int, float]:
    """Return samples, their rate in Hz, and the seconds that the header had promised."""
    with _open(path) as file:
        start = min(int(offset * file.samplerate), file.frames)
        if start:
            file.seek(start)
        samples = _read(file, int(seconds * file.samplerate))
        return samples, file.samplerate, min(seconds, (file.frames - start) / file.samplerate)


def _open(path: Path) -> sf.SoundFile:
    if not path.is_file():
        raise UnreadableClipError("file missing")
    if path.stat().st_size == 0:
        raise UnreadableClipError("file empty")
    try:
        return sf.SoundFile(path)
    except (sf.LibsndfileError, TypeError) as error:
        # A TypeError: soundfile takes some name endings for headerless audio and asks for a sample rate.
        raise UnreadableClipError("not audio that libsndfile can decode") from error
