"""Stage 1, metadata: from FMA's ``tracks.csv`` to one flat index of the clips of a dataset.

The index is the contract with every later stage: one row per track with the columns `INDEX_COLUMNS`.
Notebook 01 teaches what is in it, and why the split by artist matters.

References
----------
M. Defferrard, K. Benzi, P. Vandergheynst, X. Bresson: "FMA: A Dataset for Music Analysis", ISMIR 2017.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fma_nb.project import (
    SPLITS,
    SYNTHETIC_DATASETS,
    FmaNbError,
    audio_dir,
    check_dataset,
    clip_paths,
    metadata_dir,
)

GENRES = ("Electronic", "Experimental", "Folk", "Hip-Hop", "Instrumental", "International", "Pop", "Rock")
INDEX_COLUMNS = ["track_id", "split", "genre", "artist_id", "title", "path"]

# FMA's wiki lists these clips of the small subset as cut short (the first three) or without audio.
ERRATA = (98565, 98567, 98569, 99134, 108925, 133297)
MISSING = "file missing"

_SPLIT_NAMES = {"training": "train", "validation": "val", "test": "test"}
_SUBSETS = {
    "fma_mini": ("small",),
    "fma_small": ("small",),
    "fma_medium": ("small", "medium"),
    "fma_large": ("small", "medium", "large"),
}
_NEEDED_COLUMNS = ("set.split", "set.subset", "track.genre_top", "track.title", "artist.id")


@dataclass(frozen=True)
class Index:
    """The clips of a dataset, and those that were left out."""

    tracks: pd.DataFrame  # one row per usable track, columns `INDEX_COLUMNS`, ordered by track_id
    dropped: pd.DataFrame  # one row per track that was left out: track_id, path, reason

    def summary(self) -> str:
        """Return one line: how many tracks there are and how many were dropped for which reason."""
        reasons = self.dropped["reason"].value_counts()
        listed = "".join(f"; {count} {reason}" for reason, count in reasons.items())
        return f"{len(self.tracks)} tracks, {len(self.dropped)} dropped{listed}"


def read_tracks(path: Path) -> pd.DataFrame:
    """Read FMA's ``tracks.csv``: 52 columns under two header rows, indexed by ``track_id``.

    Raises `FmaNbError` when the file is missing, has not FMA's header or columns, or is cut off.
    """
    try:
        tracks = pd.read_csv(path, header=[0, 1], index_col=0, encoding="utf-8-sig", low_memory=False)
    except FileNotFoundError as error:
        raise FmaNbError(f"{path} is missing: get it with 'fma-nb download metadata'.") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, IndexError) as error:
        raise _damaged(path, str(error).splitlines()[-1]) from error
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise _damaged(path, "its last row is cut off")
    if fault := _first_fault(tracks):
        raise _damaged(path, fault)
    return tracks


def _first_fault(tracks: pd.DataFrame) -> str | None:
    if missing := [name for name in _NEEDED_COLUMNS if tuple(name.split(".")) not in tracks.columns]:
        return f"no column {', '.join(missing)} under two header rows"
    if not pd.api.types.is_integer_dtype(tracks.index):
        return "a track_id is not a whole number"
    artists = tracks["artist", "id"]
    if not pd.api.types.is_numeric_dtype(artists) or np.isinf(artists).any():
        return "an artist.id is not a number"
    if len(twice := tracks.index[tracks.index.duplicated()]):
        return f"track {twice[0]} stands in it twice"
    needed = tracks[[("set", "split"), ("set", "subset"), ("artist", "id")]]
    if len(cut := tracks.index[needed.isna().any(axis=1)]):
        return f"the row of track {cut[0]} is cut off"
    return None


def _damaged(path: Path, fault: str) -> FmaNbError:
    way_out = "delete it and run 'fma-nb download metadata' again"
    return FmaNbError(f"{path} is not FMA's tracks.csv or is damaged ({fault}): {way_out}.")


def dataset_rows(tracks: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Select the rows of a dataset and flatten them to the index columns.

    The subsets are nested: ``fma_medium`` contains ``fma_small``. Tracks without a top genre, which
    only ``fma_large`` has, are left out. Raises `FmaNbError` when the dataset or the name of a split is
    unknown, or no row belongs to the dataset.
    """
    check_dataset(dataset)
    chosen = tracks[tracks["set", "subset"].isin(_SUBSETS[dataset]) & tracks["track", "genre_top"].notna()]
    if chosen.empty:
        raise FmaNbError(f"dataset={dataset}: its tracks.csv has no row of this subset with a genre.")
    unknown = chosen["set", "split"][~chosen["set", "split"].isin(_SPLIT_NAMES)]
    if len(unknown):
        raise FmaNbError(f"tracks.csv: set.split={unknown.iloc[0]!r} is none of training, validation, test.")
    rows = pd.DataFrame(index=chosen.index.rename("track_id"))
    rows["split"] = chosen["set", "split"].map(_SPLIT_NAMES)
    rows["genre"] = chosen["track", "genre_top"].astype(str).str.replace(" / ", "-")  # it names a folder
    rows["artist_id"] = chosen["artist", "id"].astype(int)
    rows["title"] = chosen["track", "title"].fillna("").astype(str)
    rows["path"] = [str(path) for path in clip_paths(dataset, rows.index)]
    return rows.sort_index().reset_index()


