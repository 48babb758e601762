"""The dataset `fma_mini`: synthetic MP3s in FMA's own layout, so that no download is needed.

It takes the place of a download: the same folders, the same ``tracks.csv`` with its 52 columns under three
header rows, artists who never cross splits, some odd sample rates and mono files, one truncated and one
empty MP3. Everything is drawn from a seed; no number measured on it says anything about FMA.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from fma_nb.bulk.folders import clear_temporaries, locked
from fma_nb.bulk.workers import run_locally
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, audio_dir, clip_path, data_dir, metadata_dir
from fma_nb.raw.mp3 import write_clip
from fma_nb.raw.plan import DATASET, MiniConfig, PlannedTrack, plan_tracks
from fma_nb.raw.tables import genre_table, track_table

GENERATOR_VERSION = 2


def make_fma_mini(
    config: MiniConfig | None = None, *, workers: int | None = None, progress: bool = True
) -> Path:
    """Make the dataset, or what is missing of it; the same bytes whatever the number of workers.

    An MP3 that exists is done, so a killed run goes on where it was. ``tracks.csv`` is written last: where
    it exists the dataset is complete. Files of another configuration, and spectrograms made from them,
    are removed first. A second call for the same folder waits for the first.

    By default it is the course's dataset, made by as many ``workers`` as there are cores. What is returned is
    the folder of the MP3s; ``tracks.csv`` and ``genres.csv`` are in ``fma_mini_metadata`` beside it.

    Raises
    ------
    FmaNbError
        When the configuration makes no sense, a file cannot be written or a worker was killed.
    """
    if workers is not None and workers < 1:
        raise FmaNbError(f"workers={workers} is too small: give at least 1.")
    config = config or MiniConfig()
    tracks = plan_tracks(config)
    metadata, tracks_csv = metadata_dir(DATASET), metadata_dir(DATASET) / "tracks.csv"
    if _is_unchanged(config) and tracks_csv.exists() and not _missing(tracks):
        return audio_dir(DATASET)  # perhaps in a folder that only its owner may write
    with locked(metadata):
        _start_over_if_changed(config)
        missing = _missing(tracks)
        _write_clips(missing, config, workers or os.cpu_count() or 1, progress)
        if missing or not tracks_csv.exists():
            tables = {"genres.csv": genre_table(tracks), "tracks.csv": track_table(tracks, config)}
            for name, table in tables.items():
                with atomic_path(metadata / name) as temporary:
                    table.to_csv(temporary, lineterminator="\n")
    return audio_dir(DATASET)


def _missing(tracks: list[PlannedTrack]) -> list[PlannedTrack]:
    return [track for track in tracks if not clip_path(DATASET, track.track_id).exists()]


def _record_text(config: MiniConfig) -> str:
    settings = {"generator_version": GENERATOR_VERSION, "synthetic": True, **asdict(config)}
    return json.dumps(settings, indent=2) + "\n"


def _is_unchanged(config: MiniConfig) -> bool:
    record = metadata_dir(DATASET) / "mini.json"
    return record.exists() and record.read_text(encoding="utf-8") == _record_text(config)


def _start_over_if_changed(config: MiniConfig) -> None:
    """Remove what another configuration, another version or a killed writer has left behind."""
    if not _is_unchanged(config):
        (metadata_dir(DATASET) / "tracks.csv").unlink(missing_ok=True)
        for folder in (audio_dir(DATASET), *(data_dir() / "spectrograms").glob(f"{DATASET}-*")):
            if folder.exists():
                shutil.rmtree(folder)
        with atomic_path(metadata_dir(DATASET) / "mini.json") as temporary:
            temporary.write_text(_record_text(config), encoding="utf-8")
    clear_temporaries(audio_dir(DATASET))


def _write_clips(tracks: list[PlannedTrack], config: MiniConfig, workers: int, progress: bool) -> None:
    if not tracks:
        return
    jobs = [(track, config) for track in tracks]
    with Progress(len(jobs), f"{DATASET} (synthetic)", "clip", visible=progress) as bar:
        for (track, _), reason in run_locally(write_clip, jobs, min(workers, len(jobs))):
            if reason is not None:
                raise FmaNbError(
                    f"{clip_path(DATASET, track.track_id)} cannot be made ({reason}): run the same command "
                    "again, with fewer workers if memory is short."
                )
            bar.update()
