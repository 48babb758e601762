"""Synthetic music in eight genres: what is played in `fma_mini`, by whom and when.

A genre is a table of patterns in ``genres.toml``, an artist a random draw of instruments and timbre, a track
a random draw of tempo, key, chords, patterns and form. Three pairs of genres share their instruments and
differ in what happens over time: Folk and Instrumental, Pop and Electronic, Rock and Experimental. Nothing
is sampled or copied. The genres are simplified to learn from; they are no model of real music.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fma_nb.raw import instruments
from fma_nb.raw.instruments import DRUM_KITS, INSTRUMENTS, Samples, Setting, Timbre, filter_band

Levels = npt.NDArray[np.float64]  # how loud each bar is, 0 to 1 [shape=(n_bars + 1,)]
Groove = dict[str, str]  # the steps of each drum
STEPS_PER_BAR = 16
PEAK = 0.65  # MP3 at a low bit rate overshoots, at the worst by 3 dB


class Player(NamedTuple):
    """A part in a band: the instruments to choose from, the register, and the place in the mix."""

    instruments: list[str]
    octave: int = 4
    level_db: float = 0.0
    pan: float = 0.0
    reverb: float = 0.2
    swell: bool = False


class Line(NamedTuple):
    """What a player plays, and when; drums have names of `GROOVES` for patterns."""

    patterns: list[str]
    forms: list[str]
    backwards: bool = False


class Genre(NamedTuple):
    """What the tracks of a genre have in common; each track draws from it."""

    fma_id: int
    tempo: tuple[float, float]
    swing: tuple[float, float]
    looseness: float
    scales: list[str]
    progressions: list[str]
    lines: dict[str, Line]


_MUSIC = tomllib.loads(Path(__file__).with_name("genres.toml").read_text(encoding="utf-8"))
SCALES: dict[str, list[int]] = _MUSIC["scales"]
GROOVES: dict[str, Groove] = _MUSIC["grooves"]
PLAYERS = {name: Player(**settings) for name, settings in _MUSIC["players"].items()}
GENRES = {
    name: Genre(**settings | {"lines": {player: Line(**line) for player, line in settings["lines"].items()}})
    for name, settings in _MUSIC["genres"].items()
}


class Song(NamedTuple):
    """What all lines of one track share; a clip starts ``upbeat_seconds`` into its first bar."""

    bar_seconds: float
    n_bars: int
    upbeat_seconds: float
    first_bar: int
    form: int
    swing: float
    looseness: float
    tonic: int
    scale: list[int]
    roots: tuple[int, ...]


def draw_song(genre: Genre, pace: float, seconds: float, rng: np.random.Generator) -> Song:
    """Draw a track's tempo, key, chords and form; ``pace`` (0 to 1) is the artist's tempo."""
    slow, fast = genre.tempo
    bar_seconds = 240 / (slow + (fast - slow) * np.clip(pace + rng.normal(0, 0.15), 0, 1))
    progression = str(rng.choice(genre.progressions)).split()
    return Song(
        bar_seconds=bar_seconds,
        n_bars=int(seconds / bar_seconds) + 2,
        upbeat_seconds=rng.uniform(0, bar_seconds),
        # FMA's clips are cut from the middle of a track: a form begins at any of its bars.
        first_bar=int(rng.integers(8)),
        form=int(rng.integers(12)),
        swing=rng.uniform(*genre.swing),
        looseness=genre.looseness,
        tonic=int(rng.integers(55, 67)),
        scale=SCALES[str(rng.choice(genre.scales))],
        roots=tuple(int(root) - 7 * (int(root) > 4) for root in progression),
    )


class Note(NamedTuple):
    """Something to play: onset and length in s, MIDI pitches or a drum's letter, loudness 0 to 1."""

    onset: float
    seconds: float
    pitches: tuple[int, ...]
    drum: str
    loudness: float


def bar_levels(line: Line, song: Song) -> Levels:
    """Return how loud a line is in each bar, 0 to 1 [shape=(n_bars + 1,)]."""
    form = line.forms[song.form % len(line.forms)]
    digits = [int(form[(song.first_bar + bar) % len(form)]) for bar in range(song.n_bars + 1)]
    return np.power(np.array(digits) / 9, 1.5)


def melodic_notes(
    pattern: str, octave: int, levels: Levels, song: Song, rng: np.random.Generator
) -> Iterator[Note]:
    """Play a pattern over the song's chords; a note lasts until the next character that is no dot."""
    bars = ["".join(bar.split()) for bar in pattern.split("|")]
    steps = "".join(bars[(song.first_bar + bar) % len(bars)] for bar in range(song.n_bars))
    for note in re.finditer(r"([^.~])\.*", steps):
        bar, step = divmod(note.start(), STEPS_PER_BAR)
        if levels[bar]:
            root = song.roots[(song.first_bar + bar) % len(song.roots)]
            pitches = _pitches(note[1], song, root, octave, rng)
            seconds = len(note[0]) / STEPS_PER_BAR * song.bar_seconds
            accent = (1.0 if step % 4 == 0 else 0.8) * rng.uniform(0.85, 1)
            yield Note(_onset(bar, step, song, rng), seconds, pitches, "", accent * levels[bar])


def drum_notes(groove: Groove, levels: Levels, song: Song, rng: np.random.Generator) -> Iterator[Note]:
    """Play a groove; ``X`` is an accent."""
    for bar in range(song.n_bars):
        for drum, steps in groove.items():
            for step, symbol in enumerate(steps):
                if symbol != "." and levels[bar]:
                    accent = (1.0 if symbol == "X" else 0.65) * rng.uniform(0.8, 1)
                    yield Note(_onset(bar, step, song, rng), 0.0, (), drum, accent * levels[bar])


