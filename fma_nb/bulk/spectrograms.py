"""The spectrograms of a whole dataset: one PNG a clip, over all cores or a Dask cluster.

What happens to one clip is in `fma_nb.spectrogram`; here are the folder, the workers and the list of the
clips that had to be skipped. A PNG that exists is done, so a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import soundfile as sf

from fma_nb.bulk.folders import check_writable, clear_temporaries, locked
from fma_nb.bulk.workers import CRASHED, NO_MEMORY, run_locally, run_on_cluster
from fma_nb.metadata import MISSING, Index, load_index
from fma_nb.progress import Progress
from fma_nb.project import SPLITS, FmaNbError, atomic_path, spectrogram_dir
from fma_nb.spectrogram import DYNAMIC_RANGE_DB, Preset, get_preset, make_spectrogram, png_path

MAX_UNREADABLE = 0.05

Job = tuple[Path, Path]  # the audio file to read, and the PNG to write


def make_spectrograms(
    dataset: str,
    preset_name: str,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    progress: bool = True,
    partial: bool = False,
) -> pd.DataFrame:
    """Make the PNGs of a whole dataset that are not there yet, over all cores or as many ``workers``.

    A second run on the same folder waits for the first. Where all is done nothing is written: the folder
    may be somebody else's. Missing MP3s are counted, and the work goes on with those that are there.

    Parameters
    ----------
    scheduler
        Address of a Dask scheduler whose workers do the work instead (`fma_nb.bulk.workers`).
    partial
        Go on where a split lacks a genre, for a first look at a download that has only begun.

    Returns
    -------
    skipped
        ``track_id, path, reason`` of every clip that cannot be used.

    Raises
    ------
    FmaNbError
        When the dataset is missing, a genre is missing in a split, the folder cannot be written or was
        made with other settings, or more than 5 % of the MP3s are unreadable: the good PNGs stay.
    """
    preset = get_preset(preset_name)
    index = load_index(dataset, partial=partial)
    folder = spectrogram_dir(dataset, preset_name)
    if progress:
        _tell_missing(index)
    _check_mel_json(folder, preset)
    jobs, reasons = _to_do(index, folder)
    if jobs:
        with locked(folder):
            jobs, reasons = _to_do(index, folder)  # another run may have done them meanwhile
            for place in {folder, *(png.parent for _, png in jobs)}:
                check_writable(place)
            png_folders = [folder / split for split in SPLITS]  # another run may be writing its pack beside
            clear_temporaries(*png_folders)
            _write_mel_json(folder, preset)
            for job, reason in _failures(list(jobs), preset, workers, scheduler, progress):
                reasons[jobs[job]] = reason
            clear_temporaries(*png_folders)  # of workers that were killed meanwhile
            _write_skipped(folder, index, reasons)
    found = _with_reasons(index, reasons)
    skipped = pd.concat([index.dropped, found], ignore_index=True).sort_values("track_id")
    _check_unreadable(skipped, len(index.tracks) + len(index.dropped), folder)
    return skipped


def _tell_missing(index: Index) -> None:
    total, missing = len(index.tracks) + len(index.dropped), (index.dropped["reason"] == MISSING).sum()
    if missing:
        print(f"{total - missing:,} of {total:,} MP3s are there.", flush=True)


def _to_do(index: Index, folder: Path) -> tuple[dict[Job, int], dict[int, str]]:
    """Return the clips to make, and those to skip with the reason: an earlier run could not read them."""
    known, jobs = _known_skips(folder, index), {}
    for row in index.tracks.itertuples():
        png = png_path(folder, row.split, row.genre, row.track_id)
        if row.track_id not in known and not png.exists():
            jobs[Path(row.path), png] = row.track_id
    return jobs, known


def _failures(
    jobs: list[Job], preset: Preset, workers: int | None, scheduler: str | None, progress: bool
) -> Iterator[tuple[Job, str]]:
    """Yield each job that fails with the reason, while the others become PNGs."""
    if not jobs:
        return
    work = functools.partial(make_spectrogram, preset=preset)
    if scheduler is None:
        outcomes = run_locally(work, jobs, min(workers or os.cpu_count() or 1, len(jobs)))
    else:
        outcomes = run_on_cluster(work, jobs, scheduler)
    with Progress(len(jobs), f"spectrograms ({preset.name})", "clip", visible=progress) as bar:
        for job, reason in outcomes:
            bar.update()
            if reason is not None:
                yield job, reason


def _settings(preset: Preset) -> dict[str, Any]:
    usual = {"mel_scale": "slaney", "norm": "slaney", "power": 2.0, "dynamic_range_db": DYNAMIC_RANGE_DB}
    return asdict(preset) | usual | {"reference": "maximum of the clip", "highest_band": "top row"}


def _check_mel_json(folder: Path, preset: Preset) -> None:
    path, found = folder / "mel.json", None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text()) if path.exists() else _settings(preset)
    if found != _settings(preset):
        raise FmaNbError(
            f"{path} is damaged or tells of other settings than preset {preset.name!r}: "
            "move that folder away and run the same command again."
        )


def _write_mel_json(folder: Path, preset: Preset) -> None:
    if not (folder / "mel.json").exists():
        with atomic_path(folder / "mel.json") as temporary:
            temporary.write_text(json.dumps(_settings(preset), indent=2) + "\n")


def _known_skips(folder: Path, index: Index) -> dict[int, str]:
    """Return the clips an earlier run skipped and whose files hold the same bytes as then."""
    paths = dict(zip(index.tracks["track_id"], index.tracks["path"], strict=True))
    try:
        rows = pd.read_csv(folder / "skipped.csv")
        return {
            int(row.track_id): str(row.reason)
            for row in rows.itertuples()
            if row.track_id in paths and _content(Path(paths[row.track_id]), row.reason) == row.content
        }
    except (OSError, pd.errors.EmptyDataError, pd.errors.ParserError, AttributeError):
        return {}  # nothing known: the clips are simply tried again


def _content(path: Path, reason: str) -> str:
    """Return what a clip was judged by: its bytes and the decoder; nothing where the machine was at fault."""
    if reason in (CRASHED, NO_MEMORY):
        return ""
    try:
        with path.open("rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}/{sf.__libsndfile_version__}"
    except OSError:
        return ""


def _with_reasons(index: Index, reasons: dict[int, str]) -> pd.DataFrame:
    found = index.tracks[index.tracks["track_id"].isin(reasons)][["track_id", "path"]]
    return found.assign(reason=found["track_id"].map(reasons))


def _write_skipped(folder: Path, index: Index, reasons: dict[int, str]) -> None:
    found = _with_reasons(index, reasons)
    contents = [_content(Path(row.path), row.reason) for row in found.itertuples()]
    with atomic_path(folder / "skipped.csv") as temporary:
        found.assign(content=contents).to_csv(temporary, index=False)


def _check_unreadable(skipped: pd.DataFrame, n_clips: int, folder: Path) -> None:
    unread = skipped["reason"].str.startswith(("on FMA's list", MISSING))
    unreadable, n_clips = skipped[~unread], n_clips - unread.sum()
    if len(unreadable) > MAX_UNREADABLE * n_clips:
        listed = "".join(f"\n  {row.path}: {row.reason}" for row in unreadable.head(20).itertuples())
        more = f"\n  and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
        raise FmaNbError(
            f"{len(unreadable)} of {n_clips} clips cannot be read, more than "
            f"{MAX_UNREADABLE:.0%}: get these files again and rerun. A file that has changed is tried again; "
            f"delete {folder / 'skipped.csv'} to try all of them.{listed}{more}"
        )
