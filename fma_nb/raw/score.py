"""Synthetic music in eight genres: what is played in `fma_mini`, by whom and when.

A genre is a table of patterns (`GENRES`), an artist a random draw of instruments and timbre, a track a random
draw of tempo, key, chords, patterns and form. Three pairs of genres share their instruments and differ in
what happens over time: Folk and Instrumental, Pop and Electronic, Rock and Experimental. Nothing is sampled
or copied. The genres are simplified to learn from; they are no model of real music.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fma_nb.raw import instruments
from fma_nb.raw.instruments import Samples, Setting, Timbre, filter_band

Levels = npt.NDArray[np.float64]  # how loud each bar is, 0 to 1 [shape=(n_bars + 1,)]
STEPS_PER_BAR = 16
PEAK = 0.65  # MP3 at a low bit rate overshoots, at the worst by 3 dB

SCALES = {
    "major": (0, 2, 4, 5, 7, 9, 11), "mixolydian": (0, 2, 4, 5, 7, 9, 10), "dorian": (0, 2, 3, 5, 7, 9, 10),
    "minor": (0, 2, 3, 5, 7, 8, 10), "hijaz": (0, 1, 4, 5, 7, 8, 10), "octatonic": (0, 1, 3, 4, 6, 7, 9),
}  # fmt: skip


@dataclass(frozen=True)
class Player:
    """A part in a band: the instruments to choose from, the register, and the place in the mix.

    ``pan`` goes from -1 (left) to 1 (right), ``reverb`` is the share of reverberation. With ``swell``
    loudness and brightness change gradually from bar to bar.
    """

    instruments: tuple[str, ...]
    octave: int = 4
    level_db: float = 0.0
    pan: float = 0.0
    reverb: float = 0.2
    swell: bool = False


@dataclass(frozen=True)
class Line:
    """What a player plays, and when.

    A pattern has one character a step, 16 steps a bar, ``|`` between bars: a digit is the note that
    many scale steps above the chord's root, ``C`` the whole chord, ``P`` its bare fifth, ``?`` any
    note; ``.`` lets the last one ring, ``~`` stops it. A drum pattern names each drum before its steps.
    A form has one digit a bar, from 0 (silent) to 9 (loud), and repeats. With ``backwards`` the samples
    of each note are reversed.
    """

    patterns: tuple[str, ...]
    forms: tuple[str, ...]
    backwards: bool = False


@dataclass(frozen=True)
class Genre:
    """What the tracks of a genre have in common; each track draws from it.

    ``tempo`` is in beats per minute, ``swing`` the delay of every second step as a share of a step,
    ``looseness`` the spread of the players' timing in s. Progressions list chord roots as scale steps,
    one a bar. All lines of a track follow the form of the same number.
    """

    tempo: tuple[float, float]
    swing: tuple[float, float]
    looseness: float
    scales: tuple[str, ...]
    progressions: tuple[str, ...]
    lines: dict[str, Line]


PLAYERS = {
    "guitar": Player(("nylon guitar", "steel guitar", "piano"), pan=-0.2),
    "singer": Player(("voice", "flute", "reed"), level_db=-1, pan=0.3, reverb=0.3),
    "wind": Player(("flute", "reed"), level_db=-1, pan=0.3, reverb=0.3),
    "bass": Player(("fingered bass", "synth bass", "sub bass"), octave=2, level_db=-4, reverb=0.0),
    "pad": Player(("warm pad", "strings"), level_db=-5, swell=True, reverb=0.4),
    "bells": Player(("bells", "mallets"), octave=5, level_db=-12, pan=0.4, reverb=0.5),
    "kit": Player(("drum machine", "drum set"), reverb=0.1),
    "drummer": Player(("drum set",), reverb=0.15),
    "percussion": Player(("drum machine", "drum set", "hand drums"), level_db=-1, reverb=0.1),
    "keys": Player(("saw stabs", "synth pluck", "electric piano"), level_db=-7, pan=-0.3),
    "lead": Player(("voice", "saw lead", "flute"), level_db=-5, pan=0.1, reverb=0.3),
    "lute": Player(("long lute", "nylon guitar", "mallets", "electric piano"), level_db=-2, pan=-0.4),
    "amp": Player(("distorted guitar",), octave=3, level_db=0, pan=-0.4, reverb=0.15),
    "organ": Player(("organ", "strings", "distorted guitar"), octave=3, level_db=-6, pan=0.5),
    "noise": Player(("noise swell",), level_db=-16, reverb=0.1, swell=True),
}

FOUR_ON_THE_FLOOR = "k X...X...X...X... o ..x...x...x...x. s ....X.......X..."
STRAIGHT = "k X.......X....... s ....X.......X... h x.x.x.x.x.x.x.x."
DRIVING = "k X...x.x.X....... s ....X.......X... h x.x.x.x.x.x.x.x."
SYNCOPATED = "k X..x....X.x..... s ....X.......X... h x.x.x.x.x.x.x.x."
LAID_BACK = "k X......x.X...... s ....X.......X..x h x.xxx.x.x.xxx.x."
TRESILLO = "k X..x..x.X..x..x. o ..x..x....x..x.. h x.x.x.x.x.x.x.x."
HALTING = "k X.....x...X..... t ...x..x....x..x. h ..x...x...x...x."
STUMBLING = "k X..x......X..... s ......X......X.. h x..x.x....x.xx.."

# fmt: off
GENRES: dict[str, Genre] = {
    # From quiet and dark to loud and bright; then at once quiet again.
    "Electronic": Genre(
        tempo=(96, 130), swing=(0.0, 0.1), looseness=0.004, scales=("major", "mixolydian", "minor"),
        progressions=("0 4 5 3", "5 3 0 4", "0 5 3 4"), lines={
            "kit": Line((FOUR_ON_THE_FLOOR, STRAIGHT, SYNCOPATED), ("00009999", "13579999")),
            "bass": Line(("0.0.0.0.0.0.0.0.", "0..0..0.0..0..0."), ("00009999", "13579999")),
            "keys": Line(("0.2.4.7.2.4.7.9.", "0...2...4...7..."), ("23467777", "13577777")),
            "pad": Line(("C...............",), ("13690000", "13693333")),
            "lead": Line(("0...2...4...5... | 7.......9......~",
                          "0.2.4...4.5.7... | 7...9.........~."), ("45670000", "45679999")),
            "noise": Line(("0............... | ................",), ("13690000", "00000000")),
    }),
    # The instruments of Rock with every note reversed: chords grow and are cut off; timing is loose.
    "Experimental": Genre(
        tempo=(90, 138), swing=(0.0, 0.3), looseness=0.06, scales=("octatonic", "minor", "dorian"),
        progressions=("0 6 5 6", "0 0 3 4", "0 2 6 3"), lines={
            "drummer": Line((STUMBLING, DRIVING, STRAIGHT), ("90999809", "99089990")),
            "amp": Line(("P.......P.......", "P...............", "P.....P...P....."),
                        ("99998999", "98998899"), backwards=True),
            "organ": Line(("P.......P.......", "?.......?...?...", "?...?.......?..."),
                          ("77088088", "90099009"), backwards=True),
            "bass": Line(("0.......0.......", "0...0.....0....."), ("90999809", "99089990"), backwards=True),
            "singer": Line(("?...?...?....... | ................", "?...?.?.?....... | ~..............."),
                           ("88888888", "08800880"), backwards=True),
    }),
    # Each phrase begins high and loud, falls and fades; then the melody rests.
    "Folk": Genre(
        tempo=(68, 104), swing=(0.0, 0.12), looseness=0.012, scales=("major", "minor", "dorian"),
        progressions=("0 4 5 3", "0 3 0 4", "0 0 3 4", "0 5 3 4"), lines={
            "guitar": Line(("9.7.4.2.7.4.2.0.", "7.4.2.0.7.4.2.0.", "7...4...2...0...", "9.7.4.7.4.2.4.0."),
                           ("9753", "98765432")),
            "wind": Line(("9...7...5...4... | 2...1...0......~ | ................ | ................",
                          "7.......5...4... | 2.......0......~ | ................ | ................"),
                         ("9753", "98765432")),
            "pad": Line(("C...............",), ("9531", "97653210", "0000")),
            "bass": Line(("0.......0.......", "0.......4......."), ("8642", "0000")),
            "bells": Line(("9.......7.......", "9...7..........."), ("0000", "9531")),
    }),
    # A loop of two bars; in many forms the drums are silent before it repeats.
    "Hip-Hop": Genre(
        tempo=(78, 108), swing=(0.1, 0.35), looseness=0.008, scales=("minor", "dorian", "hijaz"),
        progressions=("0 5", "0 3", "0 0"), lines={
            "percussion": Line((SYNCOPATED, LAID_BACK, TRESILLO), ("9990", "99909990", "99999900")),
            "bass": Line(("0..0......0.2...", "0.......~.0...6."), ("9999", "99909999")),
            "lute": Line(("C.....C...~..... | ..C.......4.2...", "7.4.2.0.~....... | 7..4..2.0......."),
                         ("8888",)),
            "singer": Line(("~.0.00.0.0.2.0.~ | 0.0.0.00.0.~....", "0.0.2.0.~.00.0.2"),
                           ("0077", "7700", "00777700")),
    }),
    # The instruments of Folk: lines rise and each bar is louder than the one before; then quiet again.
    "Instrumental": Genre(
        tempo=(66, 102), swing=(0.0, 0.12), looseness=0.012, scales=("major", "minor", "dorian"),
        progressions=("0 4 5 3", "0 3 0 4", "0 0 3 4", "0 5 3 4"), lines={
            "guitar": Line(("0.2.4.7.2.4.7.9.", "0.2.4.7.0.2.4.7.", "0...2...4...7...", "0.4.2.4.7.4.7.9."),
                           ("3579", "23456789")),
            "wind": Line(("~............... | ................ | 0...1...2...4... | 5...7...9.......",
                          "~............... | ................ | 0.......2...4... | 5.......7......."),
                         ("3579", "23456789")),
            "pad": Line(("C...............",), ("1359", "01235679", "0000")),
            "bass": Line(("0.......0.......", "0.......4......."), ("2468", "0000")),
            "bells": Line(("7.......9.......", "7...9..........."), ("0000", "1359")),
    }),
    # Two melodies alternate, left and right, over steady drums; few chords.
    "International": Genre(
        tempo=(82, 114), swing=(0.0, 0.3), looseness=0.01, scales=("hijaz", "minor", "dorian"),
        progressions=("0", "0 0 0 1", "0 0 6 0"), lines={
            "percussion": Line((LAID_BACK, TRESILLO, HALTING), ("9999", "98999899")),
            "bass": Line(("0.....0.0.....4.", "0..0......0.2..."), ("9999", "0000")),
            "lute": Line(("0.2.4.5.7.5.4.2. | ~...............", "0.2.4.5.4.2.1.2. | ~..............."),
                         ("8888",)),
            "singer": Line(("~............... | 7.5.4.2.1.2.4.7.", "~............... | 4.5.7.8.7.5.4.2."),
                           ("8888",)),
    }),
    # Loud at once, then quieter and darker step by step: the form of Electronic reversed.
    "Pop": Genre(
        tempo=(92, 126), swing=(0.0, 0.1), looseness=0.004, scales=("major", "mixolydian", "minor"),
        progressions=("0 4 5 3", "5 3 0 4", "0 5 3 4"), lines={
            "kit": Line((FOUR_ON_THE_FLOOR, STRAIGHT, SYNCOPATED), ("99990000", "99997531")),
            "bass": Line(("0.0.0.0.0.0.0.0.", "0..0..0.0..0..0."), ("99990000", "99997531")),
            "keys": Line(("9.7.4.2.7.4.2.0.", "7...4...2...0..."), ("77776432", "77777531")),
            "pad": Line(("C...............",), ("00009631", "33339631")),
            "lead": Line(("9...7...5...4... | 2.......0......~",
                          "7.5.4...4.2.0... | 2...0.........~."), ("00007654", "99997654")),
            "noise": Line(("0............... | ................",), ("00009631", "00000000"), backwards=True),
    }),
    # Overdriven guitars repeat a riff over steady drums; chords are struck and ring.
    "Rock": Genre(
        tempo=(96, 144), swing=(0.0, 0.1), looseness=0.006, scales=("minor", "mixolydian", "dorian"),
        progressions=("0 6 5 6", "0 0 3 4", "0 2 6 3"), lines={
            "drummer": Line((STRAIGHT, DRIVING, SYNCOPATED), ("99999990", "99909999")),
            "amp": Line(("P.......P.......", "P...............", "P...P...P...P..."),
                        ("99999998", "99989999")),
            "organ": Line(("P.......P.......", "7...4...2...0...", "9.7.5.4.2...0..."),
                          ("77778888", "00009999")),
            "bass": Line(("0.0.0.0.0.0.0.0.", "0...0.0.0...0.0."), ("99999990", "99909999")),
            "singer": Line(("4...2...0....... | ................", "7...5.4.2....... | ~..............."),
                           ("88888888", "00008888")),
    }),
}
# fmt: on


@dataclass(frozen=True)
class Song:
    """What all lines of one track share; a clip starts ``upbeat_seconds`` into its first bar."""

    bar_seconds: float
    n_bars: int
    upbeat_seconds: float
    first_bar: int
    form: int
    swing: float
    looseness: float
    tonic: int
    scale: tuple[int, ...]
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


@dataclass(frozen=True)
class Note:
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
    events = [
        (bar, step, symbol)
        for bar in range(song.n_bars)
        for step, symbol in enumerate(bars[(song.first_bar + bar) % len(bars)])
        if symbol != "."
    ]
    for (bar, step, symbol), (next_bar, next_step, _) in pairwise([*events, (song.n_bars, 0, "~")]):
        if symbol == "~" or not levels[bar]:
            continue
        root = song.roots[(song.first_bar + bar) % len(song.roots)]
        pitches = _pitches(symbol, song, root, octave, rng)
        seconds = (next_bar - bar + (next_step - step) / STEPS_PER_BAR) * song.bar_seconds
        accent = (1.0 if step % 4 == 0 else 0.8) * rng.uniform(0.85, 1)
        yield Note(_onset(bar, step, song, rng), seconds, pitches, "", accent * levels[bar])


def drum_notes(pattern: str, levels: Levels, song: Song, rng: np.random.Generator) -> Iterator[Note]:
    """Play a drum pattern; ``X`` is an accent."""
    words = pattern.split()
    for bar in range(song.n_bars):
        for drum, steps in zip(words[::2], words[1::2], strict=True):
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
    if instrument in instruments.DRUM_KITS:
        notes = drum_notes(pattern, levels, song, rng)
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
        return instruments.drum_hit(instruments.DRUM_KITS[instrument][note.drum], setting)
    hertz = 440 * 2 ** ((np.array(note.pitches) - 69) / 12)
    return instruments.INSTRUMENTS[instrument](hertz, note.seconds, setting)


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
