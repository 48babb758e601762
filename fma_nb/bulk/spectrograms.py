"""The spectrograms of a whole dataset: one PNG per clip, over all cores or a Dask cluster.

What happens to one clip is in `fma_nb.spectrogram`; here are the folder, the workers and the list of the
clips that had to be skipped. A PNG that exists is done, so a killed run goes on where it was.
"""

import contextlib
import functools
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import soundfile as sf

from fma_nb.bulk.folders import check_writable, clear_temporaries, locked
from fma_nb.bulk.workers import CRASHED, NO_MEMORY, run_locally, run_on_cluster
from fma_nb.metadata import MISSING, Index, load_index
from fma_nb.progress import Progress
from fma_nb.project import SPLITS, FmaNbError, atomic_path, spectrogram_dir, write_text
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
    """Make the PNGs of a dataset that are not there yet; return ``track_id, path, reason`` of skipped clips.

    All cores do the work, as many ``workers``, or those of the Dask ``scheduler`` at this address. A second
    run on the same folder waits for the first. Where all is done nothing is written: the folder may be
    somebody else's. Missing MP3s are counted, and the work goes on with those that are there; with
    ``partial`` a split may lack a genre, for a first look at a download that has only begun.

    `FmaNbError` tells of missing data, of a folder that cannot be written or was made with other settings,
    and of more than 5 % of the MP3s being unreadable: the good PNGs stay.
    """
    preset = get_preset(preset_name)
    index = load_index(dataset, partial=partial)
    folder = spectrogram_dir(dataset, preset_name)
    n_clips, missing = len(index.tracks) + len(index.dropped), (index.dropped["reason"] == MISSING).sum()
    if progress and missing:
        print(f"{n_clips - missing:,} of {n_clips:,} MP3s are there.", flush=True)
    settings = _checked_settings(folder / "mel.json", preset)
    jobs, reasons = _to_do(index, folder)
    if jobs:
        with locked(folder):
            jobs, reasons = _to_do(index, folder)  # another run may have done them meanwhile
            for place in {folder, *(png.parent for _, png in jobs)}:
                check_writable(place)
            png_folders = [folder / split for split in SPLITS]  # another run may be writing its pack beside
            clear_temporaries(*png_folders)
            if not (folder / "mel.json").exists():
                write_text(folder / "mel.json", json.dumps(settings, indent=2) + "\n")
            if jobs:
                reasons |= _make(jobs, preset, workers, scheduler, progress)
            clear_temporaries(*png_folders)  # of workers that were killed meanwhile
            found = _with_reasons(index, reasons)
            contents = [_content(Path(row.path), row.reason) for row in found.itertuples()]
            with atomic_path(folder / "skipped.csv") as temporary:
                found.assign(content=contents).to_csv(temporary, index=False)
    found = _with_reasons(index, reasons)
    skipped = pd.concat([index.dropped, found], ignore_index=True).sort_values("track_id")
    _check_unreadable(skipped, n_clips, folder)
    return skipped


def _to_do(index: Index, folder: Path) -> tuple[list[Job], dict[int, str]]:
    """Return the clips to make, and why others are skipped: an earlier run could not read the same bytes."""
    listed = {}  # where nothing is known, all clips are tried
    with contextlib.suppress(OSError, ValueError, KeyError):
        rows = pd.read_csv(folder / "skipped.csv")
        listed = dict(zip(rows["track_id"], zip(rows["reason"], rows["content"], strict=True), strict=True))
    jobs, reasons = [], {}
    for row in index.tracks.itertuples():
        audio, png = Path(row.path), png_path(folder, row.split, row.genre, row.track_id)
        reason, content = listed.get(row.track_id, (None, None))
        if reason is not None and _content(audio, reason) == content:
            reasons[row.track_id] = str(reason)
        elif not png.exists():
            jobs.append((audio, png))
    return jobs, reasons


def _make(
    jobs: list[Job], preset: Preset, workers: int | None, scheduler: str | None, progress: bool
) -> dict[int, str]:
    """Make PNGs; return the reasons, by track id, why some cannot be made."""
    work = functools.partial(make_spectrogram, preset=preset)
    if scheduler is None:
        outcomes = run_locally(work, jobs, workers or os.cpu_count() or 1)
    else:
        outcomes = run_on_cluster(work, jobs, scheduler)
    reasons = {}
    with Progress(len(jobs), f"spectrograms ({preset.name})", "clip", visible=progress) as bar:
        for (_, png), reason in outcomes:
            bar.update()
            if reason is not None:
                reasons[int(png.stem)] = reason
    return reasons


def _checked_settings(path: Path, preset: Preset) -> dict[str, object]:
    """Return how PNGs are made, or raise `FmaNbError` when those of the folder were made otherwise."""
    usual = {"mel_scale": "slaney", "norm": "slaney", "power": 2.0, "dynamic_range_db": DYNAMIC_RANGE_DB}
    settings = asdict(preset) | usual | {"reference": "maximum of the clip", "highest_band": "top row"}
    found = None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text()) if path.exists() else settings
    if found != settings:
        raise FmaNbError(
            f"{path} is damaged or tells of other settings than preset {preset.name!r}: "
            "move that folder away and run the same command again."
        )
    return settings


def _content(path: Path, reason: str) -> str:
    """Return what a clip was judged by: its bytes and the decoder; nothing where the machine was at fault."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if reason not in (CRASHED, NO_MEMORY):
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}/{sf.__libsndfile_version__}"
    return ""


def _with_reasons(index: Index, reasons: dict[int, str]) -> pd.DataFrame:
    found = index.tracks[index.tracks["track_id"].isin(reasons)][["track_id", "path"]]
    return found.assign(reason=found["track_id"].map(reasons))


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
