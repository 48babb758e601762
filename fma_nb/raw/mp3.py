"""One synthetic track from its plan to an MP3 file."""

from __future__ import annotations

import io

import soundfile as sf

from fma_nb.project import atomic_path, clip_path
from fma_nb.raw.instruments import Samples
from fma_nb.raw.plan import DATASET, MiniConfig, PlannedTrack
from fma_nb.raw.score import synthesize_track

TRUNCATED_BYTES = 900
# Of libsndfile's 0 (best) to 1 (smallest): about 100 kbit/s and a third faster than constant bit rate.
MP3_COMPRESSION = 0.75


def encode_mp3(samples: Samples, sample_rate: int) -> bytes:
    """Encode ``samples`` [shape=(n_samples, n_channels)] as MP3 of variable bit rate."""
    buffer = io.BytesIO()
    how = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": MP3_COMPRESSION}
    sf.write(buffer, samples, sample_rate, **how)
    return buffer.getvalue()


def write_clip(track: PlannedTrack, config: MiniConfig) -> None:
    """Synthesize a track, damage it if that is planned, and write its MP3."""
    mp3 = b""
    if track.damage != "empty":
        samples = synthesize_track(
            track.genre, track.artist, track.track, config.seed, config.seconds, track.sample_rate
        )
        if track.n_channels == 1:
            samples = samples.mean(axis=1, keepdims=True)
        mp3 = encode_mp3(samples, track.sample_rate)
    if track.damage == "truncated":
        mp3 = mp3[:TRUNCATED_BYTES]
    with atomic_path(clip_path(DATASET, track.track_id)) as temporary:
        temporary.write_bytes(mp3)
