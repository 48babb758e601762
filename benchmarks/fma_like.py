"""A dataset of any size in FMA's layout, for benchmarks: a few generated clips under many names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile as sf

from fma_nb.metadata import GENRES

SECONDS = 30
SAMPLE_RATE = 44_100


def write_clip(path: Path, seed: int, *, bit_rate_level: float = 0.2) -> None:
    """Write 30 s of synthetic stereo music-like sound as an MP3 of about 256 kbit/s."""
    rng = np.random.default_rng(seed)
    time = np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE
    chord = sum(
        np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) / (k + 1)
        for k, f in enumerate(rng.uniform(80, 2000, 12))
    )
    beat = np.exp(-((time * rng.uniform(1.5, 2.5)) % 1) * 12) * rng.standard_normal(time.size)
    channels = np.stack(
        [chord + beat, 0.8 * chord + 1.1 * beat + 0.05 * rng.standard_normal(time.size)], axis=1
    )
    write_mp3(path, (0.5 * channels / np.abs(channels).max()).astype(np.float32), SAMPLE_RATE, bit_rate_level)


def write_mp3(path: Path, samples: np.ndarray, sample_rate: int, bit_rate_level: float = 0.2) -> None:
    """Write samples [shape=(n_samples, n_channels)] as most of FMA's clips are: MP3, 256 kbit/s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(
        path,
        samples,
        sample_rate,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="CONSTANT",
        compression_level=bit_rate_level,
    )


def encode_like_fma(recording: Path, path: Path) -> None:
    """Write the first 30 s of a recording as a stereo MP3 of 256 kbit/s."""
    samples, sample_rate = sf.read(recording, dtype="float32", always_2d=True)
    samples = np.resize(samples, (SECONDS * sample_rate, samples.shape[1]))
    write_mp3(path, np.repeat(samples, 3 - samples.shape[1], axis=1), sample_rate)


def write_dataset(raw: Path, n_clips: int, n_different: int = 16, *, bit_rate_level: float = 0.2) -> None:
    """Write ``fma_small`` with ``n_clips`` clips below ``raw``: hard links to ``n_different`` MP3s."""
    sources = [raw / "sources" / f"{i}.mp3" for i in range(n_different)]
    for i, source in enumerate(sources):
        if not source.exists():
            write_clip(source, i, bit_rate_level=bit_rate_level)
    rows = []
    for i in range(n_clips):
        track_id = i + 2
        name = f"{track_id:06d}"
        path = raw / "fma_small" / name[:3] / f"{name}.mp3"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            os.link(sources[i % n_different], path)
        split = ("training", "training", "training", "validation", "test")[(i // 8) % 5]
        rows.append((track_id, i % (n_clips // 2 or 1), split, "small", GENRES[i % 8], f"clip {i}"))
    _write_tracks(raw / "fma_metadata" / "tracks.csv", rows)


def _write_tracks(path: Path, rows: list[tuple[int, int, str, str, str, str]]) -> None:
    columns = [
        ("artist", "id"),
        ("set", "split"),
        ("set", "subset"),
        ("track", "genre_top"),
        ("track", "title"),
    ]
    table = pd.DataFrame([row[1:] for row in rows], columns=pd.MultiIndex.from_tuples(columns))
    table.index = pd.Index([row[0] for row in rows], name="track_id")
    # One artist a clip: the benchmark needs the layout, not the lesson.
    table["artist", "id"] = np.arange(1, len(table) + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path)
