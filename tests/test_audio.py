"""Stage 2: decoding against numpy and librosa, and a plain reason for every clip that cannot be used."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile as sf
from conftest import FORMATS, music, write_mp3
from PIL import Image

from fma_nb.audio import ClipInfo, UnreadableClipError, load_clip, load_windows, probe, to_mono


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
        (write_folder, "a folder"),
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


# ----- files whose header says nothing, too little or too much -----

FRAME = 1152 / 44_100  # s
RATE = 44_100


def encoded(
    seconds: float,
    rate: int = RATE,
    n_channels: int = 2,
    kind: str = "MP3",
    samples: np.ndarray | None = None,
) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, music(1, rate, n_channels, seconds) if samples is None else samples, rate, format=kind)
    return buffer.getvalue()


def without_header(mp3: bytes) -> bytes:
    """Drop the first frame, which holds no music but the promise of the length."""
    assert mp3[36:40] in (b"Xing", b"Info")
    return mp3[mp3.index(mp3[:2], 40) :]


def loud_beginning(seconds: int) -> bytes:
    """A variable-rate MP3 whose first frames are larger than the rest."""
    rng = np.random.default_rng(0)
    tone = 0.1 * np.sin(2 * np.pi * 220 * np.arange((seconds - 2) * RATE) / RATE)
    buffer = io.BytesIO()
    samples = np.concatenate([rng.normal(0, 0.3, 2 * RATE), tone])
    sf.write(buffer, samples, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.4)
    mp3 = buffer.getvalue()
    return mp3[mp3.index(b"\xff\xfb", 40) :]


def with_hole(data: bytes, n_bytes: int, filling: bytes = b"\0") -> bytes:
    middle = len(data) // 2
    return data[:middle] + filling * n_bytes + data[middle + n_bytes :]


def with_unknown_length(flac: bytes) -> bytes:
    """Set the 36 bits of STREAMINFO that hold the number of samples to 0."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def length(path: Path, data: bytes, seconds: float = 1000) -> float:
    path.write_bytes(data)
    samples, rate = load_clip(path, seconds=seconds)
    return len(samples) / rate


@pytest.mark.parametrize("seconds", [12, 60])
def test_a_guessed_length_cuts_nothing(tmp_path: Path, seconds: int) -> None:
    path = tmp_path / "a.mp3"
    found = length(path, loud_beginning(seconds))
    assert found == pytest.approx(seconds, abs=3 * FRAME)  # an encoder adds some of silence
    assert probe(path).seconds == pytest.approx(found, abs=1e-6)
    assert len(list(load_windows(path, seconds=6))) == seconds // 6


