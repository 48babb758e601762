"""Synthetic instruments, drums and a room: how one note of `fma_mini` sounds.

Three classic methods make all the instruments of ``instruments.toml``: plucked strings, steady waves with
few or many harmonics, and frequency modulation.

References
----------
K. Karplus, A. Strong: "Digital Synthesis of Plucked-String and Drum Timbres", CMJ 1983.
J. Chowning: "The Synthesis of Complex Audio Spectra by Means of Frequency Modulation", JAES 1973.
"""

import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import fft, signal

Samples = npt.NDArray[np.float32]
Hertz = npt.NDArray[np.float64]
WAVETABLE_SIZE = 2048


class Timbre(NamedTuple):
    """What an artist sounds like; the first four are factors on every instrument's own values."""

    brightness: float  # of cutoffs
    ring: float  # of decay times
    vibrato: float  # of its depth
    drum_tuning: float  # of the drums' pitch
    detune: float  # of an ensemble's voices, in cents
    room_seconds: float  # reverberation time (to -60 dB)
    highest_hz: float  # treble limit of the recording
    noise_db: float  # its background noise


def draw_timbre(rng: np.random.Generator) -> Timbre:
    """Draw what an artist sounds like."""
    return Timbre(
        brightness=2 ** rng.uniform(-0.5, 0.5), ring=2 ** rng.uniform(-0.5, 0.5),
        vibrato=rng.uniform(0.3, 1.6), drum_tuning=2 ** rng.uniform(-0.25, 0.25),
        detune=rng.uniform(4, 16), room_seconds=rng.uniform(0.5, 2.2),
        highest_hz=rng.uniform(9000, 17000), noise_db=rng.uniform(-80, -64),
    )  # fmt: skip


class Setting(NamedTuple):
    """What all notes of a line share: sample rate in Hz, the artist's timbre, the source of noise."""

    sample_rate: int
    timbre: Timbre
    rng: np.random.Generator


Instrument = Callable[[Hertz, float, Setting], Samples]  # pitches in Hz, length in s
Drum = Callable[[Setting], Samples]