def _onset(bar: int, step: int, song: Song, rng: np.random.Generator) -> float:
    swing = song.swing if step % 2 else 0.0
    in_time = (bar + (step + swing) / STEPS_PER_BAR) * song.bar_seconds - song.upbeat_seconds
    return in_time + song.looseness * rng.standard_normal()


def _pitches(symbol: str, song: Song, root: int, octave: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Turn a pattern's character into MIDI pitches."""
    middle = 12 * octave + 12
    if symbol == "C":
        # Folded into one octave, so that each voice moves little from chord to chord.
        chord = [_scale_pitch(song, root + step) for step in (0, 2, 4)]
        return tuple(sorted((pitch - middle + 5) % 12 + middle - 5 for pitch in chord))
    steps = int(rng.integers(12)) if symbol == "?" else int(symbol.replace("P", "0"))
    pitch = _scale_pitch(song, root + steps) + middle - 60
    return (pitch, pitch + 7, pitch + 12) if symbol == "P" else (pitch,)


def _scale_pitch(song: Song, step: int) -> int:
    octave, degree = divmod(step, len(song.scale))
    return song.tonic + 12 * octave + song.scale[degree]


def synthesize_track(
    genre: str, artist: int, track: int, seed: int = 0, seconds: float = 30.0, sample_rate: int = 44_100
) -> Samples:
    """Make one piece of music: stereo samples between -0.65 and 0.65 [shape=(n_samples, 2)].

    ``artist`` counts the artists of the genre, ``track`` the tracks of the artist, both from 0; ``seed`` is
    that of the whole dataset.
    """
    key = [seed, list(GENRES).index(genre), artist]
    artist_rng, track_rng = np.random.default_rng(key), np.random.default_rng([*key, track])
    timbre, pace = instruments.draw_timbre(artist_rng), artist_rng.random()
    song = draw_song(GENRES[genre], pace, seconds, track_rng)
    mix = np.zeros((3, int(seconds * sample_rate)), np.float32)  # left, right, into the room
    for name, line in GENRES[genre].lines.items():
        player = PLAYERS[name]
        favourites = artist_rng.choice(player.instruments, 2)
        instrument = str(track_rng.choice(favourites))
        loudness = 10 ** ((player.level_db + artist_rng.normal(0, 2)) / 20)
        # A noise source of its own, so that the same notes are drawn at every sample rate.
        setting = Setting(sample_rate, timbre, track_rng.spawn(1)[0])
        played = render_line(line, player, instrument, song, setting, mix.shape[1], track_rng)
        angle = np.pi / 4 * (1 + player.pan)
        for channel, share in enumerate((np.cos(angle), np.sin(angle), player.reverb)):
            mix[channel] += np.float32(loudness * share) * played
    stereo = mix[:2] + instruments.reverb(mix[2], timbre.room_seconds, sample_rate, track_rng)
    return np.ascontiguousarray(_master(stereo, timbre, sample_rate, track_rng).T)


def render_line(
    line: Line, player: Player, instrument: str, song: Song, setting: Setting, n_samples: int,
    rng: np.random.Generator,
) -> Samples:  # fmt: skip
    """Play one line from beginning to end [shape=(n_samples,)]; equal notes are synthesized once."""
    levels = bar_levels(line, song)
    pattern = str(rng.choice(line.patterns))
    if instrument in DRUM_KITS:
        notes = drum_notes(GROOVES[pattern], levels, song, rng)
    else:
        notes = melodic_notes(pattern, player.octave, np.sign(levels) if player.swell else levels, song, rng)
    bus = np.zeros(n_samples, np.float32)
    sounds: dict[tuple[object, ...], Samples] = {}
    for note in notes:
        key = (note.drum, note.pitches, round(note.seconds, 3))
        if key not in sounds:
            sounds[key] = _play(instrument, note, setting)[:: -1 if line.backwards else 1]
        start = int(note.onset * setting.sample_rate)
        heard = sounds[key][max(-start, 0) : max(n_samples - start, 0)]
        bus[max(start, 0) :][: heard.size] += np.float32(note.loudness) * heard
    return _swell(bus, levels, song, setting.sample_rate) if player.swell else bus


def _play(instrument: str, note: Note, setting: Setting) -> Samples:
    if note.drum:
        return DRUM_KITS[instrument][note.drum](setting)
    hertz = 440 * 2 ** ((np.array(note.pitches) - 69) / 12)
    return INSTRUMENTS[instrument](hertz, note.seconds, setting)


def _swell(bus: Samples, levels: Levels, song: Song, sample_rate: int) -> Samples:
    """Change loudness and brightness gradually from bar to bar."""
    bars = (np.arange(bus.size) / sample_rate + song.upbeat_seconds) / song.bar_seconds
    envelope = np.interp(bars, np.arange(levels.size), levels).astype(np.float32)
    dark = filter_band(bus, "lowpass", 500, sample_rate)
    return envelope * (dark + envelope * (bus - dark))


def _master(stereo: Samples, timbre: Timbre, sample_rate: int, rng: np.random.Generator) -> Samples:
    """Finish a mix: the artist's treble limit, soft clipping, background noise, headroom for MP3."""
    mix = filter_band(stereo, "lowpass", timbre.highest_hz, sample_rate)
    mix *= np.float32(1 / max(np.quantile(np.abs(mix[:, ::16]), 0.9995), 1e-3))
    np.tanh(mix, out=mix)
    mix += np.float32(10 ** (timbre.noise_db / 20)) * rng.standard_normal(mix.shape[1], np.float32)
    return mix * np.float32(PEAK / max(np.abs(mix).max(), 0.1))
