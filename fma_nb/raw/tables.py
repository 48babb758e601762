"""The tables of the synthetic set: FMA's ``tracks.csv`` with its 52 columns, and ``genres.csv``."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from fma_nb.raw.plan import MiniConfig, PlannedTrack
from fma_nb.raw.score import GENRES

GENRE_IDS = {
    "Electronic": 15, "Experimental": 38, "Folk": 17, "Hip-Hop": 21,
    "Instrumental": 1235, "International": 2, "Pop": 10, "Rock": 12,
}  # fmt: skip
ADJECTIVES = (
    "Amber", "Brisk", "Crooked", "Distant", "Early", "Faded", "Gentle", "Hollow",
    "Idle", "Lucky", "Mellow", "Northern", "Paper", "Quiet", "Restless", "Silver",
)  # fmt: skip
NOUNS = (
    "Arcade", "Bicycle", "Canal", "Dynamo", "Ferry", "Garden", "Harbour", "Lantern",
    "Meadow", "Orchard", "Postcard", "River", "Sparrow", "Tramway", "Weather",
)  # fmt: skip
OPENINGS = ("After the", "Along the", "Back to the", "Beyond the", "Letters from the", "Two Steps from the")
PLACES = (
    ("Lausanne, Switzerland", 46.5197, 6.6323),
    ("Jersey City, NJ", 40.7178, -74.0431),
    ("Utrecht, Netherlands", 52.0907, 5.1214),
    (None, None, None),
)


def genre_table(tracks: list[PlannedTrack]) -> pd.DataFrame:
    """Return the rows of ``genres.csv``: FMA's ids of its eight top genres."""
    counts = pd.Series([track.genre for track in tracks]).value_counts()
    rows = [(genre_id, counts[name], 0, name, genre_id) for name, genre_id in GENRE_IDS.items()]
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
    pair = 97 * artist_id % (len(ADJECTIVES) * len(NOUNS))
    name = f"{ADJECTIVES[pair % len(ADJECTIVES)]} {NOUNS[pair // len(ADJECTIVES)]}"
    location, latitude, longitude = PLACES[rng.integers(len(PLACES))]
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
        "latitude": latitude, "location": location, "longitude": longitude,
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
        "title": f"{rng.choice(OPENINGS)} {rng.choice(NOUNS)} (synthetic)",
        "tracks": n_tracks, "type": "Album",
    }  # fmt: skip


def _track_columns(track: PlannedTrack, composer: str, rng: np.random.Generator) -> dict[str, Any]:
    genres = f"[{GENRE_IDS[track.genre]}]"
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
        "title": f"{rng.choice(OPENINGS)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
    }  # fmt: skip


def _moment(days: int, rng: np.random.Generator) -> str:
    return str(pd.Timestamp("2008-11-26") + pd.Timedelta(days=days, seconds=int(rng.integers(86_400))))
