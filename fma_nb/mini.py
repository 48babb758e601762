"""The embedded dataset: `fma_mini`, synthetic MP3s in FMA's own layout, so that no download is needed.

Before the first stage of the pipeline, in place of a download: the same folders, the same ``tracks.csv``
with its 52 columns under three header rows, artists who never cross splits, some odd sample rates and
mono files, one truncated and one empty MP3. Everything is drawn from a seed; no number measured on it
says anything about FMA.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pandas as pd
import soundfile as sf

from fma_nb.instruments import Samples
from fma_nb.progress import Progress
from fma_nb.project import FmaNbError, atomic_path, audio_dir, clip_path, data_dir, metadata_dir
from fma_nb.synthesis import GENRES, synthesize_track

DATASET = "fma_mini"
GENERATOR_VERSION = 1
GENRE_IDS = {
    "Electronic": 15,
    "Experimental": 38,
    "Folk": 17,
    "Hip-Hop": 21,
    "Instrumental": 1235,
    "International": 2,
    "Pop": 10,
    "Rock": 12,
}
SAMPLE_RATES = {44_100: 0.90, 48_000: 0.06, 22_050: 0.04}  # Hz -> share of the tracks
MONO_SHARE = 0.12
TRUNCATED_BYTES = 900
# Of libsndfile's 0 (best) to 1 (smallest): about 100 kbit/s and a third faster than constant bit rate.
MP3_COMPRESSION = 0.75


@dataclass(frozen=True)
class MiniConfig:
    """What `fma_mini` is made of. The defaults are the dataset of the course.

    Attributes
    ----------
    seed
        Another seed gives other artists and other music.
    artists_per_genre
        Three fifths of them are for training, a fifth for validation, a fifth for test; at least 3.
    tracks_per_artist
        Tracks of each artist.
    seconds
        Length of a clip in s.
    """

    seed: int = 0
    artists_per_genre: int = 10
    tracks_per_artist: int = 3
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what no dataset can be made of."""
        for name, smallest in (
            ("seed", 0),
            ("artists_per_genre", 3),
            ("tracks_per_artist", 1),
            ("seconds", 1),
        ):
            if getattr(self, name) < smallest:
                raise FmaNbError(f"{name}={getattr(self, name)} is too small: give at least {smallest}.")


@dataclass(frozen=True)
class PlannedTrack:
    """One track before it exists. ``artist`` and ``track`` count within the genre and the artist."""

    track_id: int
    genre: str
    artist: int
    track: int
    split: str
    sample_rate: int
    n_channels: int
    damage: str = ""


