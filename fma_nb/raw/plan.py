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

    Another ``seed`` gives other artists and other music. Three fifths of the artists are for training, a
    fifth for validation, a fifth for test. ``seconds`` is the length of a clip in s.
    """

    seed: int = 0
    artists_per_genre: int = 10
    tracks_per_artist: int = 3
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuse what no dataset can be made of."""
        limits = {"seed": 0, "artists_per_genre": 3, "tracks_per_artist": 1, "seconds": 1}
        for name, smallest in limits.items():
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
    damage: str


def plan_tracks(config: MiniConfig) -> list[PlannedTrack]:
    """List the tracks of a dataset, genres and splits mixed, ordered by id.

    The first Hip-Hop and the first Pop artist, both for training, have one more track each, whose files
    are damaged: one truncated, one empty.
    """
    rng = np.random.default_rng([config.seed, len(GENRES)])
    n_artists, n_tracks = config.artists_per_genre, config.tracks_per_artist
    wanted = [
        (g, artist, track, "") for g in GENRES for artist in range(n_artists) for track in range(n_tracks)
    ]
    wanted += [("Hip-Hop", 0, n_tracks, "truncated"), ("Pop", 0, n_tracks, "empty")]
    n_held_out = max(1, round(0.2 * n_artists))
    splits = ["training"] * (n_artists - 2 * n_held_out) + ["validation"] * n_held_out + ["test"] * n_held_out
    # Ids spread from 2 on over the folders 000 and 001, as FMA's have gaps.
    step = max(1998 // len(wanted), 1)
    planned = []
    for place, number in enumerate(rng.permutation(len(wanted))):
        genre, artist, track, damage = wanted[number]
        sample_rate = int(rng.choice(list(SAMPLE_RATES), p=list(SAMPLE_RATES.values())))
        n_channels = 1 if rng.random() < MONO_SHARE else 2
        kind = (splits[artist], sample_rate, n_channels, damage)
        planned.append(PlannedTrack(2 + step * place, genre, artist, track, *kind))
    return planned
