"""Stage 3: our images against librosa's numbers, and bulk runs that survive everything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
import torchaudio
from conftest import (
    FORMATS,
    assert_one_sentence,
    mp3_path,
    music,
    tiny_rows,
    track_row,
    write_tracks_csv,
)
from PIL import Image

from fma_nb.bulk.spectrograms import make_spectrograms
from fma_nb.metadata import load_index
from fma_nb.project import FmaNbError, spectrogram_dir
from fma_nb.spectrogram import (
    PRESETS,
    Preset,
    clip_to_grey,
    get_preset,
    log_mel,
    make_spectrogram,
    mel_filter_bank,
    mel_power,
    read_png,
    to_decibels,
    to_grey,
)

REAL_RECORDINGS = (
    "brahms_hungarian_dance_5.ogg",
    "karissa_hobbs_lets_go_fishin.ogg",
    "kevin_macleod_danse_macabre_finale.mp3",
    "kevin_macleod_sugar_plum_fairy.ogg",
    "kevin_macleod_vibe_ace.ogg",
    "slow_motion_dream_excerpt.mp3",
    "square_a_saw_better.mp3",
)


def librosa_grey(path: Path, preset: str) -> np.ndarray:
    """The image as the data format defines it, computed by librosa alone."""
    sample_rate = {"full": 22_050, "compact": None}[preset]
    samples, rate = librosa.load(path, sr=sample_rate, mono=True, duration=30)
    power = librosa.feature.melspectrogram(y=samples, sr=rate, n_fft=2048, hop_length=512, n_mels=128)
    db = librosa.power_to_db(power, ref=np.max)
    if preset == "compact":
        db = db[:, [int((i + 0.5) * db.shape[1] / 128) for i in range(128)]]
    return np.round((db[::-1] + 80) / 80 * 255).astype(int)


def share_within_one_level(ours: np.ndarray, reference: np.ndarray) -> float:
    return float((np.abs(ours.astype(int) - reference) <= 1).mean())


def assert_same_image(ours: np.ndarray, reference: np.ndarray) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == reference.shape
    assert np.abs(ours.astype(int) - reference).max() <= 2
    assert share_within_one_level(ours, reference) >= 0.999


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_images_equal_librosas(
    clips: dict[tuple[int, int], Path], file_format: tuple[int, int], preset: str
) -> None:
    reference = librosa_grey(clips[file_format], preset)
    assert_same_image(clip_to_grey(clips[file_format], PRESETS[preset]), reference)
    assert reference.shape[1] == 128 or preset == "full"
    # The comparison is sharp enough to see a shift by one frame or one band.
    for axis in (0, 1):
        assert share_within_one_level(np.roll(reference, 1, axis), reference) < 0.5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", REAL_RECORDINGS)
def test_images_of_real_music_equal_librosas(real: Path, name: str, preset: str) -> None:
    path = real / "audio" / name
    assert_same_image(clip_to_grey(path, PRESETS[preset]), librosa_grey(path, preset))


def test_thirty_seconds_have_1292_frames(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", music(0, 22_050, 1, seconds=31), 22_050)
    full = clip_to_grey(tmp_path / "a.wav", get_preset("full"))
    compact = clip_to_grey(tmp_path / "a.wav", get_preset("compact"))
    assert full.shape == (128, 1292)
    assert compact.shape == (128, 128)
    np.testing.assert_array_equal(compact, full[:, [int((i + 0.5) * 1292 / 128) for i in range(128)]])


def test_the_highest_band_is_the_top_row() -> None:
    times = np.arange(6 * 22_050) / 22_050
    brightest = {}
    for frequency in (110, 1000, 9000):
        tone = np.sin(2 * np.pi * frequency * times).astype(np.float32)
        grey = to_grey(log_mel(tone, 22_050, PRESETS["full"]))
        brightest[frequency] = int(grey[:, 100].argmax())
    bands = librosa.mel_frequencies(130, fmin=0, fmax=11_025)[1:-1]
    for frequency, row in brightest.items():
        assert abs(127 - row - np.abs(bands - frequency).argmin()) <= 1
    assert brightest[9000] < 20 < brightest[1000] < 110 < brightest[110]


def test_volume_does_not_matter() -> None:
    samples = music(3, 22_050, 1)[:, 0]
    loud, soft = (to_grey(log_mel(samples * gain, 22_050, PRESETS["full"])) for gain in (1, 0.5))
    assert_same_image(soft, loud)
    assert share_within_one_level(loud, np.zeros_like(loud)) < 0.5


@pytest.mark.parametrize("sample_rate", [8_000, 22_050, 44_100, 48_000])
def test_the_filter_bank_is_librosas_and_torchaudios(sample_rate: int) -> None:
    ours = mel_filter_bank(sample_rate, 2048, 128)
    theirs = torchaudio.functional.melscale_fbanks(
        1025, 0.0, sample_rate / 2, 128, sample_rate, norm="slaney", mel_scale="slaney"
    )
    np.testing.assert_allclose(ours, librosa.filters.mel(sr=sample_rate, n_fft=2048), atol=1e-8)
    np.testing.assert_allclose(ours, theirs.T.numpy(), atol=2e-6)


@pytest.mark.parametrize("sample_rate", [22_050, 44_100])
def test_mel_power_is_torchaudios(sample_rate: int) -> None:
    samples = music(5, sample_rate, 1)[:, 0]
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate, 2048, hop_length=512, n_mels=128, norm="slaney", mel_scale="slaney", pad_mode="constant"
    )
    theirs = transform(torch.from_numpy(samples)).numpy()
    ours = mel_power(samples, sample_rate, PRESETS["compact"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=theirs.max() * 1e-6)


def test_the_reference_is_the_maximum_of_all_frames() -> None:
    """A click that the compact preset does not keep still sets the scale."""
    samples = np.full(6 * 44_100, 0.001, dtype=np.float32) * np.sin(np.arange(6 * 44_100), dtype=np.float32)
    quiet = log_mel(samples, 44_100, PRESETS["compact"])
    samples[3 * 44_100 + 1800] = 1.0
    with_click = log_mel(samples, 44_100, Preset("two frames", None, n_frames=2))
    assert quiet.max() == pytest.approx(0, abs=1e-4)
    assert with_click.shape == (128, 2)
    assert with_click.max() < -10


def test_decibels_and_grey_levels_are_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(64, 4)
    np.testing.assert_array_equal(to_grey(to_decibels(levels)), levels)
    assert to_decibels(levels).min() == -80
    assert to_decibels(levels)[0, 0] == pytest.approx(-80 * 3 / 255)  # the image's last row

    db = np.random.default_rng(0).uniform(-80, 0, (128, 50)).astype(np.float32)
    np.testing.assert_allclose(to_decibels(to_grey(db)), db, atol=80 / 255 / 2 + 1e-4)


def test_only_grey_pngs_are_read(tmp_path: Path) -> None:
    good = np.random.default_rng(0).integers(0, 256, (128, 40), dtype=np.uint8)
    path = tmp_path / "000002.png"
    Image.fromarray(good).save(path)
    np.testing.assert_array_equal(read_png(path), good)

    whole = path.read_bytes()
    Image.fromarray(np.stack([good, good, 255 - good], axis=2)).save(path)
    with pytest.raises(FmaNbError) as caught:
        read_png(path)
    assert_one_sentence(caught.value, path)
    for content in (b"", b"no image", whole[: len(whole) // 2], whole[:30]):
        path.write_bytes(content)
        with pytest.raises(FmaNbError) as caught:
            read_png(path)
        assert_one_sentence(caught.value, path)


def test_one_clip_becomes_one_png_or_a_reason(tmp_path: Path, clips: dict[tuple[int, int], Path]) -> None:
    preset = get_preset("compact")
    png = tmp_path / "train" / "Rock" / "000002.png"
    assert make_spectrogram(clips[44_100, 2], png, preset) is None
    np.testing.assert_array_equal(read_png(png), clip_to_grey(clips[44_100, 2], preset))

    bad = tmp_path / "bad.mp3"
    bad.write_text("no music")
    reason = make_spectrogram(bad, tmp_path / "train" / "Rock" / "000003.png", preset)
    assert reason is not None and "not audio" in reason
    assert [path.name for path in png.parent.iterdir()] == ["000002.png"]


def test_unknown_preset_is_named() -> None:
    with pytest.raises(FmaNbError) as caught:
        make_spectrograms("fma_small", "huge")
    assert_one_sentence(caught.value, "preset='huge'", "full, compact")


# ----- bulk -----

BROKEN = 90_001


def copy_with_a_broken_clip(tiny_data: Path, data: Path) -> None:
    shutil.copytree(tiny_data, data)
    rows = [*tiny_rows(), track_row(BROKEN, "Rock")]
    write_tracks_csv(data / "raw" / "fma_metadata" / "tracks.csv", rows)
    broken = mp3_path(data, BROKEN)
    broken.parent.mkdir()
    broken.write_text("this is not music")


def png_times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def bulk(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[tuple[Path, pd.DataFrame]]:
    """A whole dataset with one broken clip, made once: its folder, and what was skipped."""
    data = tmp_path_factory.mktemp("bulk") / "data"
    copy_with_a_broken_clip(tiny_data, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        skipped = make_spectrograms("fma_small", "compact", workers=2, progress=False)
        yield spectrogram_dir("fma_small", "compact"), skipped


@pytest.fixture
def bulk_copy(
    bulk: tuple[Path, pd.DataFrame], project: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A copy that a test may damage: data folder, spectrogram folder."""
    old, data = bulk[0].parent.parent, project / "data"
    shutil.copytree(old, data)
    monkeypatch.setenv("FMA_NB_DATA", str(data))
    return data, spectrogram_dir("fma_small", "compact")


