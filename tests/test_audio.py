"""Stage 2: decoding against numpy and librosa, and a plain reason for every clip that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile as sf
from conftest import FORMATS, music, write_mp3
from PIL import Image

from fma_nb.audio import ClipInfo, UnreadableClipError, load_clip, probe, to_mono


@pytest.fixture(scope="module")
def stereo_mp3(clips: dict[tuple[int, int], Path]) -> Path:
    return clips[44_100, 2]


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A 31-s WAV whose samples are known exactly."""
    samples = np.random.default_rng(0).uniform(-1, 1, (31 * 8000, 2)).astype(np.float32)
    path = tmp_path_factory.mktemp("wav") / "long.wav"
    sf.write(path, samples, 8000, subtype="FLOAT")
    return path, samples


@pytest.mark.parametrize("file_format", FORMATS)
def test_probe_reads_the_header(clips: dict[tuple[int, int], Path], file_format: tuple[int, int]) -> None:
    info = probe(clips[file_format])
    assert info == ClipInfo(*file_format, info.seconds)
    assert info.seconds == pytest.approx(5.5, abs=0.1)


def test_channels_are_averaged(stereo_mp3: Path) -> None:
    stereo, rate = sf.read(stereo_mp3, dtype="float32")
    samples, sample_rate = load_clip(stereo_mp3)

    assert (samples.dtype, sample_rate) == (np.float32, rate)
    assert np.abs(stereo[:, 0] - stereo[:, 1]).max() > 0.05
    np.testing.assert_allclose(samples, stereo.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_mono_of_any_number_of_channels(n_channels: int) -> None:
    channels = np.random.default_rng(0).standard_normal((1000, n_channels)).astype(np.float32)
    np.testing.assert_allclose(to_mono(channels), channels.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("sample_rate", [None, 22_050])
@pytest.mark.parametrize("file_format", FORMATS)
def test_resampling_is_librosas(
    clips: dict[tuple[int, int], Path], file_format: tuple[int, int], sample_rate: int | None
) -> None:
    expected, expected_rate = librosa.load(clips[file_format], sr=sample_rate, mono=True, duration=30)
    samples, rate = load_clip(clips[file_format], sample_rate)

    assert rate == expected_rate == (sample_rate or file_format[0])
    assert abs(len(samples) - len(expected)) <= 1
    n_samples = min(len(samples), len(expected))
    np.testing.assert_allclose(samples[:n_samples], expected[:n_samples], atol=1e-5)


def test_thirty_seconds_are_read_and_no_more(wav: tuple[Path, np.ndarray]) -> None:
    path, channels = wav
    samples, rate = load_clip(path)
    assert len(samples) == 30 * rate
    np.testing.assert_allclose(samples, channels[: 30 * rate].mean(axis=1), atol=1e-6)


def test_an_excerpt_begins_at_its_offset(wav: tuple[Path, np.ndarray]) -> None:
    path, channels = wav
    samples, rate = load_clip(path, offset=12.5, seconds=6)
    np.testing.assert_allclose(samples, channels[100_000:148_000].mean(axis=1), atol=1e-6)

    rest, _ = load_clip(path, offset=25)
    assert len(rest) == 6 * rate
    with pytest.raises(UnreadableClipError, match=r"too short \(1.0 s\)"):
        load_clip(path, offset=30)
    with pytest.raises(UnreadableClipError):
        load_clip(path, offset=40)


def test_the_shortest_usable_excerpt_can_be_chosen(stereo_mp3: Path) -> None:
    with pytest.raises(UnreadableClipError, match=r"too short \(5.5 s\)"):
        load_clip(stereo_mp3, min_seconds=6)
    assert len(load_clip(stereo_mp3, seconds=1, min_seconds=1)[0]) == 44_100


def test_a_wav_with_the_wrong_name_is_still_audio(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp3"
    channels = music(0, 22_050, 2)
    sf.write(path, channels, 22_050, format="WAV", subtype="FLOAT")
    samples, rate = load_clip(path)
    assert rate == 22_050
    np.testing.assert_allclose(samples, channels.mean(axis=1), atol=1e-6)


def test_a_cut_mp3_is_refused_but_gives_what_is_left_of_it_when_asked(
    tmp_path: Path, stereo_mp3: Path
) -> None:
    whole = stereo_mp3.read_bytes()
    path = tmp_path / "cut.mp3"
    path.write_bytes(whole[: int(len(whole) * 0.6)])
    expected, _ = load_clip(stereo_mp3)
    with pytest.raises(UnreadableClipError, match=r"cut off \(\d\.\d s of \d\.\d s\)"):
        load_clip(path, min_seconds=1.0)
    samples, _ = load_clip(path, min_seconds=0)
    assert 3 * 44_100 <= len(samples) < len(expected)
    np.testing.assert_allclose(samples[: 3 * 44_100], expected[: 3 * 44_100], atol=1e-4)


def write_text(path: Path, _: Path) -> None:
    path.write_text("this is not music\n" * 500)


def write_png(path: Path, _: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    Image.fromarray(image).save(path, format="PNG")


def write_half(path: Path, whole: Path) -> None:
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


def write_first_bytes(path: Path, whole: Path) -> None:
    path.write_bytes(whole.read_bytes()[:700])


def write_silence(path: Path, _: Path) -> None:
    write_mp3(path, np.zeros((44_100 * 6, 2), np.float32), 44_100)


def write_not_finite(path: Path, _: Path) -> None:
    samples = music(0, 22_050, 1)
    samples[1000] = np.nan
    sf.write(path, samples, 22_050, format="WAV", subtype="FLOAT")


def write_nothing(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def write_folder(path: Path, _: Path) -> None:
    path.mkdir()


def leave_out(path: Path, _: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "not audio"),
        (write_png, "not audio"),
        (write_first_bytes, "not audio"),
        (write_half, r"too short \(2\.\d s\)"),
        (write_silence, "digital silence"),
        (write_not_finite, "not finite"),
        (write_nothing, "file empty"),
        (write_folder, "file missing"),
        (leave_out, "file missing"),
    ],
)
def test_an_unusable_clip_has_a_reason(
    tmp_path: Path, stereo_mp3: Path, write: Callable[[Path, Path], None], reason: str
) -> None:
    path = tmp_path / "clip.mp3"
    write(path, stereo_mp3)
    with pytest.raises(UnreadableClipError, match=reason) as caught:
        load_clip(path, 22_050)
    assert "\n" not in str(caught.value)
    if path.exists() and reason == "not audio":
        assert "not exist" not in str(caught.value)  # libsndfile's own words for an unknown format


def test_probe_refuses_what_is_no_audio(tmp_path: Path) -> None:
    write_text(tmp_path / "clip.mp3", tmp_path)
    for name, reason in [("clip.mp3", "not audio"), ("none.mp3", "file missing")]:
        with pytest.raises(UnreadableClipError, match=reason):
            probe(tmp_path / name)
