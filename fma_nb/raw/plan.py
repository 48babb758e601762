"""What the synthetic set consists of: which tracks, by whom, in which split, in which kind of file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fma_nb.project import FmaNbError
from fma_nb.raw.score import GENRES

DATASET = "fma_mini"
SAMPLE_RATES = {44_100: 0.90, 48_000: 0.06, 22_050: 0.04}  # Hz -> share of the tracks
BIT_RATES = {96_000: 0.5, 128_000: 0.35, 160_000: 0.15}  # bit/s -> share; half of what is usual in FMA
MONO_SHARE = 0.12


@dataclass(frozen=True)
class MiniConfig:
    """What `fma_mini` is made of. The defaults are the dataset of the course.

    Another ``seed`` gives other artists and other music. Three fifths of the artists are for training, a
    fifth for validation, a fifth for test. ``tracks_per_artist`` is a mean: few artists have many tracks and
    many have one, as in FMA. ``seconds`` is the length of a clip in s.
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
    bit_rate: int
    n_channels: int
    damage: str


def plan_tracks(config: MiniConfig) -> list[PlannedTrack]:
    """List the tracks of a dataset, genres and splits mixed, ordered by id.

    The first Hip-Hop and the first Pop artist, both for training, have one more track each, whose files
    are damaged: one truncated, one empty.
    """
    rng = np.random.default_rng([config.seed, len(GENRES)])
    n_held_out = max(1, round(0.2 * config.artists_per_genre))
    n_training = config.artists_per_genre - 2 * n_held_out
    n_artists = {"training": n_training, "validation": n_held_out, "test": n_held_out}
    wanted = []
    for genre in GENRES:
        numbers = ((s, n) for s in n_artists for n in _tracks_of_artists(n_artists[s], config, rng))
        for artist, (split, n_tracks) in enumerate(numbers):
            wanted += [(genre, artist, track, split, "") for track in range(n_tracks)]
    for genre, damage in (("Hip-Hop", "truncated"), ("Pop", "empty")):
        n_tracks = sum(track[:2] == (genre, 0) for track in wanted)
        wanted.append((genre, 0, n_tracks, "training", damage))
    # Ids spread from 2 on over the folders 000 and 001, as FMA's have gaps.
    step = max(1998 // len(wanted), 1)
    planned = []
    for place, number in enumerate(rng.permutation(len(wanted))):
        genre, artist, track, split, damage = wanted[number]
        sample_rate, bit_rate = (
            int(rng.choice(list(shares), p=list(shares.values()))) for shares in (SAMPLE_RATES, BIT_RATES)
        )
        kind = (split, sample_rate, bit_rate, 1 if rng.random() < MONO_SHARE else 2, damage)
        planned.append(PlannedTrack(2 + step * place, genre, artist, track, *kind))
    return planned


def _tracks_of_artists(n_artists: int, config: MiniConfig, rng: np.random.Generator) -> list[int]:
    """Draw how many tracks each artist of a split has, at least one; never the same number for all."""
    shares = 0.5 ** np.arange(n_artists)
    n_tracks = 1 + rng.multinomial((config.tracks_per_artist - 1) * n_artists, shares / shares.sum())
    if n_tracks[0] == n_tracks[-1] > 1:
        n_tracks[0] += 1
        n_tracks[-1] -= 1
    return n_tracks.tolist()
