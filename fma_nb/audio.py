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
        The shortest excerpt that is still worth classifying.

    Returns
    -------
    samples [shape=(n_samples,)], sample_rate
        Mono float32 samples, and their rate in Hz.

    Raises
    ------
    UnreadableClipError
        When the file cannot be decoded, is too short, or is digital silence.
    """
    stereo, native_rate = _decode(path, offset, seconds)
    if len(stereo) < min_seconds * native_rate:
        raise UnreadableClipError(f"too short ({len(stereo) / native_rate:.1f} s)")
    samples = to_mono(stereo)
    if not np.isfinite(samples).all():
        raise UnreadableClipError("decodes to numbers that are not finite")
    if not samples.any():
        raise UnreadableClipError("digital silence")
    if sample_rate is None or sample_rate == native_rate:
        return samples, native_rate
    return soxr.resample(samples, native_rate, sample_rate, quality="HQ"), sample_rate


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


def _decode(path: Path, offset: float, seconds: float) -> tuple[Samples, int]:
    with _open(path) as file:
        try:
            if offset:
                file.seek(int(offset * file.samplerate))
            samples = file.read(int(seconds * file.samplerate), dtype="float32", always_2d=True)
        except sf.LibsndfileError as error:
            raise UnreadableClipError(f"broken audio ({error.error_string.rstrip('.').lower()})") from error
        return samples, file.samplerate


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