def check_index(rows: pd.DataFrame, dataset: str) -> None:
    """Assert what the course relies on: known genres, full splits, no artist in two of them.

    Raises `FmaNbError` that names the split, genre, artist or track that breaks a promise.
    """
    unknown = sorted(set(rows["genre"]) - set(GENRES))
    if unknown and dataset in ("fma_mini", "fma_small"):
        raise FmaNbError(f"{dataset}: genre {unknown[0]!r} is not one of {', '.join(GENRES)}.")
    if twice := rows["track_id"][rows["track_id"].duplicated()].tolist():
        raise FmaNbError(f"{dataset}: track {twice[0]} stands in the index twice.")
    _check_splits(rows, dataset)
    check_artists(rows)


def _check_splits(rows: pd.DataFrame, dataset: str, note: str = "") -> None:
    for split in SPLITS:
        if absent := sorted(set(rows["genre"]) - set(rows["genre"][rows["split"] == split])):
            raise FmaNbError(f"{dataset}: split {split!r} has no track of genre {absent[0]!r}{note}.")


def check_artists(rows: pd.DataFrame) -> None:
    """Raise `FmaNbError` when an artist has tracks in two splits: that leaks the answer.

    A model that knows an artist's sound scores on that artist, not on the genre (A. Flexer: "A Closer
    Look on Artist Filters for Musical Genre Classification", ISMIR 2007).
    """
    splits = rows.groupby("artist_id")["split"].nunique()
    shared = splits.index[splits > 1]
    if len(shared):
        raise FmaNbError(f"tracks.csv: artist {shared[0]} has tracks in more than one split.")


def load_index(dataset: str, *, partial: bool = False) -> Index:
    """Build the index of a dataset from its ``tracks.csv`` and the MP3s that are on the disk.

    FMA's known broken clips are dropped by id, missing and empty files by name. Clips that turn out
    to be undecodable are listed by the spectrogram stage, which decodes every one. With ``partial`` a
    split may lack a genre. Raises `FmaNbError` when the dataset is not there, its metadata is damaged or
    a promise of `check_index` is broken.
    """
    check_dataset(dataset)
    tracks_csv = metadata_dir(dataset) / "tracks.csv"
    if not tracks_csv.exists() and (dataset in SYNTHETIC_DATASETS or not audio_dir(dataset).is_dir()):
        raise FmaNbError(f"{tracks_csv} is missing: {how_to_get(dataset)}.")
    rows = dataset_rows(read_tracks(tracks_csv), dataset)
    check_index(rows, dataset)
    rows["reason"] = [_drop_reason(row.track_id, Path(row.path)) for row in rows.itertuples()]
    kept = rows[rows["reason"].isna()][INDEX_COLUMNS]
    dropped = rows[rows["reason"].notna()][["track_id", "path", "reason"]]
    if kept.empty:
        raise FmaNbError(_none_there(dataset, len(rows)))
    if not partial:
        there = f" ({len(kept):,} of {len(rows):,} clips are there): {how_to_get(dataset)}, or give --partial"
        _check_splits(kept, dataset, there)
    return Index(kept.reset_index(drop=True), dropped.reset_index(drop=True))


def _drop_reason(track_id: int, path: Path) -> str | None:
    if track_id in ERRATA:
        return "on FMA's list of broken clips"
    try:
        return None if path.stat().st_size else "file empty"
    except PermissionError:
        return "no permission to read it"
    except OSError:  # also a link to nowhere
        return MISSING


def _none_there(dataset: str, n_clips: int) -> str:
    folder = audio_dir(dataset)
    found = ", ".join(sorted(path.name for path in folder.glob("[!.]*"))[:3]) or "nothing"
    return (
        f"{dataset}: none of its {n_clips} MP3s is there. In {folder}, where they belong as 000/000002.mp3, "
        f"is {found}: move them there, or {how_to_get(dataset)}."
    )


def how_to_get(dataset: str) -> str:
    """Return the command that brings a dataset, to end an error message with."""
    if dataset in SYNTHETIC_DATASETS:
        return "make it with 'fma-nb mini'"
    return f"get it with 'fma-nb download metadata {dataset.removeprefix('fma_')}'"


def artists_known(dataset: str) -> bool:
    """Tell whether the metadata that names each track's artist is at hand."""
    return (metadata_dir(dataset) / "tracks.csv").exists()


def artist_groups(dataset: str, track_ids: Sequence[int]) -> list[int]:
    """Return the artist of each track; a track whose artist is not known is a group of its own.

    Tracks of one artist tend to be right or wrong together; intervals that ignore this are too narrow.
    """
    own = [-1 - track_id for track_id in track_ids]  # negative: no artist's id
    if not artists_known(dataset):
        return own
    artists = read_tracks(metadata_dir(dataset) / "tracks.csv")["artist", "id"]
    groups = [int(artist) for artist in map(artists.get, track_ids, own)]
    if alone := len(set(groups) & set(own)):
        print(f"{alone:,} of {len(groups):,} tracks are not in {dataset}'s metadata: each is its own artist.")
    return groups
