"""What the synthetic set consists of: which tracks, by whom, in which split, in which kind of file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fma_nb.project import FmaNbError
from fma_nb.raw.score import GENRES

DATASET = "fma_mini"
SAMPLE_RATES = {44_100: 0.90, 48_000: 0.06, 22_050: 0.04}  # Hz -> share of the tracks
MONO_SHARE = 0.12


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
