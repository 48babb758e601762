"""Stage 2, audio: an audio file as a row of samples, to its real end, whatever its header says.

Behind `fma_nb.audio`. libsndfile decodes; what is here keeps it from stopping at a guess of an MP3's length
and at damaged places. It changes nothing outside its own objects: threads may decode side by side.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile as sf

from fma_nb.codec import mpeg

NOT_AUDIO = "not audio that libsndfile can decode"
CONVERT = "convert it, for example with 'ffmpeg -i song.m4a song.wav'"
# How the files begin that libsndfile does not read.
NOT_READ = {
    "M4A or MP4": rb"....ftyp",
    "WMA": rb"\x30\x26\xb2\x75",
    "WebM": rb"\x1a\x45\xdf\xa3",
    "AAC": rb"\xff[\xf0\xf1\xf8\xf9]",
}
ENDLESS = 1 << 50  # bytes or samples that no file has
UNKNOWN_BYTES = 0x7FFF_0000  # a WAV that was written to a pipe claims at least so many
ID3V1_BYTES = 128
# In samples: how much is dropped at a time, and how exactly the place of a damage is known.
SKIPPED_AT_ONCE = 1 << 20
MARK_STEP = 1152

Samples = npt.NDArray[np.float32]


class UnreadableClipError(Exception):
    """A clip that cannot be used; its text is the reason, in a few words, for the list of skipped clips."""


class AudioFile:
    """An open audio file, read to its real end; ``promised`` is its number of samples, if it tells that."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._n_read = file, 0
        self._is_mpeg, self._sound, self.promised = _open_sound(file)
        self.sample_rate: int = self._sound.samplerate
        self.n_channels: int = self._sound.channels

    def read(self, n_samples: int) -> Samples:
        """Decode ``n_samples`` at most [shape=(n_samples, n_channels)]; fewer only at the end."""
        block = np.empty((n_samples, self.n_channels), dtype=np.float32)
        filled = 0
        while True:
            n_good = _decode(self._sound, block[filled:])
            filled += n_good
            self._n_read += n_good
            if filled == n_samples or not self._resume():
                return block[:filled]

    def skip(self, n_samples: int) -> int:
        """Decode and drop ``n_samples`` at most; return how many there were."""
        skipped = 0
        while skipped < n_samples and (n_read := len(self.read(min(n_samples - skipped, SKIPPED_AT_ONCE)))):
            skipped += n_read
        return skipped

    def _resume(self) -> bool:
        """Go on behind a hole in an MP3; return False at the end."""
        if not self._is_mpeg or self._n_read == self.promised:
            return False
        # The decoder has read four bytes of what it does not go on with.
        position = mpeg.find_frame(self._file, self._file.tell() - 4)
        if position is None:
            return False
        self._sound = _decoder(mpeg.Stream(self._file, position, ENDLESS))
        if (self._sound.samplerate, self._sound.channels) != (self.sample_rate, self.n_channels):
            seconds = self._n_read / self.sample_rate
            raise UnreadableClipError(f"its sample rate or channels change after {seconds:.1f} s: {CONVERT}")
        return True


def _decode(sound: sf.SoundFile, block: Samples) -> int:
    """Decode into ``block``; return how many samples are good."""
    block[::MARK_STEP] = np.nan
    try:
        return len(sound.read(out=block))
    except sf.LibsndfileError:
        # Nobody tells how far the decoder came before the damage; the marks that are left do.
        n_reached = int(np.append(np.isnan(block[::MARK_STEP, 0]), True).argmax())
        return max(n_reached - 1, 0) * MARK_STEP


def _open_sound(file: io.FileIO) -> tuple[bool, sf.SoundFile, int | None]:
    """Return whether a file is an MP3, its decoder, and the number of samples that it promises."""
    head, start = file.read(12), mpeg.after_id3(file)
    if mpeg.begins_at(file, start):
        return True, *_open_mpeg(file, start)
    if not head.startswith(b"\xff"):  # broken MP3s make the decoder write to the terminal
        with contextlib.suppress(sf.LibsndfileError):
            sound = _open_whole(file)
            return False, sound, _promised(sound.frames, head, file)
    first = mpeg.find_frame(file, start)
    if first is None:
        kind = next((kind for kind, begin in NOT_READ.items() if re.match(begin, head, re.DOTALL)), None)
        raise UnreadableClipError(f"{kind} is not read: {CONVERT}" if kind else NOT_AUDIO)
    return True, *_open_mpeg(file, first)


def _open_mpeg(file: io.FileIO, start: int) -> tuple[sf.SoundFile, int | None]:
    end, size = mpeg.promised_end(file, start), os.fstat(file.fileno()).st_size
    if end is None:
        return _decoder(mpeg.Stream(file, start, ENDLESS)), None
    if mpeg.find_frame(file, end) is not None:  # MP3s joined: the promise is that of the first alone
        return _decoder(mpeg.Stream(file, start + mpeg.frame_size(file, start), ENDLESS)), None
    # Where all is in order libsndfile reads by itself, which is 5 % faster.
    in_order = start == mpeg.after_id3(file) and 0 <= size - end <= ID3V1_BYTES
    sound = _open_whole(file) if in_order else _decoder(mpeg.Stream(file, start, end - start))
    return sound, sound.frames


def _promised(n_samples: int, head: bytes, file: io.FileIO) -> int | None:
    """Return the number of samples that a header promises; libsndfile tells WAV's and AIFF's after a cut."""
    if not 0 < n_samples < ENDLESS:
        return None
    if head.startswith((b"RIFF", b"FORM")):
        n_bytes = 8 + int.from_bytes(head[4:8], "little" if head.startswith(b"RIFF") else "big")
        if n_bytes < UNKNOWN_BYTES:
            return round(n_samples * max(1, n_bytes / os.fstat(file.fileno()).st_size))
    return n_samples


def _decoder(source: int | mpeg.Stream) -> sf.SoundFile:
    sound = sf.SoundFile(source, closefd=False)
    # soundfile seeks after every read of a seekable file, which fails where the length is unknown.
    sound.seekable = lambda: False
    return sound


def _open_whole(file: io.FileIO) -> sf.SoundFile:
    file.seek(0)
    # By number, not by name: libsndfile takes a file ._NAME beside NAME for a part of it.
    return _decoder(file.fileno())


@contextlib.contextmanager
def open_audio(path: Path) -> Iterator[AudioFile]:
    """Open an audio file for a ``with`` block.

    Raises
    ------
    UnreadableClipError
        When the file is missing, empty or holds no audio that libsndfile knows.
    """
    if not path.is_file():
        raise UnreadableClipError("a folder without audio files" if path.is_dir() else "file missing")
    try:
        with path.open("rb", buffering=0) as file:
            if not os.fstat(file.fileno()).st_size:
                raise UnreadableClipError("file empty")
            yield AudioFile(file)
    except OSError as error:
        raise UnreadableClipError(f"cannot be read ({error.strerror})") from error
    except sf.LibsndfileError as error:
        raise UnreadableClipError(NOT_AUDIO) from error
