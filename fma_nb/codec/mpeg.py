"""Stage 2, audio: where the frames of an MP3 lie, and where it says that it ends.

An MP3 is a row of frames of 1,152 samples, 26 ms at 44.1 kHz; the first four bytes of each tell its size.
Encoders write the length into the first one, in a Xing, Info or VBRI header. Where it is missing, decoders
guess.
"""

from __future__ import annotations

import io
import os
import re

# kbit/s by the four bits in a header: MPEG 1 layer II and III, then MPEG 2. 0: free format, not read.
_LAYER_2 = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 0)
_LAYER_3 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MPEG_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_RATES = (44_100, 48_000, 32_000, 0)  # Hz
_SYNC = re.compile(rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]")  # versions 1, 2 and 2.5, layers II and III
_PROMISE = re.compile(rb"(?s)(?:Xing|Info)\0\0\0[\3\7\x0b\x0f].{4}(.{4})|VBRI.{6}(.{4})")
_BLOCK = 1 << 16


def frame_size(file: io.FileIO, position: int) -> int:
    """Return the size in bytes of the frame at ``position``; 0 when there is none."""
    file.seek(position)
    header = file.read(4)
    if len(header) < 4 or not _SYNC.match(header):
        return 0
    version, layer, rate = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3), _RATES[header[2] >> 2 & 3]
    table = _MPEG_2 if version < 3 else (_LAYER_2 if layer == 2 else _LAYER_3)
    bits = 1000 * table[header[2] >> 4]
    if not rate or not bits:
        return 0
    rate >>= {0: 2, 2: 1, 3: 0}[version]
    return (72 if layer == 3 and version < 3 else 144) * bits // rate + (header[2] >> 1 & 1)


def begins_at(file: io.FileIO, position: int) -> bool:
    """Tell whether three frames follow each other from ``position`` (in bytes) on."""
    for _ in range(3):
        size = frame_size(file, position)
        if not size:
            return False
        position += size
    return True


def find_frame(file: io.FileIO, start: int) -> int | None:
    """Return where the first of three frames in a row begins, at ``start`` or later; ``None``: nowhere."""
    while True:
        file.seek(start)
        block = file.read(_BLOCK)
        for sync in _SYNC.finditer(block):
            if begins_at(file, start + sync.start()):
                return start + sync.start()
        if len(block) < 4:
            return None
        start += len(block) - 1  # a sync may lie across the border


def after_id3(file: io.FileIO) -> int:
    """Return the position in bytes behind the ID3v2 tags, with their pictures, at a file's beginning."""
    position = 0
    while True:
        file.seek(position)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3":
            return position
        position += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))


def promised_end(file: io.FileIO, start: int) -> int | None:
    """Return where an MP3 with its first frame at ``start`` says that it ends; ``None``: it does not say."""
    file.seek(start)
    found = _PROMISE.search(file.read(64))
    return start + int.from_bytes(found[1] or found[2], "big") if found else None


class Stream:
    """The bytes of an MP3 from ``start`` on, as a file that claims to hold ``size`` of them.

    libsndfile stops at the length that it guesses from the size; with one out of all reason, at the end.
    """

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file, self._start, self._position, self._end = file, start, start, start + size
        self._real_end = os.fstat(file.fileno()).st_size

    def seek(self, offset: int, whence: int = 0) -> None:
        """Move as `io.FileIO.seek` does."""
        self._position = offset + (self._start, self._position, self._end)[whence]

    def tell(self) -> int:
        """Return the position in bytes from the start."""
        return self._position - self._start

    def readinto(self, buffer: memoryview) -> int:
        """Read into ``buffer``; return how many bytes."""
        if self._position >= self._real_end:
            # Only the search for a tag in the last 128 bytes comes to the claimed end. It must not fail.
            return len(buffer) if self._position + len(buffer) == self._end else 0
        self._file.seek(self._position)
        n_bytes = self._file.readinto(buffer)
        self._position += n_bytes
        return n_bytes
