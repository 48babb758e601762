"""One synthetic track from its plan to an MP3 file."""

from __future__ import annotations

import struct

import lameenc
import numpy as np

from fma_nb.project import atomic_path, clip_path
from fma_nb.raw.instruments import Samples
from fma_nb.raw.plan import DATASET, MiniConfig, PlannedTrack
from fma_nb.raw.score import synthesize_track

TRUNCATED_BYTES = 900
LAME_QUALITY = 7  # the fastest


def encode_mp3(samples: Samples, sample_rate: int, bit_rate: int) -> bytes:
    """Encode ``samples`` [shape=(n_samples, n_channels)] as MP3 of constant ``bit_rate`` in bit/s.

    The first frame is an Info header, so that the length is known and not guessed from the file's size.
    """
    encoder = lameenc.Encoder()
    encoder.silence()
    encoder.set_in_sample_rate(sample_rate)
    encoder.set_out_sample_rate(sample_rate)
    encoder.set_channels(samples.shape[1])
    encoder.set_bit_rate(bit_rate // 1000)
    encoder.set_quality(LAME_QUALITY)
    pcm = np.round(32_767 * samples.clip(-1, 1)).astype("<i2")
    frames = bytes(encoder.encode(pcm.tobytes()) + encoder.flush())
    return _info_frame(frames, sample_rate, bit_rate) + frames


def _info_frame(frames: bytes, sample_rate: int, bit_rate: int) -> bytes:
    """Make the frame without sound that tells how many frames and bytes the file has."""
    is_mpeg1, is_mono = sample_rate >= 32_000, frames[3] >> 6 == 3
    frame_bytes = (144 if is_mpeg1 else 72) * bit_rate / sample_rate
    header = frames[:2] + bytes([frames[2] & ~2]) + frames[3:4]  # that of the first frame, without padding
    side_information = bytes((17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))
    counts = struct.pack(">III", 3, round(len(frames) / frame_bytes), len(frames) + int(frame_bytes))
    return (header + side_information + b"Info" + counts).ljust(int(frame_bytes), b"\0")


def write_clip(track: PlannedTrack, config: MiniConfig) -> None:
    """Synthesize a track, damage it if that is planned, and write its MP3."""
    mp3 = b""
    if track.damage != "empty":
        samples = synthesize_track(
            track.genre, track.artist, track.track, config.seed, config.seconds, track.sample_rate
        )
        if track.n_channels == 1:
            samples = samples.mean(axis=1, keepdims=True)
        mp3 = encode_mp3(samples, track.sample_rate, track.bit_rate)
    if track.damage == "truncated":
        mp3 = mp3[:TRUNCATED_BYTES]
    with atomic_path(clip_path(DATASET, track.track_id)) as temporary:
        temporary.write_bytes(mp3)