def test_the_rest_after_an_offset_is_the_same_without_a_promise(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(without_header(encoded(20)))
    whole, _ = load_clip(path)
    rest, _ = load_clip(path, offset=7)
    np.testing.assert_array_equal(rest, whole[7 * RATE :])


@pytest.mark.parametrize("strip", [bytes, without_header])
def test_joined_mp3s_are_decoded_to_the_last(tmp_path: Path, strip: Callable[[bytes], bytes]) -> None:
    parts = [strip(encoded(seconds)) for seconds in (6, 7, 8)]
    assert length(tmp_path / "a.mp3", b"".join(parts)) == pytest.approx(21, abs=3 * 3 * FRAME)


@pytest.mark.parametrize(("rate", "n_channels"), [(48_000, 2), (44_100, 1)])
def test_a_change_inside_a_file_is_refused_and_not_dropped(
    tmp_path: Path, rate: int, n_channels: int
) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(encoded(6) + encoded(7, rate, n_channels))
    with pytest.raises(UnreadableClipError, match=r"sample rate or channels change after 6\.\d s: .*ffmpeg"):
        load_clip(path)
    with pytest.raises(UnreadableClipError, match="change after"):
        list(load_windows(path))
    assert len(load_clip(path, seconds=5)[0]) == 5 * RATE


@pytest.mark.parametrize("filling", [b"\0", b"\xa5"])
@pytest.mark.parametrize("strip", [bytes, without_header])
def test_a_hole_costs_what_it_covers(tmp_path: Path, strip: Callable[[bytes], bytes], filling: bytes) -> None:
    mp3 = strip(encoded(20))
    hole = round(1.25 * len(mp3) / 20)
    path = tmp_path / "a.mp3"
    assert length(path, with_hole(mp3, hole, filling)) == pytest.approx(18.75, abs=0.2)
    assert len(list(load_windows(path, seconds=5))) == 3
    with pytest.raises(UnreadableClipError, match=r"too short"):
        load_clip(path, min_seconds=19)


@pytest.mark.parametrize(("kind", "promises"), [("MP3", True), ("FLAC", True), ("WAV", True), ("OGG", False)])
def test_one_rule_for_files_that_end_early(tmp_path: Path, kind: str, promises: bool) -> None:
    """Four fifths are used, three fifths of a promised length are refused; windows take both."""
    data, path = encoded(20, kind=kind), tmp_path / "a"
    assert length(path, data[: len(data) * 4 // 5]) == pytest.approx(16, abs=0.8)
    path.write_bytes(data[: len(data) * 3 // 5])
    if promises:
        assert probe(path).seconds == pytest.approx(20, abs=FRAME)
        with pytest.raises(UnreadableClipError, match=r"cut off \(1\d\.\d s of 20\.0 s\)"):
            load_clip(path)
    assert len(load_clip(path, min_seconds=0)[0]) == pytest.approx(12 * RATE, abs=0.8 * RATE)
    assert len(list(load_windows(path, seconds=5))) == 2


def test_flac_of_unknown_length(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    samples = music(0, RATE, 2, 12)
    assert length(path, with_unknown_length(encoded(12, kind="FLAC", samples=samples))) == 12
    assert probe(path) == ClipInfo(RATE, 2, 12.0)
    np.testing.assert_allclose(load_clip(path)[0], samples.mean(axis=1), atol=1e-4)


def test_padding_before_the_first_frame_is_skipped(tmp_path: Path) -> None:
    tag = b"ID3\x03\0\0\0\0\0\x0a" + bytes(10)
    mp3, path = encoded(8), tmp_path / "a.mp3"
    for junk in (tag + bytes(100_000), bytes(100_000), tag + tag, b"\xff\xfb\x90 broken"):
        assert length(path, junk + mp3) == pytest.approx(8, abs=FRAME)


def test_a_sidecar_of_macos_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "._a.mp3").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(4072))
    assert length(tmp_path / "a.mp3", encoded(8)) == pytest.approx(8, abs=FRAME)


def test_threads_leave_the_standard_error_alone(stereo_mp3: Path) -> None:
    before = os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        windows = list(pool.map(lambda _: len(list(load_windows(stereo_mp3))), range(40)))
    assert windows == [1] * 40
    assert os.path.samestat(os.fstat(2), before)
    handles = [load_windows(stereo_mp3, seconds=1) for _ in range(2)]
    for handle in handles:
        next(handle)
    assert os.path.samestat(os.fstat(2), before)
    for handle in handles:  # closed in the order in which they were opened, as threads may
        handle.close()
    assert os.path.samestat(os.fstat(2), before)


# ----- sound that is there, but of no use -----


@pytest.mark.parametrize("kind", ["WAV", "MP3"])
def test_opposite_channels_are_named(tmp_path: Path, kind: str) -> None:
    left = music(0, RATE, 1, 8)
    (tmp_path / "a").write_bytes(encoded(8, kind=kind, samples=np.hstack([left, -left])))
    for read in (load_clip, lambda path: list(load_windows(path))):
        with pytest.raises(UnreadableClipError, match=r"left and right cancel each other: .*ffmpeg"):
            read(tmp_path / "a")


def test_soft_music_is_music(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", 1e-5 * music(0, RATE, 2, 8), RATE, subtype="FLOAT")
    assert load_clip(tmp_path / "a.wav")[0].any()


def test_samples_that_are_no_numbers_are_placed(tmp_path: Path) -> None:
    path, samples = tmp_path / "a.wav", music(0, 8000, 2, 70)
    samples[31 * 8000, 1] = np.nan
    sf.write(path, samples, 8000, subtype="FLOAT")
    assert len(load_clip(path)[0]) == 30 * 8000
    assert len(list(load_windows(path))) == 2
    samples[:, 1] = np.nan
    sf.write(path, samples, 8000, subtype="FLOAT")
    for read in (load_clip, lambda path: list(load_windows(path))):
        with pytest.raises(UnreadableClipError, match=r"not finite: channel 2 holds no number at 0\.0 s"):
            read(path)


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"\0\0\0\x20ftypM4A ", "M4A or MP4"),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
        (b"\x1a\x45\xdf\xa3", "WebM"),
        (b"\xff\xf1\x50\x80", "AAC"),
    ],
)
def test_what_is_not_read_says_how_to_convert_it(tmp_path: Path, begin: bytes, kind: str) -> None:
    (tmp_path / "a.mp3").write_bytes(begin + np.random.default_rng(0).bytes(20_000))
    with pytest.raises(UnreadableClipError, match=f"{kind} is not read: convert it.*ffmpeg"):
        load_clip(tmp_path / "a.mp3")