def test_bulk_writes_one_png_a_track(bulk: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = bulk
    index = load_index("fma_small").tracks
    rows = index[index["track_id"] != BROKEN]
    expected = {f"{row.split}/{row.genre}/{row.track_id:06d}.png": row.path for row in rows.itertuples()}
    assert len(expected) == 40
    assert set(png_times(folder)) == set(expected)
    for name, audio in list(expected.items())[:8]:
        image = Image.open(folder / name)
        assert (image.mode, image.size, image.format) == ("L", (128, 128), "PNG")
        assert_same_image(np.asarray(image), librosa_grey(Path(audio), "compact"))


def test_bulk_records_how_the_images_were_made(bulk: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = bulk
    settings = json.loads((folder / "mel.json").read_text())
    expected = {
        "name": "compact",
        "sample_rate": None,
        "n_fft": 2048,
        "hop_length": 512,
        "n_mels": 128,
        "n_frames": 128,
        "mel_scale": "slaney",
        "norm": "slaney",
        "power": 2.0,
        "dynamic_range_db": 80.0,
    }
    assert expected.items() <= settings.items()


def test_bulk_lists_what_it_skipped(bulk: tuple[Path, pd.DataFrame]) -> None:
    folder, skipped = bulk
    for rows in (skipped, pd.read_csv(folder / "skipped.csv")):
        assert rows["track_id"].tolist() == [BROKEN]
        assert rows["path"].iloc[0].endswith(f"/090/{BROKEN:06d}.mp3")
        assert rows["reason"].iloc[0].startswith("not audio")


def test_bulk_leaves_nothing_else_behind(bulk: tuple[Path, pd.DataFrame]) -> None:
    folder, _ = bulk
    others = {p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".png"}
    assert others - {".lock"} == {"mel.json", "skipped.csv"}


def test_a_second_bulk_run_does_nothing(bulk: tuple[Path, pd.DataFrame]) -> None:
    folder, skipped = bulk
    before = png_times(folder)
    again = make_spectrograms("fma_small", "compact", workers=2, progress=False)
    assert png_times(folder) == before
    pd.testing.assert_frame_equal(again.reset_index(drop=True), skipped.reset_index(drop=True))


def test_a_moved_data_folder_keeps_its_list_of_skipped_clips(bulk_copy: tuple[Path, Path]) -> None:
    _, folder = bulk_copy
    listed = folder / "skipped.csv"
    listed.write_text(listed.read_text().replace("not audio", "known as not audio"))
    again = make_spectrograms("fma_small", "compact", workers=1, progress=False)
    assert again["track_id"].tolist() == [BROKEN]
    assert again["reason"].iloc[0].startswith("known as")  # taken from the list, not tried again


def test_a_bulk_run_makes_only_what_is_missing(bulk_copy: tuple[Path, Path]) -> None:
    data, folder = bulk_copy
    before = png_times(folder)
    lost = min(before)
    content = (folder / lost).read_bytes()
    (folder / lost).unlink()
    shutil.copy(mp3_path(data, 2), mp3_path(data, BROKEN))  # the broken clip was fetched again

    skipped = make_spectrograms("fma_small", "compact", workers=1, progress=False)

    after = png_times(folder)
    assert {name for name in after if after[name] != before.get(name)} == {
        lost,
        f"train/Rock/{BROKEN:06d}.png",
    }
    assert (folder / lost).read_bytes() == content
    assert skipped.empty
    assert pd.read_csv(folder / "skipped.csv").empty


def test_a_complete_bulk_run_can_be_repeated(project: Path, tiny_data: Path) -> None:
    shutil.copytree(tiny_data, project / "data")
    folder = spectrogram_dir("fma_small", "compact")
    for row in load_index("fma_small").tracks.itertuples():
        png = folder / row.split / row.genre / f"{row.track_id:06d}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (128, 128)).save(png)
    before = png_times(folder)
    for _ in range(2):
        assert make_spectrograms("fma_small", "compact", progress=False).empty
    assert png_times(folder) == before


@pytest.mark.parametrize("content", ["", "some,other,table\n1,2,3\n"])
def test_a_foreign_list_of_skipped_clips_does_no_harm(bulk_copy: tuple[Path, Path], content: str) -> None:
    data, folder = bulk_copy
    (folder / "skipped.csv").write_text(content)
    mp3_path(data, BROKEN).unlink()  # so that nothing is left to do
    skipped = make_spectrograms("fma_small", "compact", progress=False)
    assert skipped[["track_id", "reason"]].to_numpy().tolist() == [[BROKEN, "file missing"]]


def test_too_many_unreadable_clips_stop_a_bulk_run(project: Path, tiny_data: Path) -> None:
    shutil.copytree(tiny_data, project / "data")
    broken = [mp3_path(project / "data", row["track_id"]) for row in tiny_rows()[:3]]
    for path in broken:
        path.write_text("this is not music")
    with pytest.raises(FmaNbError) as caught:
        make_spectrograms("fma_small", "full", workers=1, progress=False)
    first_line, *listed = str(caught.value).splitlines()
    assert "3 of 40 clips cannot be read, more than 5%" in first_line
    assert len(listed) == 3
    for path, line in zip(broken, listed, strict=True):
        assert f"{path}: not audio" in line
    # What could be made is kept.
    folder = spectrogram_dir("fma_small", "full")
    assert len(png_times(folder)) == 37
    assert pd.read_csv(folder / "skipped.csv")["path"].tolist() == [str(path) for path in broken]


def test_a_place_that_cannot_be_written_is_named(project: Path, tiny_data: Path) -> None:
    (project / "data").mkdir()
    (project / "data" / "raw").symlink_to(tiny_data / "raw")
    (project / "data" / "spectrograms").write_text("a file where the folder should be")
    with pytest.raises(FmaNbError) as caught:
        make_spectrograms("fma_small", "compact", progress=False)
    assert_one_sentence(caught.value, spectrogram_dir("fma_small", "compact"))


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_images_of_other_settings_are_not_mixed(bulk_copy: tuple[Path, Path], content: str | None) -> None:
    _, folder = bulk_copy
    path = folder / "mel.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"n_fft": 1024}) if content is None else content
    )
    with pytest.raises(FmaNbError) as caught:
        make_spectrograms("fma_small", "compact", progress=False)
    assert_one_sentence(caught.value, path)
