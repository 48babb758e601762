"""The dataset `fma_mini`: synthetic MP3s in FMA's own layout, so that no download is needed.

It takes the place of a download: the same folders, the same ``tracks.csv`` with its 52 columns under three
header rows, artists who never cross splits, some odd sample rates and mono files, one truncated and one
empty MP3. Everything is drawn from a seed; no number measured on it says anything about FMA.
"""

import json
import os
import shutil
import tomllib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fma_nb.bulk.folders import clear_temporaries, locked
from fma_nb.bulk.workers import run_locally
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, audio_dir, clip_path, data_dir, metadata_dir, write_text
from fma_nb.raw.clips import DATASET, MiniConfig, PlannedTrack, plan_tracks, write_clip
from fma_nb.raw.score import GENRES

GENERATOR_VERSION = 2
WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))


def make_fma_mini(
    config: MiniConfig | None = None, *, workers: int | None = None, progress: bool = True
) -> Path:
    """Make the course's dataset, or what is missing of it; return the folder of its MP3s.

    An MP3 that exists is done, so a killed run goes on where it was. ``tracks.csv`` in `fma_mini_metadata` is
    written last: where it exists the dataset is complete. Files of another configuration, and spectrograms
    made from them, are removed first. A second call for the same folder waits for the first. The bytes are
    the same whatever the number of ``workers``, by default one a core. A file that cannot be written or a
    worker that was killed raises `FmaNbError`.
    """
    if workers is not None and workers < 1:
        raise FmaNbError(f"workers={workers} is too small: give at least 1.")
    config = config or MiniConfig()
    tracks = plan_tracks(config)
    metadata = metadata_dir(DATASET)
    if _is_unchanged(config) and (metadata / "tracks.csv").exists() and not _missing(tracks):
        return audio_dir(DATASET)  # perhaps in a folder that only its owner may write
    with locked(metadata):
        _start_over_if_changed(config)
        if missing := _missing(tracks):
            _write_clips(missing, config, workers or os.cpu_count() or 1, progress)
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
        write_text(metadata_dir(DATASET) / "mini.json", _record_text(config))
    clear_temporaries(audio_dir(DATASET))


def _write_clips(tracks: list[PlannedTrack], config: MiniConfig, workers: int, progress: bool) -> None:
    jobs = [(track, config) for track in tracks]
    with Progress(len(jobs), f"{DATASET} (synthetic)", "clip", visible=progress) as bar:
        for (track, _), reason in run_locally(write_clip, jobs, min(workers, len(jobs))):
            if reason is not None:
                raise FmaNbError(
                    f"{clip_path(DATASET, track.track_id)} cannot be made ({reason}): run the same command "
                    "again, with fewer workers if memory is short."
                )
            bar.update()


def genre_table(tracks: list[PlannedTrack]) -> pd.DataFrame:
    """Return the rows of ``genres.csv``: FMA's ids of its eight top genres."""
    counts = pd.Series([track.genre for track in tracks]).value_counts()
    rows = [(genre.fma_id, counts[name], 0, name, genre.fma_id) for name, genre in GENRES.items()]
    table = pd.DataFrame(rows, columns=["genre_id", "#tracks", "parent", "title", "top_level"])
    return table.set_index("genre_id").sort_index()


def track_table(tracks: list[PlannedTrack], config: MiniConfig) -> pd.DataFrame:
    """Return ``tracks.csv``: FMA's 52 columns under two levels of headers, indexed by ``track_id``."""
    rows = []
    n_tracks = Counter((track.genre, track.artist) for track in tracks)
    for track in tracks:
        genre_index = list(GENRES).index(track.genre)
        artist_id = 1 + genre_index * config.artists_per_genre + track.artist
        artist_rng = np.random.default_rng([config.seed, artist_id])
        rng = np.random.default_rng([config.seed, artist_id, track.track])
        artist = _artist_columns(artist_id, track.genre, artist_rng)
        columns = {
            "album": _album_columns(artist_id, n_tracks[track.genre, track.artist], artist_rng),
            "artist": artist,
            "set": {"split": track.split, "subset": "small"},
            "track": _track_columns(track, artist["name"], rng),
        }
        rows.append({(top, name): value for top, part in columns.items() for name, value in part.items()})
    table = pd.DataFrame(rows, index=pd.Index([track.track_id for track in tracks], name="track_id"))
    table.columns = pd.MultiIndex.from_tuples(table.columns)
    return table


