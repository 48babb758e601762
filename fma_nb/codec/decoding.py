"""Stage 2, audio: an audio file as a row of samples, to its real end, whatever its header says.

Behind `fma_nb.audio`. libsndfile decodes; what is here keeps it from stopping at a guess of an MP3's length
and at damaged places. It changes nothing outside its own objects: threads may decode side by side.

An MP3 is a row of frames of 1,152 samples, 26 ms at 44.1 kHz; the first four bytes of each tell its size.
The first one may tell the file's length, in a Xing, Info or VBRI header; where it is missing, decoders guess.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile as sf

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

# kbit/s by the four bits in a header: MPEG 1 layer II and III, then MPEG 2. 0: free format, not read.
_LAYER_2 = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 0)
_LAYER_3 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MPEG_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_RATES = (44_100, 48_000, 32_000, 0)  # Hz
_SYNC = re.compile(rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]")  # versions 1, 2 and 2.5, layers II and III
_PROMISE = re.compile(rb"(?s)(?:Xing|Info)\0\0\0[\3\7\x0b\x0f].{4}(.{4})|VBRI.{6}(.{4})")
_BLOCK = 1 << 16

Samples = npt.NDArray[np.float32]


class UnreadableClipError(Exception):
    """A clip that cannot be used; its text is the reason, in a few words, for the list of skipped clips."""


class AudioFile:
    """An open audio file, read to its real end; ``promised`` is its number of samples, if it tells that."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self._n_read = file, 0
        self._sound, self.promised, self._is_mpeg = _open_sound(file)
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
        position = _find_frame(self._file, self._file.tell() - 4)
        if position is None:
            return False
        self._sound = _decoder(_Stream(self._file, position, ENDLESS))
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


def _open_sound(file: io.FileIO) -> tuple[sf.SoundFile, int | None, bool]:
    """Return a file's decoder, the number of samples that it promises, and whether it has MP3 frames."""
    head, begin, size = file.read(12), _after_id3(file), os.fstat(file.fileno()).st_size
    is_mpeg = _begins_at(file, begin)
    if not is_mpeg and not head.startswith(b"\xff"):  # broken MP3s make the decoder write to the terminal
        with contextlib.suppress(sf.LibsndfileError):
            sound = _decoder(file)
            return sound, _promised(sound.frames, head, size), False
    start = begin if is_mpeg else _find_frame(file, begin)
    if start is None:
        kind = next((kind for kind, begin in NOT_READ.items() if re.match(begin, head, re.DOTALL)), None)
        raise UnreadableClipError(f"{kind} is not read: {CONVERT}" if kind else NOT_AUDIO)
    end = _promised_end(file, start)
    if end is not None and _find_frame(file, end) is not None:
        # MP3s joined: the promise is that of the first alone.
        start, end = start + _frame_size(file, start), None
    if end is None:
        return _decoder(_Stream(file, start, ENDLESS)), None, True
    # Where all is in order libsndfile reads by itself, which is 5 % faster.
    in_order = is_mpeg and 0 <= size - end <= ID3V1_BYTES
    sound = _decoder(file if in_order else _Stream(file, start, end - start))
    return sound, sound.frames, True


def _promised(n_samples: int, head: bytes, size: int) -> int | None:
    """Return the number of samples that a header promises; libsndfile tells WAV's and AIFF's after a cut."""
    if not 0 < n_samples < ENDLESS:
        return None
    n_bytes = 8 + int.from_bytes(head[4:8], "little" if head.startswith(b"RIFF") else "big")
    if head.startswith((b"RIFF", b"FORM")) and n_bytes < UNKNOWN_BYTES:
        return round(n_samples * max(1, n_bytes / size))
    return n_samples


def _decoder(source: "io.FileIO | _Stream") -> sf.SoundFile:
    source.seek(0)
    # A file by its number, not its name: libsndfile takes a file ._NAME beside NAME for a part of it.
    sound = sf.SoundFile(source.fileno() if isinstance(source, io.FileIO) else source, closefd=False)
    # soundfile seeks after every read of a seekable file, which fails where the length is unknown.
    sound.seekable = lambda: False
    return sound


@contextlib.contextmanager
def open_audio(path: Path) -> Iterator[AudioFile]:
    """Open an audio file for a ``with`` block, or raise `UnreadableClipError`."""
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


def _read_at(file: io.FileIO, position: int, n_bytes: int) -> bytes:
    file.seek(position)
    return file.read(n_bytes)


def _frame_size(file: io.FileIO, position: int) -> int:
    """Return the size in bytes of the frame at ``position``; 0 when there is none."""
    header = _read_at(file, position, 4)
    if len(header) < 4 or not _SYNC.match(header):
        return 0
    version, layer, rate = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3), _RATES[header[2] >> 2 & 3]
    table = _MPEG_2 if version < 3 else (_LAYER_2 if layer == 2 else _LAYER_3)
    bits = 1000 * table[header[2] >> 4]
    if not rate or not bits:
        return 0
    rate >>= {0: 2, 2: 1, 3: 0}[version]
    return (72 if layer == 3 and version < 3 else 144) * bits // rate + (header[2] >> 1 & 1)


def _begins_at(file: io.FileIO, position: int) -> bool:
    """Tell whether three frames follow each other from ``position`` (in bytes) on."""
    for _ in range(3):
        if not (size := _frame_size(file, position)):
            return False
        position += size
    return True


def _find_frame(file: io.FileIO, start: int) -> int | None:
    """Return where the first of three frames in a row begins, at ``start`` or later; ``None``: nowhere."""
    while len(block := _read_at(file, start, _BLOCK)) >= 4:
        for sync in _SYNC.finditer(block):
            if _begins_at(file, start + sync.start()):
                return start + sync.start()
        start += len(block) - 1  # a sync may lie across the border
    return None


def _after_id3(file: io.FileIO) -> int:
    """Return the position in bytes behind the ID3v2 tags, with their pictures, at a file's beginning."""
    position = 0
    while (head := _read_at(file, position, 10)).startswith(b"ID3"):
        position += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))
    return position


def _promised_end(file: io.FileIO, start: int) -> int | None:
    """Return where an MP3 with its first frame at ``start`` says that it ends; ``None``: it does not say."""
    found = _PROMISE.search(_read_at(file, start, 64))
    return start + int.from_bytes(found[1] or found[2], "big") if found else None


class _Stream:
    """The bytes of an MP3 from ``start`` on, as a file that claims to hold ``size`` of them.

    libsndfile stops at the length that it guesses from the size; with one out of all reason, at the end.
    """

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file, self._start, self._position, self._end = file, start, start, start + size
        self._real_end = os.fstat(file.fileno()).st_size

    def seek(self, offset: int, whence: int = 0) -> None:
        self._position = offset + (self._start, self._position, self._end)[whence]

    def tell(self) -> int:
        return self._position - self._start

    def readinto(self, buffer: memoryview) -> int:
        if self._position >= self._real_end:
            # Only the search for a tag in the last 128 bytes comes to the claimed end. It must not fail.
            return len(buffer) if self._position + len(buffer) == self._end else 0
        self._file.seek(self._position)
        n_bytes = self._file.readinto(buffer)
        self._position += n_bytes
        return n_bytes
