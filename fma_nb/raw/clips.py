"""The clips of the synthetic set: by whom, in which split, and how one becomes an MP3 file."""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import lameenc
import numpy as np

from fma_nb.project import FmaNbError, atomic_path, clip_path
from fma_nb.raw.instruments import Samples
from fma_nb.raw.score import GENRES, synthesize_track

DATASET = "fma_mini"
SAMPLE_RATES = {44_100: 0.90, 48_000: 0.06, 22_050: 0.04}  # Hz -> share of the tracks
BIT_RATES = {96_000: 0.5, 128_000: 0.35, 160_000: 0.15}  # bit/s -> share; half of what is usual in FMA
MONO_SHARE = 0.12
LAME_QUALITY = 7  # the fastest
KEPT_BYTES = {"": None, "truncated": 900, "empty": 0}  # by the planned damage


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
        limits = {"seed": 0, "artists_per_genre": 3, "tracks_per_artist": 1, "seconds": 1}
        for name, smallest in limits.items():
            if getattr(self, name) < smallest:
                raise FmaNbError(f"{name}={getattr(self, name)} is too small: give at least {smallest}.")


class PlannedTrack(NamedTuple):
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


def write_clip(track: PlannedTrack, config: MiniConfig) -> None:
    """Synthesize a track, damage it if that is planned, and write its MP3."""
    samples = synthesize_track(
        track.genre, track.artist, track.track, config.seed, config.seconds, track.sample_rate
    )
    if track.n_channels == 1:
        samples = samples.mean(axis=1, keepdims=True)
    mp3 = encode_mp3(samples, track.sample_rate, track.bit_rate)
    with atomic_path(clip_path(DATASET, track.track_id)) as temporary:
        temporary.write_bytes(mp3[: KEPT_BYTES[track.damage]])


def encode_mp3(samples: Samples, sample_rate: int, bit_rate: int) -> bytes:
    """Encode ``samples`` [shape=(n_samples, n_channels)] as MP3 of constant ``bit_rate`` in bit/s.

    The first frame is an Info header, so that the length is known and not guessed from the file's size.
    """
    encoder = lameenc.Encoder()
    encoder.silence()
    encoder.set_in_sample_rate(sample_rate)
    encoder.set_out_sample_rate(sample_rate)
    encoder.set_channels(samples.shape[1])
    encoder.set_bit_rate(bit_rate // 1000)
    encoder.set_quality(LAME_QUALITY)
    pcm = np.round(32_767 * samples.clip(-1, 1)).astype("<i2")
    frames = bytes(encoder.encode(pcm.tobytes()) + encoder.flush())
    return _info_frame(frames, sample_rate, bit_rate) + frames


def _info_frame(frames: bytes, sample_rate: int, bit_rate: int) -> bytes:
    """Make the frame without sound that tells how many frames and bytes the file has."""
    is_mpeg1, is_mono = sample_rate >= 32_000, frames[3] >> 6 == 3
    frame_bytes = (144 if is_mpeg1 else 72) * bit_rate / sample_rate
    header = frames[:2] + bytes([frames[2] & ~2]) + frames[3:4]  # that of the first frame, without padding
    side_information = bytes((17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))
    counts = struct.pack(">III", 3, round(len(frames) / frame_bytes), len(frames) + int(frame_bytes))
    return (header + side_information + b"Info" + counts).ljust(int(frame_bytes), b"\0")