def _artist_columns(artist_id: int, genre: str, rng: np.random.Generator) -> dict[str, Any]:
    # A walk through all pairs of words, so that no two artists of the course share a name.
    adjectives, nouns, places = WORDS["adjectives"], WORDS["nouns"], WORDS["places"]
    pair = 97 * artist_id % (len(adjectives) * len(nouns))
    name = f"{adjectives[pair % len(adjectives)]} {nouns[pair // len(adjectives)]}"
    place = places[rng.integers(len(places))]
    bio = (
        f'<p>"{name}" is synthetic: no person, no band, only numbers drawn from a seed.</p>\n'
        f"<p>Plays {genre}. All instruments are computed.</p>"
    )
    return {
        "active_year_begin": f"{rng.integers(1995, 2015)}-01-01 00:00:00" if rng.random() < 0.4 else None,
        "active_year_end": None,
        "associated_labels": "Seed & Sons, Random Draw" if rng.random() < 0.5 else None,
        "bio": bio, "comments": rng.integers(4), "date_created": _moment(artist_id, rng),
        "favorites": rng.integers(40), "id": artist_id,
        "latitude": place.get("latitude"), "location": place.get("location"),
        "longitude": place.get("longitude"),
        "members": f"The {name} Oscillator\nA Noise Generator" if rng.random() < 0.6 else None,
        "name": name, "related_projects": None, "tags": f"['synthetic', '{name.lower()}']",
        "website": None, "wikipedia_page": None,
    }  # fmt: skip


def _album_columns(artist_id: int, n_tracks: int, rng: np.random.Generator) -> dict[str, Any]:
    moment = _moment(artist_id, rng)
    return {
        "comments": rng.integers(3), "date_created": moment, "date_released": f"{moment[:10]} 00:00:00",
        "engineer": None, "favorites": rng.integers(20), "id": artist_id,
        "information": "<p>A <em>synthetic</em> album.</p>" if rng.random() < 0.7 else None,
        "listens": rng.integers(200, 20_000), "producer": None, "tags": "['synthetic']",
        "title": f"{rng.choice(WORDS['openings'])} {rng.choice(WORDS['nouns'])} (synthetic)",
        "tracks": n_tracks, "type": "Album",
    }  # fmt: skip


def _track_columns(track: PlannedTrack, composer: str, rng: np.random.Generator) -> dict[str, Any]:
    genres = f"[{GENRES[track.genre].fma_id}]"
    moment = _moment(track.track_id, rng)
    return {
        "bit_rate": track.bit_rate, "comments": 0,
        "composer": composer if rng.random() < 0.2 else None, "date_created": moment,
        "date_recorded": f"{moment[:10]} 00:00:00" if rng.random() < 0.9 else None,
        "duration": int(rng.lognormal(5.4, 0.4)), "favorites": rng.integers(10),
        "genre_top": track.genre, "genres": genres, "genres_all": genres, "information": None,
        "interest": rng.integers(500, 8000), "language_code": "en", "license": "CC0 1.0 Universal",
        "listens": rng.integers(100, 5000), "lyricist": None, "number": track.track + 1,
        "publisher": None, "tags": "['synthetic']",
        "title": " ".join(rng.choice(WORDS[kind]) for kind in ("openings", "adjectives", "nouns")),
    }  # fmt: skip


def _moment(days: int, rng: np.random.Generator) -> str:
    return str(pd.Timestamp("2008-11-26") + pd.Timedelta(days=days, seconds=int(rng.integers(86_400))))
