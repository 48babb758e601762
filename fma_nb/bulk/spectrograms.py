"""The spectrograms of a whole dataset: one PNG a clip, over all cores or a Dask cluster.

What happens to one clip is in `fma_nb.spectrogram`; here are the folder, the workers and the list of the
clips that had to be skipped. A PNG that exists is done, so a killed run goes on where it was.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from fma_nb.bulk.workers import run_locally, run_on_cluster
from fma_nb.metadata import Index, load_index
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, clear_temporaries, make_folder, spectrogram_dir
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
) -> pd.DataFrame:
    """Make the PNGs of a whole dataset that are not there yet, over all cores.

    A PNG that exists is done, so a killed run goes on where it was. A second run on the same folder
    waits for the first.

    Parameters
    ----------
    dataset, preset_name
        What to read, and how.
    workers
        Processes on this machine; ``None`` takes every core.
    scheduler
        Address of a Dask scheduler whose workers do the work instead (`fma_nb.bulk.workers`).
    progress
        Show a progress bar.

    Returns
    -------
    skipped
        ``track_id, path, reason`` of every clip that cannot be used.

    Raises
    ------
    FmaNbError
        When the dataset is missing, the folder was made with other settings, or more than 5 % of the
        clips are unreadable.
    """
    preset = get_preset(preset_name)
    index = load_index(dataset)
    folder = spectrogram_dir(dataset, preset_name)
    make_folder(folder)
    with filelock.FileLock(folder / ".lock"):
        clear_temporaries(folder)
        _write_mel_json(folder, preset)
        known = _known_skips(folder, index)
        jobs = {job: track_id for job, track_id in _missing(index, folder) if track_id not in known}
        found = {jobs[job]: why for job, why in _failures(list(jobs), preset, workers, scheduler, progress)}
        clear_temporaries(folder)  # of workers that were killed meanwhile
        skipped = _write_skipped(folder, index, known | found)
    _check_unreadable(skipped, len(index.tracks) + len(index.dropped))
    return skipped


def _missing(index: Index, folder: Path) -> Iterator[tuple[Job, int]]:
    for row in index.tracks.itertuples():
        png = png_path(folder, row.split, row.genre, row.track_id)
        if not png.exists():
            yield (Path(row.path), png), row.track_id


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


def _write_mel_json(folder: Path, preset: Preset) -> None:
    path = folder / "mel.json"
    settings = asdict(preset) | {
        "mel_scale": "slaney",
        "norm": "slaney",
        "power": 2.0,
        "dynamic_range_db": DYNAMIC_RANGE_DB,
        "reference": "maximum of the clip",
        "highest_band": "top row",
    }
    if path.exists():
        if _read_json(path) != settings:
            raise FmaNbError(
                f"{path} is damaged or tells of other settings than preset {preset.name!r}: "
                "move that folder away and run the same command again."
            )
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _known_skips(folder: Path, index: Index) -> dict[int, str]:
    """Return the clips an earlier run skipped and whose files have not changed since."""
    paths = dict(zip(index.tracks["track_id"], index.tracks["path"], strict=True))
    try:
        rows = pd.read_csv(folder / "skipped.csv")
        return {
            int(row.track_id): str(row.reason)
            for row in rows.itertuples()
            if row.track_id in paths and _file_state(Path(paths[row.track_id])) == row.file_state
        }
    except (FileNotFoundError, pd.errors.EmptyDataError, pd.errors.ParserError, AttributeError):
        return {}  # nothing known: the clips are simply tried again


def _file_state(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size}/{status.st_mtime_ns}"


def _write_skipped(folder: Path, index: Index, reasons: dict[int, str]) -> pd.DataFrame:
    found = index.tracks[index.tracks["track_id"].isin(reasons)][["track_id", "path"]]
    found = found.assign(reason=found["track_id"].map(reasons))
    with atomic_path(folder / "skipped.csv") as temporary:
        states = [_file_state(Path(path)) for path in found["path"]]
        found.assign(file_state=states).to_csv(temporary, index=False)
    return pd.concat([index.dropped, found], ignore_index=True).sort_values("track_id")


def _check_unreadable(skipped: pd.DataFrame, n_clips: int) -> None:
    unreadable = skipped[~skipped["reason"].str.startswith("on FMA's list")]
    if len(unreadable) > MAX_UNREADABLE * n_clips:
        listed = "".join(f"\n  {row.path}: {row.reason}" for row in unreadable.head(20).itertuples())
        more = f"\n  and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
        raise FmaNbError(
            f"{len(unreadable)} of {n_clips} clips cannot be read, more than "
            f"{MAX_UNREADABLE:.0%}: get these files again and rerun.{listed}{more}"
        )