def plucked_string(
    hertz: Hertz, seconds: float, setting: Setting, *,
    ring: float, damping: float, softness: float, drive: float = 0.0,
) -> Samples:  # fmt: skip
    """Pluck or strike strings (Karplus and Strong), solved in the frequency domain.

    Each trip round the string averages neighbouring samples, which multiplies harmonic k of the N
    samples of a period by ``cos(pi k / N)``: so all periods are found at once, without a loop.
    ``ring`` is the decay time (to -60 dB) in s, ``damping`` how much faster the treble decays,
    ``softness`` the slope of the pluck's spectrum, ``drive`` an overdriven amplifier.
    """
    sample_rate, timbre = setting.sample_rate, setting.timbre
    mix = np.zeros(int(seconds * sample_rate))
    for frequency in hertz:
        period = fft.next_fast_len(int(sample_rate / frequency), real=True)
        harmonic = np.arange(period // 2 + 1)
        phases = np.exp(2j * np.pi * setting.rng.random(harmonic.size))
        pluck = (harmonic + 1) ** (-softness / timbre.brightness) * phases
        pluck[0] = 0
        log_gain = damping * np.log(np.maximum(np.cos(np.pi * harmonic / period), 1e-6))
        log_gain -= 6.9 / (ring * timbre.ring * frequency)
        trips = np.arange(int(seconds * frequency) + 2, dtype=np.float32)[:, None]
        decay = np.exp(trips * log_gain.astype(np.float32))
        periods = fft.irfft(pluck.astype(np.complex64) * decay, period, axis=1).ravel()
        # The period is a whole number of samples; reading it at another speed gives the exact pitch.
        position = np.arange(mix.size) * (frequency * period / sample_rate)
        mix += np.interp(position, np.arange(periods.size), periods)
    sound = _fade(mix / np.abs(mix).max(), sample_rate, 0.001, 0.03)
    # Clipped softly, then dulled as by a guitar's loudspeaker.
    return 0.5 * filter_band(np.tanh((1 + drive) * sound), "lowpass", 4500, sample_rate) if drive else sound


def wave(
    hertz: Hertz, seconds: float, setting: Setting, *,
    tilt: float = 1.0, cutoff_hz: float = 3000.0, formants_hz: Sequence[float] = (), voices: int = 1,
    attack: float = 0.02, release: float = 0.08, decay: float | None = None,
    vibrato: float = 0.0, breath: float = 0.0,
) -> Samples:  # fmt: skip
    """Play periodic waves: harmonics of amplitude ``1 / k**tilt`` through a low-pass or formants.

    ``voices`` detuned copies make an ensemble, ``decay`` (s) a struck tone of a steady one, ``vibrato``
    is in semitones, ``breath`` is the share of noise.
    """
    sample_rate, timbre, rng = setting.sample_rate, setting.timbre, setting.rng
    time = np.arange(int(seconds * sample_rate)) / sample_rate
    wobble = vibrato * timbre.vibrato * np.sin(2 * np.pi * 5.2 * time) * np.minimum(3 * time, 1)
    periods = np.cumsum(2 ** (wobble / 12)) / sample_rate if vibrato else time
    mix = breath * rng.standard_normal(time.size, np.float32)
    for frequency in hertz:
        table = _wavetable(frequency, sample_rate, tilt, cutoff_hz * timbre.brightness, formants_hz)
        for voice in range(voices):
            cents = timbre.detune * (voice - (voices - 1) / 2)
            phase = rng.random() + periods * (frequency * 2 ** (cents / 1200))
            mix += table[(phase * WAVETABLE_SIZE).astype(np.int32) % WAVETABLE_SIZE]
    mix *= np.float32(1 / (hertz.size * voices))
    if decay:
        mix *= np.exp(-time / (decay * timbre.ring), dtype=np.float32)
    return _fade(mix, sample_rate, attack, release)


def _wavetable(
    frequency: float, sample_rate: int, tilt: float, cutoff_hz: float, formants_hz: Sequence[float]
) -> Samples:
    """Return one period of a wave without aliases [shape=(WAVETABLE_SIZE,)]; all have the same RMS."""
    n_harmonics = min(int(0.45 * sample_rate / frequency), WAVETABLE_SIZE // 2 - 1)
    harmonic = np.arange(1, n_harmonics + 1)
    hertz = harmonic * frequency
    if formants_hz:
        colour = 0.08 + sum(np.exp(-0.5 * ((hertz - f) / (0.15 * f + 60)) ** 2) for f in formants_hz)
    else:
        colour = 1 / (1 + (hertz / cutoff_hz) ** 4)
    spectrum = np.zeros(WAVETABLE_SIZE // 2 + 1, np.complex64)
    spectrum[1 : n_harmonics + 1] = -1j * harmonic ** -float(tilt) * colour
    table = fft.irfft(spectrum)
    return (0.3 * table / np.sqrt(np.mean(table**2))).astype(np.float32)


def fm_tone(
    hertz: Hertz, seconds: float, setting: Setting, *, ratio: float, index: float, decay: float
) -> Samples:
    """Play bells, electric pianos and mallets (Chowning): a sine modulates the phase of a sine.

    ``ratio`` is modulator to carrier frequency, ``index`` the depth in rad, ``decay`` a time in s.
    """
    sample_rate, timbre, rng = setting.sample_rate, setting.timbre, setting.rng
    time = np.arange(int(seconds * sample_rate), dtype=np.float32) / sample_rate
    depth = index * timbre.brightness * np.exp(-time / (0.4 * decay))
    mix = np.zeros_like(time)
    for frequency in hertz:
        angle = np.float32(2 * np.pi * frequency) * time
        mix += np.sin(angle + depth * np.sin(ratio * angle + 0.1 * rng.random(dtype=np.float32)))
    mix *= np.exp(-time / (decay * timbre.ring)) / np.float32(hertz.size)
    return _fade(mix, sample_rate, 0.002, 0.03)


def noise_swell(hertz: Hertz, seconds: float, setting: Setting) -> Samples:
    """Make noise above a pitch that grows louder to the end of the note."""
    noise = setting.rng.standard_normal(int(seconds * setting.sample_rate), np.float32)
    band = filter_band(noise, "highpass", 3 * setting.timbre.brightness * hertz[0], setting.sample_rate)
    swell = np.linspace(0, 0.7, noise.size, dtype=np.float32) ** 2
    return _fade(band * swell, setting.sample_rate, 0.01, 0.02)


def drum_hit(
    setting: Setting, *,
    hertz: float, fall: float, decay: float, noise: float, noise_hz: float, noise_decay: float,
) -> Samples:  # fmt: skip
    """Strike a drum once: a sine that falls to its pitch, and noise above ``noise_hz``."""
    sample_rate, timbre = setting.sample_rate, setting.timbre
    time = np.arange(int(5 * max(decay, noise_decay) * sample_rate)) / sample_rate
    hiss = setting.rng.standard_normal(time.size, np.float32)
    hiss = filter_band(hiss, "highpass", noise_hz * min(timbre.brightness, 1.2), sample_rate)
    hit = noise * hiss * np.exp(-time / noise_decay)
    if hertz:
        pitch = hertz * timbre.drum_tuning * (1 + (fall - 1) * np.exp(-time / 0.02))
        hit += np.sin(2 * np.pi * np.cumsum(pitch) / sample_rate) * np.exp(-time / decay)
    return _fade(hit, sample_rate, 0.0005, 0.01)


def filter_band(samples: Samples, kind: str, hertz: float, sample_rate: int) -> Samples:
    """Apply a gentle ``lowpass`` or ``highpass`` (12 dB an octave) along the last axis."""
    cutoff = min(hertz, 0.45 * sample_rate)
    sections = signal.butter(2, cutoff, kind, fs=sample_rate, output="sos").astype(np.float32)
    return signal.sosfilt(sections, samples)


def _fade(samples: npt.NDArray[np.floating], sample_rate: int, attack: float, release: float) -> Samples:
    """Fade a note in and out, in s, so that it does not click."""
    faded = samples.astype(np.float32)
    n_in, n_out = (min(int(ramp * sample_rate), samples.size // 2) + 1 for ramp in (attack, release))
    faded[:n_in] *= np.linspace(0, 1, n_in, dtype=np.float32)
    faded[-n_out:] *= np.linspace(1, 0, n_out, dtype=np.float32)
    return faded


def reverb(samples: Samples, seconds: float, sample_rate: int, rng: np.random.Generator) -> Samples:
    """Convolve with decaying noise, a different one for each ear: a room [shape=(2, n_samples)]."""
    time = np.arange(int(seconds * sample_rate), dtype=np.float32) / sample_rate
    room = rng.standard_normal((2, time.size), np.float32) * np.exp(-6.9 * time / seconds)
    room = filter_band(room / np.linalg.norm(room, axis=1, keepdims=True), "lowpass", 5000, sample_rate)
    return signal.oaconvolve(samples[None], room, axes=1)[:, : samples.size]


_SETTINGS = tomllib.loads(Path(__file__).with_name("instruments.toml").read_text(encoding="utf-8"))
_METHODS: tuple[Callable[..., Samples], ...] = (plucked_string, fm_tone, wave, noise_swell)
INSTRUMENTS: dict[str, Instrument] = {
    name: partial(method, **setting)
    for method in _METHODS
    for name, setting in _SETTINGS[method.__name__].items()
}
DRUM_KITS: dict[str, dict[str, Drum]] = {
    kit: {letter: partial(drum_hit, **setting) for letter, setting in drums.items()}
    for kit, drums in _SETTINGS["drum_kits"].items()
}