def plan_tracks(config: MiniConfig) -> list[PlannedTrack]:
    """List the tracks of a dataset, genres and splits mixed, ordered by id.

    The first Hip-Hop and the first Pop artist, both for training, have one more track each, whose files
    are damaged: one truncated, one empty.
    """
    rng = np.random.default_rng([config.seed, len(GENRES)])
    wanted = [
        (genre, artist, track, "")
        for genre in GENRES
        for artist in range(config.artists_per_genre)
        for track in range(config.tracks_per_artist)
    ]
    extra = config.tracks_per_artist
    wanted += [("Hip-Hop", 0, extra, "truncated"), ("Pop", 0, extra, "empty")]
    # Ids spread from 2 on over the folders 000 and 001, as FMA's have gaps.
    step = max(1998 // len(wanted), 1)
    return [
        PlannedTrack(
            track_id=2 + step * place,
            genre=genre,
            artist=artist,
            track=track,
            split=_split_of(artist, config.artists_per_genre),
            sample_rate=int(rng.choice(list(SAMPLE_RATES), p=list(SAMPLE_RATES.values()))),
            n_channels=1 if rng.random() < MONO_SHARE else 2,
            damage=damage,
        )
        for place, (genre, artist, track, damage) in enumerate(
            wanted[i] for i in rng.permutation(len(wanted))
        )
    ]


def _split_of(artist: int, n_artists: int) -> str:
    n_held_out = max(1, round(0.2 * n_artists))
    n_training = n_artists - 2 * n_held_out
    if artist < n_training:
        return "training"
    return "validation" if artist < n_training + n_held_out else "test"


def make_fma_mini(
    config: MiniConfig | None = None, *, workers: int | None = None, progress: bool = True
) -> Path:
    """Make the dataset, or what is missing of it; the same bytes whatever the number of workers.

    An MP3 that exists is done, so a killed run goes on where it was. ``tracks.csv`` is written last: where
    it exists the dataset is complete. Files of another configuration, and spectrograms made from them,
    are removed first. A second call for the same folder waits for the first.

    Parameters
    ----------
    config
        What to make; the course's dataset by default.
    workers
        Processes; all cores by default.
    progress
        Whether to show a progress bar.

    Returns
    -------
    folder
        Where the MP3s are; ``tracks.csv`` and ``genres.csv`` are in ``fma_mini_metadata`` beside it.

    Raises
    ------
    FmaNbError
        When the configuration makes no sense, a file cannot be written or a worker was killed.
    """
    if workers is not None and workers < 1:
        raise FmaNbError(f"workers={workers} is too small: give at least 1.")
    config = config or MiniConfig()
    tracks = plan_tracks(config)
    metadata = metadata_dir(DATASET)
    try:
        metadata.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(metadata / ".lock"):
            _start_over_if_changed(config)
            missing = [track for track in tracks if not clip_path(DATASET, track.track_id).exists()]
            _write_clips(missing, config, workers or os.cpu_count() or 1, progress)
            if missing or not (metadata / "tracks.csv").exists():
                _write_csv(genre_table(tracks), metadata / "genres.csv", index=False)
                _write_csv(track_table(tracks, config), metadata / "tracks.csv", index=True)
    except OSError as error:
        raise FmaNbError(
            f"{error.filename or metadata} cannot be written ({error.strerror}): "
            "make space or give write access, then run the same command again."
        ) from error
    return audio_dir(DATASET)


def _start_over_if_changed(config: MiniConfig) -> None:
    """Remove what another configuration, another version or a killed writer has left behind."""
    record = metadata_dir(DATASET) / "mini.json"
    settings = {"generator_version": GENERATOR_VERSION, "synthetic": True, **asdict(config)}
    text = json.dumps(settings, indent=2) + "\n"
    if not record.exists() or record.read_text(encoding="utf-8") != text:
        (metadata_dir(DATASET) / "tracks.csv").unlink(missing_ok=True)
        for folder in (audio_dir(DATASET), *(data_dir() / "spectrograms").glob(f"{DATASET}-*")):
            if folder.exists():
                shutil.rmtree(folder)
        with atomic_path(record) as temporary:
            temporary.write_text(text, encoding="utf-8")
    for leftover in audio_dir(DATASET).glob("*/.*.tmp"):
        leftover.unlink()


# --- Clips


def encode_mp3(samples: Samples, sample_rate: int) -> bytes:
    """Encode ``samples`` [shape=(n_samples, n_channels)] as MP3 of variable bit rate."""
    buffer = io.BytesIO()
    sf.write(
        buffer,
        samples,
        sample_rate,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=MP3_COMPRESSION,
    )
    return buffer.getvalue()


def write_clip(track: PlannedTrack, config: MiniConfig) -> None:
    """Synthesize a track, damage it if that is planned, and write its MP3."""
    mp3 = b""
    if track.damage != "empty":
        samples, sample_rate = synthesize_track(
            track.genre,
            track.artist,
            track.track,
            seed=config.seed,
            seconds=config.seconds,
            sample_rate=track.sample_rate,
        )
        if track.n_channels == 1:
            samples = samples.mean(axis=1, keepdims=True)
        mp3 = encode_mp3(samples, sample_rate)
    if track.damage == "truncated":
        mp3 = mp3[:TRUNCATED_BYTES]
    with atomic_path(clip_path(DATASET, track.track_id)) as temporary:
        temporary.write_bytes(mp3)


def _write_clips(tracks: list[PlannedTrack], config: MiniConfig, workers: int, progress: bool) -> None:
    if not tracks:
        return
    with Progress(len(tracks), f"{DATASET} (synthetic)", "clip", visible=progress) as bar:
        for _ in _written(tracks, config, min(workers, len(tracks))):
            bar.update()


def _written(tracks: list[PlannedTrack], config: MiniConfig, workers: int) -> Iterator[None]:
    """Write the clips in this process or over several; yield after each."""
    write = functools.partial(write_clip, config=config)
    if workers == 1:
        yield from map(write, tracks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        for future in as_completed([pool.submit(write, track) for track in tracks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise FmaNbError(
            f"a process that writes {audio_dir(DATASET)} was killed, perhaps for lack of memory: "
            "run the same command again, with fewer workers if need be."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    """Let Ctrl-C reach only the parent, which lets clips in work be finished; go when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


# --- Metadata

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
LICENSE = "CC0 1.0 Universal"


def genre_table(tracks: list[PlannedTrack]) -> pd.DataFrame:
    """Return the rows of ``genres.csv``: FMA's ids of its eight top genres."""
    counts = pd.Series([track.genre for track in tracks]).value_counts()
    rows = [(genre_id, counts[name], 0, name, genre_id) for name, genre_id in GENRE_IDS.items()]
    table = pd.DataFrame(rows, columns=["genre_id", "#tracks", "parent", "title", "top_level"])
    return table.sort_values("genre_id")


def track_table(tracks: list[PlannedTrack], config: MiniConfig) -> pd.DataFrame:
    """Return ``tracks.csv``: FMA's 52 columns under two levels of headers, indexed by ``track_id``."""
    rows = []
    for track in tracks:
        genre_index = list(GENRES).index(track.genre)
        artist_id = 1 + genre_index * config.artists_per_genre + track.artist
        artist_rng = np.random.default_rng([config.seed, artist_id])
        rng = np.random.default_rng([config.seed, artist_id, track.track])
        artist = _artist_columns(artist_id, track.genre, artist_rng)
        album = _album_columns(artist_id, config, artist_rng)
        columns = {"album": album, "artist": artist}
        columns["set"] = {"split": track.split, "subset": "small"}
        columns["track"] = _track_columns(track, config, artist["name"], rng)
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
        f"<p>Plays {genre}, in one timbre, on instruments that are a few lines of Python each.</p>"
    )
    return {
        "active_year_begin": f"{rng.integers(1995, 2015)}-01-01 00:00:00" if rng.random() < 0.4 else None,
        "active_year_end": None,
        "associated_labels": "Seed & Sons, Random Draw" if rng.random() < 0.5 else None,
        "bio": bio,
        "comments": rng.integers(4),
        "date_created": _moment(artist_id, rng),
        "favorites": rng.integers(40),
        "id": artist_id,
        "latitude": latitude,
        "location": location,
        "longitude": longitude,
        "members": f"The {name} Oscillator\nA Noise Generator" if rng.random() < 0.6 else None,
        "name": name,
        "related_projects": None,
        "tags": f"['synthetic', '{name.lower()}']",
        "website": None,
        "wikipedia_page": None,
    }


def _album_columns(artist_id: int, config: MiniConfig, rng: np.random.Generator) -> dict[str, Any]:
    moment = _moment(artist_id, rng)
    return {
        "comments": rng.integers(3),
        "date_created": moment,
        "date_released": f"{moment[:10]} 00:00:00",
        "engineer": None,
        "favorites": rng.integers(20),
        "id": artist_id,
        "information": "<p>A <em>synthetic</em> album.</p>" if rng.random() < 0.7 else None,
        "listens": rng.integers(200, 20_000),
        "producer": None,
        "tags": "['synthetic']",
        "title": f"{rng.choice(OPENINGS)} {rng.choice(NOUNS)} (synthetic)",
        "tracks": config.tracks_per_artist,
        "type": "Album",
    }


def _track_columns(
    track: PlannedTrack, config: MiniConfig, composer: str, rng: np.random.Generator
) -> dict[str, Any]:
    n_bytes = clip_path(DATASET, track.track_id).stat().st_size
    genres = f"[{GENRE_IDS[track.genre]}]"
    moment = _moment(track.track_id, rng)
    return {
        "bit_rate": 128_000 if track.damage else int(8 * n_bytes / config.seconds),
        "comments": 0,
        "composer": composer if rng.random() < 0.2 else None,
        "date_created": moment,
        "date_recorded": f"{moment[:10]} 00:00:00" if rng.random() < 0.9 else None,
        "duration": int(rng.lognormal(5.4, 0.4)),
        "favorites": rng.integers(10),
        "genre_top": track.genre,
        "genres": genres,
        "genres_all": genres,
        "information": None,
        "interest": rng.integers(500, 8000),
        "language_code": "en",
        "license": LICENSE,
        "listens": rng.integers(100, 5000),
        "lyricist": None,
        "number": track.track + 1,
        "publisher": None,
        "tags": "['synthetic']",
        "title": f"{rng.choice(OPENINGS)} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
    }


def _moment(days: int, rng: np.random.Generator) -> str:
    moment = pd.Timestamp("2008-11-26") + pd.Timedelta(days=days, seconds=int(rng.integers(86_400)))
    return str(moment)


def _write_csv(table: pd.DataFrame, path: Path, *, index: bool) -> None:
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=index, lineterminator="\n")
