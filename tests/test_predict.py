"""Any audio file to eight probabilities: windows, weights, and a plain reason for what cannot be used."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import assert_one_sentence, music, write_mp3, write_png_tree
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

import fma_nb
from fma_nb.audio import UnreadableClipError, load_windows
from fma_nb.bulk.pack import load_pack
from fma_nb.calibration import probabilities_and_labels
from fma_nb.commands.cli import main
from fma_nb.commands.predict import Classifier, bar_chart, load_classifier, predict
from fma_nb.dataset import SpectrogramDataset, make_loader
from fma_nb.metadata import GENRES
from fma_nb.model import build_model
from fma_nb.project import SHIPPED_WEIGHTS, FmaNbError, outputs_dir, spectrogram_dir
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import load_checkpoint, load_model, run_files, save_checkpoint
from fma_nb.runs.experiment import metrics_path, train_and_evaluate
from fma_nb.spectrogram import PRESETS, log_mel, to_grey
from fma_nb.training import predict_logits

CPU = torch.device("cpu")
RATE = 44_100
RUN = "tiny"
FIRST_SEED = 3


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return load_classifier()


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    sf.write(path, samples, rate, format="WAV", subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wav(tmp_path_factory.mktemp("song") / "song.wav", music(0, RATE, 1, 3))


def logits_of(samples: np.ndarray, classifier: Classifier, rate: int = RATE) -> torch.Tensor:
    """Return the network's answer to mono samples, by the steps that notebook 02 teaches."""
    image = to_grey(log_mel(samples, rate, PRESETS[classifier.preset]))
    with torch.inference_mode():
        return classifier.network(torch.from_numpy(image.astype(np.float32) / 255)[None, None])[0]


def probabilities_of(samples: np.ndarray, classifier: Classifier, rate: int = RATE) -> list[float]:
    return (logits_of(samples, classifier, rate) / classifier.temperature).softmax(0).tolist()


def values(found: dict[str, float]) -> list[float]:
    return list(found.values())


def refusal(capsys: pytest.CaptureFixture[str]) -> FmaNbError:
    """Return what the command line said about bad input: one line, and nothing on the standard output."""
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fma-nb: ")
    assert printed.err.count("\n") == 1
    return FmaNbError(printed.err.strip())


def answers_in(lines: str) -> dict[str, Any]:
    """Return what ``predict --json`` printed by file: probabilities, or the reason why there are none."""
    found = [json.loads(line) for line in lines.splitlines()]
    return {answer["file"]: answer.get("probabilities", answer.get("error")) for answer in found}


# ----- the function -----


@pytest.mark.parametrize(
    ("kind", "subtype", "rate", "n_channels"),
    [
        ("MP3", "MPEG_LAYER_III", 44_100, 2),
        ("MP3", "MPEG_LAYER_III", 22_050, 1),
        ("MP3", "MPEG_LAYER_III", 8_000, 2),
        ("OGG", "VORBIS", 48_000, 2),
        ("OGG", "VORBIS", 32_000, 1),
        ("FLAC", "PCM_16", 96_000, 2),
        ("FLAC", "PCM_24", 44_100, 1),
        ("WAV", "FLOAT", 11_025, 1),
        ("WAV", "PCM_16", 44_100, 6),
    ],
)
def test_any_audio_gives_eight_probabilities(
    tmp_path: Path, shipped: Classifier, kind: str, subtype: str, rate: int, n_channels: int
) -> None:
    """Channels are averaged, the clip repeated to 30 s, and brought to the rate of the training clips."""
    path = tmp_path / f"song.{kind.lower()}"
    sf.write(path, music(rate, rate, n_channels, 4), rate, format=kind, subtype=subtype)
    found = predict(path, shipped)
    assert tuple(found) == GENRES
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    assert all(0 < p < 1 for p in found.values())

    channels, _ = sf.read(path, dtype="float32", always_2d=True)
    mono = np.resize(channels.mean(axis=1), 30 * rate)
    resampled = librosa.resample(mono, orig_sr=rate, target_sr=RATE)
    # A grey level or two may be rounded the other way.
    assert values(found) == pytest.approx(probabilities_of(resampled, shipped), abs=2e-3)


@pytest.fixture(scope="module")
def three_moods(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """75 s that change their character every 30 s: notes, a humming chord, noise."""
    rng = np.random.default_rng(0)
    times = np.arange(30 * RATE) / RATE
    hum = sum(np.sin(2 * np.pi * f * times) for f in (110, 165, 220)) * 0.2 * (1 + np.sin(times)) / 2
    parts = [music(1, RATE, 1, 30)[:, 0], hum, rng.uniform(-0.5, 0.5, 15 * RATE)]
    samples = np.concatenate(parts).astype(np.float32)
    return write_wav(tmp_path_factory.mktemp("long") / "long.wav", samples), samples


def test_a_long_file_is_the_average_over_its_windows(
    three_moods: tuple[Path, np.ndarray], shipped: Classifier
) -> None:
    path, samples = three_moods
    windows = [samples[start * RATE : (start + 30) * RATE] for start in (0, 30, 45)]
    rows = np.array([probabilities_of(window, shipped) for window in windows])
    assert np.abs(rows - rows.mean(axis=0)).max() > 0.01  # else this test would show little
    assert values(predict(path, shipped)) == pytest.approx(rows.mean(axis=0).tolist(), abs=1e-5)


def test_a_rest_under_five_seconds_is_left_out(
    tmp_path: Path, three_moods: tuple[Path, np.ndarray], shipped: Classifier
) -> None:
    samples = three_moods[1]
    found = {
        seconds: values(predict(write_wav(tmp_path / "a.wav", samples[: int(seconds * RATE)]), shipped))
        for seconds in (30, 34.9, 35)
    }
    assert found[34.9] == found[30]
    assert found[35] != found[30]


def test_a_short_clip_is_repeated_to_thirty_seconds(tmp_path: Path, shipped: Classifier) -> None:
    clip = music(5, RATE, 1, 10)[:, 0]
    once = predict(write_wav(tmp_path / "once.wav", clip), shipped)
    assert values(once) == pytest.approx(probabilities_of(np.tile(clip, 3), shipped), abs=1e-5)
    assert values(once) != pytest.approx(probabilities_of(clip, shipped), abs=1e-3)
    assert values(once) != pytest.approx(probabilities_of(np.pad(clip, (0, 20 * RATE)), shipped), abs=1e-3)


def test_a_silent_window_is_left_out(
    tmp_path: Path, three_moods: tuple[Path, np.ndarray], shipped: Classifier
) -> None:
    first, silence = three_moods[1][: 30 * RATE], np.zeros(30 * RATE, np.float32)
    expected = pytest.approx(probabilities_of(first, shipped), abs=1e-5)
    for parts in ([first, silence], [silence, first]):
        assert values(predict(write_wav(tmp_path / "a.wav", np.concatenate(parts)), shipped)) == expected


@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_the_temperature_divides_the_logits(song: Path, shipped: Classifier, temperature: float) -> None:
    samples = np.resize(sf.read(song, dtype="float32")[0], 30 * RATE)
    expected = (logits_of(samples, shipped) / temperature).softmax(0).tolist()
    found = values(predict(song, replace(shipped, temperature=temperature)))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(values(predict(song, replace(shipped, temperature=1.0))), abs=1e-3)


def test_the_full_preset_has_its_own_sample_rate(song: Path, shipped: Classifier) -> None:
    samples = np.resize(sf.read(song, dtype="float32")[0], 30 * RATE)
    full = replace(shipped, preset="full")
    resampled = librosa.resample(samples, orig_sr=RATE, target_sr=22_050)
    expected = probabilities_of(resampled, full, 22_050)
    assert values(predict(song, full)) == pytest.approx(expected, abs=2e-3)


def test_the_package_offers_the_function(song: Path, shipped: Classifier) -> None:
    assert fma_nb.predict is predict
    assert fma_nb.predict(str(song)) == predict(song, shipped)
    with pytest.raises(AttributeError, match="no_such_thing"):
        fma_nb.no_such_thing  # noqa: B018


def test_importing_the_package_does_not_import_pytorch() -> None:
    """Most commands do without it, and it takes seconds."""
    code = "import sys, fma_nb, fma_nb.commands.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_recordings_are_told_apart(real: Path, shipped: Classifier) -> None:
    """Seven recordings that are not FMA's; which genre each is given stands in the model card."""
    songs = sorted(path for path in (real / "audio").iterdir() if path.suffix in (".mp3", ".ogg"))
    found = [predict(song, shipped) for song in songs]
    assert len(found) == 7
    assert all(sum(p.values()) == pytest.approx(1, abs=1e-6) for p in found)
    answers = {song.stem: max(p, key=lambda genre: p[genre]) for song, p in zip(songs, found, strict=True)}
    assert answers == {
        "brahms_hungarian_dance_5": "International",
        "karissa_hobbs_lets_go_fishin": "International",
        "kevin_macleod_danse_macabre_finale": "Rock",
        "kevin_macleod_sugar_plum_fairy": "International",
        "kevin_macleod_vibe_ace": "Instrumental",
        "slow_motion_dream_excerpt": "Pop",
        "square_a_saw_better": "International",
    }


# ----- windows -----


@pytest.mark.parametrize(
    ("seconds", "windows"),
    [
        (1, [(0, 1)]),
        (7.25, [(0, 7.25)]),
        (10, [(0, 10)]),
        (14.9, [(0, 10)]),
        (15, [(0, 10), (5, 15)]),
        (20, [(0, 10), (10, 20)]),
        (24.9, [(0, 10), (10, 20)]),
        (25, [(0, 10), (10, 20), (15, 25)]),
    ],
)
def test_windows_cover_the_file(tmp_path: Path, seconds: float, windows: list[tuple[float, float]]) -> None:
    rate = 1000
    channels = np.random.default_rng(0).uniform(-1, 1, (int(seconds * rate), 2)).astype(np.float32)
    found = list(load_windows(write_wav(tmp_path / "a.wav", channels, rate), seconds=10))
    assert len(found) == len(windows)
    for (samples, sample_rate), (start, end) in zip(found, windows, strict=True):
        assert (samples.dtype, sample_rate) == (np.float32, rate)
        expected = channels[int(start * rate) : int(end * rate)].mean(axis=1)
        np.testing.assert_allclose(samples, np.resize(expected, 10 * rate), atol=1e-6)


@pytest.mark.parametrize("broken", [0.0, np.nan])
def test_a_window_without_sound_is_left_out(tmp_path: Path, broken: float) -> None:
    rate = 1000
    samples = np.random.default_rng(0).uniform(-1, 1, 30 * rate).astype(np.float32)
    samples[10 * rate : 20 * rate] = broken
    found = [window for window, _ in load_windows(write_wav(tmp_path / "a.wav", samples, rate), seconds=10)]
    assert len(found) == 2
    np.testing.assert_array_equal(np.concatenate(found), np.r_[samples[:10_000], samples[20_000:]])


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_every_window_is_resampled(tmp_path: Path, rate: int) -> None:
    path = write_wav(tmp_path / "a.wav", music(rate, rate, 2, 17), rate)
    found = list(load_windows(path, 22_050, seconds=6))
    for (samples, sample_rate), start in zip(found, (0, 6, 11), strict=True):
        expected, _ = librosa.load(path, sr=22_050, offset=start, duration=6)
        assert sample_rate == 22_050
        assert abs(len(samples) - 6 * 22_050) <= 1
        np.testing.assert_allclose(samples[: len(expected)], expected[: len(samples)], atol=1e-5)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rate, peaks = 16_000, {}
    for n_windows in (5, 30):
        samples = np.random.default_rng(0).uniform(-1, 1, n_windows * 10 * rate)
        path = write_wav(tmp_path / "a.wav", samples, rate)
        tracemalloc.start()
        assert sum(1 for _ in load_windows(path, seconds=10)) == n_windows
        _, peaks[n_windows] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peaks[30] < 1.05 * peaks[5]
    assert peaks[30] < 10 * 10 * rate * 4  # of 30 windows, the space of ten


# ----- files that cannot be used -----


def write_text(path: Path) -> None:
    path.write_text("this is not music\n" * 500)


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_no_samples(path: Path) -> None:
    write_wav(path, np.zeros(0))


def write_almost_a_second(path: Path) -> None:
    write_wav(path, music(0, 8000, 1, 2)[:7999], 8000)


def write_silence(path: Path) -> None:
    write_wav(path, np.zeros(8000 * 6), 8000)


def write_silent_mp3(path: Path) -> None:
    write_mp3(path, np.zeros((22_050 * 6, 1), np.float32), 22_050)


def write_long_silence(path: Path) -> None:
    write_wav(path, np.zeros(8000 * 66), 8000)


def write_folder(path: Path) -> None:
    path.mkdir()


def leave_out(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_text, "not audio"),
        (write_nothing, "empty"),
        (write_no_samples, "no audio"),
        (write_almost_a_second, "too short"),
        (write_silence, "silent"),
        (write_silent_mp3, "silent"),
        (write_long_silence, "silent"),
        (write_folder, "a folder without audio files"),
        (leave_out, "missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path,
    song: Path,
    shipped: Classifier,
    capsys: pytest.CaptureFixture[str],
    write: Callable[[Path], None],
    reason: str,
) -> None:
    path = tmp_path / "song.mp3"
    write(path)
    with pytest.raises(UnreadableClipError, match=reason):
        list(load_windows(path))
    with pytest.raises(FmaNbError) as caught:
        predict(path, shipped)
    assert_one_sentence(caught.value, path, reason)

    if path.is_dir():  # the command takes a folder for the songs in it
        assert main(["predict", str(path)]) == 2
        assert capsys.readouterr().out == f"{caught.value}\n"
        return
    # The files before it and after it have their answers, in both forms.
    songs = [str(song), str(path), str(song)]
    assert main(["predict", *songs]) == 2
    printed = capsys.readouterr()
    bars = bar_chart(predict(song, shipped))
    assert printed.out == f"{song}\n{bars}\n{caught.value}\n{song}\n{bars}\n"
    assert_one_sentence(FmaNbError(printed.err.strip()), "1 file(s)")
    assert main(["predict", "--json", *songs]) == 2
    printed = capsys.readouterr()
    assert [json.loads(line)["file"] for line in printed.out.splitlines()] == songs
    expected = {str(song): predict(song, shipped), str(path): str(caught.value)}
    assert answers_in(printed.out) == expected
    assert_one_sentence(FmaNbError(printed.err.strip()), "1 file(s)")


# ----- the command -----


def test_json_holds_the_numbers_of_the_function(
    tmp_path: Path, song: Path, shipped: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_wav(tmp_path / 'a "quoted" näme.wav', music(9, RATE, 2, 2))
    assert main(["predict", "--json", str(song), str(other)]) == 0
    found = answers_in(capsys.readouterr().out)
    assert list(found) == [str(song), str(other)]
    for path in (song, other):
        assert found[str(path)] == predict(path, shipped)
    assert found[str(song)] != found[str(other)]


def test_bars_show_every_genre_and_the_most_likely_first(
    tmp_path: Path, song: Path, shipped: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = [song, write_wav(tmp_path / "other.wav", music(9, RATE, 2, 2))]
    assert main(["predict", *map(str, songs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 9
    for path, first in zip(songs, (0, 9), strict=True):
        expected = predict(path, shipped)
        assert lines[first] == str(path)
        bars = [
            re.fullmatch(r"  (\S+) +(\d\.\d\d)(?:  (█+))?", line) for line in lines[first + 1 : first + 9]
        ]
        assert all(bars)
        names = [bar[1] for bar in bars if bar]
        assert names == sorted(GENRES, key=lambda genre: -expected[genre])
        for bar in filter(None, bars):
            assert bar[2] == f"{expected[bar[1]]:.2f}"
            assert len(bar[3] or "") == round(30 * expected[bar[1]])


def test_a_folder_stands_for_the_songs_below_it(
    tmp_path: Path, shipped: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "album").mkdir()
    songs = [
        write_wav(tmp_path / name, music(i, RATE, 1, 2)) for i, name in enumerate(("album/b.wav", "c.WAV"))
    ]
    (tmp_path / "cover.png").write_bytes(b"no song")
    (tmp_path / "._c.wav").write_bytes(b"resource fork")
    assert main(["predict", "--json", str(tmp_path)]) == 0
    assert answers_in(capsys.readouterr().out) == {str(song): predict(song, shipped) for song in songs}


# ----- weights -----


class Bomb:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str, int], int], tuple[str, int]]:
        return os.open, (str(self.marker), os.O_CREAT)


Content = dict[str, Any]


def other_architecture(content: Content) -> Content:
    return content | {"config": content["config"] | {"width": 0.5}}


def other_model(content: Content) -> Content:
    return content | {"config": content["config"] | {"model": "crnn_no_gru"}}


def one_genre_less(content: Content) -> Content:
    return content | {"genres": content["genres"][:-1]}


def one_genre_more(content: Content) -> Content:
    return content | {"genres": [*content["genres"], "Jazz"]}


def other_bands(content: Content) -> Content:
    return content | {"image_shape": [96, 128]}


def other_version(content: Content) -> Content:
    return content | {"config": content["config"] | {"drums": 1}}


def no_genres(content: Content) -> Content:
    return {key: value for key, value in content.items() if key != "genres"}


def no_weights(content: Content) -> Content:
    return content | {"model_state": {}}


def weights_that_are_no_numbers(content: Content) -> Content:
    return content | {
        "model_state": {
            k: torch.full_like(v, math.nan) if v.is_floating_point() else v
            for k, v in content["model_state"].items()
        }
    }


def replaced(name: str, value: Any) -> Callable[[Content], Content]:
    def change(content: Content) -> Content:
        return content | {name: value}

    return change


@pytest.mark.parametrize(
    "change",
    [
        other_architecture,
        other_model,
        one_genre_less,
        one_genre_more,
        other_bands,
        other_version,
        no_genres,
        no_weights,
        weights_that_are_no_numbers,
        replaced("model_state", [torch.zeros(3)]),
        replaced("model_state", {1: torch.zeros(3)}),
        replaced("model_state", {"classifier.bias": "text"}),
        replaced("config", None),
        replaced("config", {}),
        replaced("config", {"model": "resnet"}),
        replaced("image_shape", [128, 10**12]),
        replaced("config", "crnn"),
        replaced("genres", 8),
        replaced("genres", list(range(8))),
        replaced("genres", ["Rock"] * 8),
        replaced("image_shape", 128),
        replaced("image_shape", ["128", "128"]),
        replaced("image_shape", [128, -1]),
        replaced("image_shape", [128, 128, 1]),
        replaced("preset", "huge"),
        replaced("preset", {}),
        replaced("temperature", "warm"),
        replaced("temperature", 0.0),
        replaced("temperature", math.nan),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, song: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Content], Content]
) -> None:
    path = tmp_path / "other.pt"
    torch.save(change(load_checkpoint(SHIPPED_WEIGHTS)), path)
    assert main(["predict", "--weights", str(path), str(song)]) == 2
    assert_one_sentence(refusal(capsys), path)


@pytest.mark.parametrize("content", ["missing", "folder", "empty", "text", "cut", "tensor"])
def test_a_file_that_holds_no_weights_is_refused(
    tmp_path: Path, song: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "weights.pt"
    if content == "folder":
        path.mkdir()
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content != "missing":
        whole = SHIPPED_WEIGHTS.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello\n" * 99, "cut": whole[: len(whole) // 2]}[content])
    assert main(["predict", "--weights", str(path), str(song)]) == 2
    assert_one_sentence(refusal(capsys), path)


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_nothing_in_a_weights_file_is_executed(
    tmp_path: Path, song: Path, capsys: pytest.CaptureFixture[str], as_checkpoint: bool
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pt"
    if as_checkpoint:
        torch.save(load_checkpoint(SHIPPED_WEIGHTS) | {"genres": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    assert main(["predict", "--weights", str(path), str(song)]) == 2
    assert_one_sentence(refusal(capsys), path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if as_checkpoint else pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb is live


def test_the_temperature_of_a_weights_file_is_used(
    tmp_path: Path, song: Path, shipped: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "warm.pt"
    save_checkpoint(path, load_checkpoint(SHIPPED_WEIGHTS) | {"temperature": 2.5})
    assert main(["predict", "--json", "--weights", str(path), str(song)]) == 0
    expected = predict(song, replace(shipped, temperature=2.5))
    assert answers_in(capsys.readouterr().out) == {str(song): expected}


def test_the_shipped_weights_are_small_and_complete() -> None:
    saved = load_checkpoint(SHIPPED_WEIGHTS)
    assert SHIPPED_WEIGHTS.stat().st_size < 5e6
    assert tuple(saved["genres"]) == GENRES == tuple(sorted(GENRES))
    assert (saved["preset"], saved["image_shape"]) == ("compact", [128, 128])
    assert 0 < saved["temperature"] < 20
    config = Recipe(**saved["config"])
    assert config.model == "crnn"
    network = build_model("crnn", 8, 128, 128, **config.architecture())
    assert network.state_dict().keys() == saved["model_state"].keys()


def test_the_shipped_weights_hold_no_optimizer_state() -> None:
    saved = load_checkpoint(SHIPPED_WEIGHTS)
    assert not [key for key in saved if key != "model_state" and "state" in key]
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved["model_state"].values())
    assert SHIPPED_WEIGHTS.stat().st_size < 1.1 * n_bytes  # an optimizer's would be twice that again


def test_the_shipped_network_is_in_evaluation_mode(song: Path, shipped: Classifier) -> None:
    assert shipped.genres == GENRES
    assert not any(module.training for module in shipped.network.modules())
    assert predict(song, shipped) == predict(song, load_classifier())


# ----- export -----


def mislabel(folder: Path) -> None:
    """Move one PNG of every genre to the next: nobody can be right about a third of this split."""
    first = {genre: min((folder / genre).iterdir()) for genre in GENRES}
    for genre, following in zip(GENRES, (*GENRES[1:], GENRES[0]), strict=True):
        first[genre].rename(folder / following / first[genre].name)


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """The metrics of a small CRNN trained with two seeds, whose test labels are worse than those of val."""
    folder = spectrogram_dir("fma_mini", "compact")
    write_png_tree(folder, {"train": 8, "val": 3, "test": 3}, shape=(128, 128))
    mislabel(folder / "test")
    config = Recipe("crnn", epochs=2, batch_size=4, lr=3e-3, seed=FIRST_SEED, width=0.25)
    pack = load_pack("fma_mini", "compact")
    return train_and_evaluate(config, pack, RUN, CPU, n_seeds=2, evaluation_split="test", progress=False)


@pytest.fixture(scope="module")
def exported(run: dict[str, Any]) -> Path:
    path = outputs_dir() / "exported" / "small.pt"
    assert run["model"] == "crnn"
    assert main(["export", "--run", RUN, "--out", str(path)]) == 0
    return path


def most_likely_temperature(metrics: dict[str, Any], split: str) -> float:
    """Search a fine grid for what `fma_nb.calibration.fit_temperature` minimises."""
    probabilities, labels = probabilities_and_labels(metrics, split)
    logits = torch.from_numpy(probabilities).clamp(min=1e-6).log()
    grid = np.geomspace(0.05, 20, 2000)
    losses = [torch.nn.functional.cross_entropy(logits / t, torch.from_numpy(labels)) for t in grid]
    return float(grid[int(np.argmin(losses))])


@pytest.mark.usefixtures("run")
def test_an_exported_classifier_answers_as_the_best_checkpoint(exported: Path, tmp_path: Path) -> None:
    pack = load_pack("fma_mini", "compact")
    best, second = (
        load_model(run_files(RUN, "crnn", seed, FIRST_SEED).best, "crnn", pack, CPU).eval()
        for seed in (FIRST_SEED, FIRST_SEED + 1)
    )
    classifier = load_classifier(exported)
    assert (classifier.genres, classifier.preset) == (GENRES, "compact")
    images = torch.from_numpy(pack.split("val").images).unsqueeze(1) / 255
    with torch.inference_mode():
        found, expected, other = (network(images) for network in (classifier.network, best, second))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, other, atol=1e-2)

    clip = music(3, RATE, 1, 30)[:, 0]
    path = write_wav(tmp_path / "a.wav", clip)
    of_best = probabilities_of(clip, replace(classifier, network=best))
    assert values(predict(path, classifier)) == pytest.approx(of_best, abs=1e-4)


def test_the_exported_temperature_is_fitted_on_validation(run: dict[str, Any], exported: Path) -> None:
    on_val, on_test = (most_likely_temperature(run, split) for split in ("val", "test"))
    assert abs(np.log(on_val / on_test)) > 0.1  # else this test would show little
    assert load_classifier(exported).temperature == pytest.approx(on_val, rel=0.01)


def test_an_export_holds_what_prediction_needs_and_no_more(run: dict[str, Any], exported: Path) -> None:
    saved, best = load_checkpoint(exported), load_checkpoint(run_files(RUN, "crnn", 3, 3).best)
    assert "optimizer_state" in best
    assert not [key for key in saved if key != "model_state" and "state" in key]
    assert saved["config"] == run["config"]
    assert exported.stat().st_size < run_files(RUN, "crnn", 3, 3).best.stat().st_size / 2
    assert load_checkpoint(SHIPPED_WEIGHTS).keys() == saved.keys()


def test_export_and_predict_as_commands(
    exported: Path, song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "small.pt"
    assert main(["export", "--run", RUN, "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB, ")
    assert f"temperature {load_classifier(path).temperature:.3f}" in printed
    assert path.read_bytes() == exported.read_bytes()
    assert main(["predict", "--json", "--weights", str(path), str(song)]) == 0
    found = answers_in(capsys.readouterr().out)[str(song)]
    assert found == predict(song, load_classifier(exported))
    assert found != predict(song)


def test_an_export_goes_into_the_run_and_leaves_the_package_alone(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = SHIPPED_WEIGHTS.read_bytes()
    assert main(["export", "--run", RUN]) == 0
    path = outputs_dir() / RUN / "crnn.pt"
    assert f"fma-nb predict --weights {path} SONG.mp3" in capsys.readouterr().out
    assert path.read_bytes() == exported.read_bytes()
    assert SHIPPED_WEIGHTS.read_bytes() == before


def test_a_reader_that_has_seen_enough_is_no_error(song: Path) -> None:
    """As `fma-nb predict SONG.mp3 | head -1` is; output is held back where it does not go to a terminal."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fma_nb", "predict", str(song)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141


def test_the_last_checkpoint_is_not_needed(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs_dir() / RUN, outputs_dir() / "without_last")
    run_files("without_last", "crnn", FIRST_SEED, FIRST_SEED).last.unlink()
    assert main(["export", "--run", "without_last", "--out", str(tmp_path / "x.pt")]) == 0
    assert (tmp_path / "x.pt").read_bytes() == exported.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--run", "none"], "none"),
        (["--run", RUN, "--model", "baseline"], "baseline"),
        (["--run", "../x"], "../x"),
    ],
)
@pytest.mark.usefixtures("run")
def test_there_must_be_something_to_export(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    name: str,
) -> None:
    assert main(["export", *arguments, "--out", str(tmp_path / "x.pt")]) == 2
    assert_one_sentence(refusal(capsys), name)
    assert not (tmp_path / "x.pt").exists()


# ----- evaluation of the shipped weights -----


@pytest.fixture
def png_tree(project: Path) -> None:
    """Eight genres in fma_small's own folder, and no run at all."""
    folder = spectrogram_dir("fma_small", "compact")
    assert folder.is_relative_to(project)
    write_png_tree(folder, {"train": 1, "val": 1, "test": 3}, shape=(128, 128))


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    options = ["--preset", "compact", "--split", "test", "--device", "cpu"]
    assert main(["evaluate", *options, *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("png_tree")
def test_a_run_without_a_crnn_is_evaluated_with_the_weights_of_the_package(
    shipped: Classifier, capsys: pytest.CaptureFixture[str]
) -> None:
    text = evaluated(capsys, "--dataset", "fma_small")
    assert "the weights of the package" in text
    assert "24 clips, 1 seed(s)" in text

    clips = load_pack("fma_small", "compact").split("test")
    logits, labels = predict_logits(shipped.network, make_loader(SpectrogramDataset(clips), 24), True)
    predicted = logits.argmax(1)
    accuracy = accuracy_score(labels, predicted)
    interval = re.search(
        r"\naccuracy +([\d.]+)\n +95 % interval +([\d.]+) to ([\d.]+), over clips, of this one network; for",
        text,
    )
    assert interval and interval[1] == f"{accuracy:.4f}"
    balanced = balanced_accuracy_score(labels, predicted)  # each clip is its own artist
    assert f"\nartist-balanced accuracy  {balanced:.4f}\n" in text
    assert float(interval[2]) <= accuracy <= float(interval[3])
    macro_f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    assert f"macro-F1  {macro_f1:.4f}\n" in text
    shown = text.split("recall by genre:\n")[1].splitlines()
    for i, (genre, line) in enumerate(zip(GENRES, shown, strict=True)):
        assert line == f"  {genre:<14}{(predicted[labels == i] == i).float().mean():.3f}"


@pytest.mark.usefixtures("project")
def test_a_test_folder_alone_is_enough_to_be_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    write_png_tree(spectrogram_dir("fma_small", "compact"), {"test": 2}, shape=(128, 128))
    assert "16 clips, 1 seed(s)" in evaluated(capsys, "--dataset", "fma_small")

    assert main(["evaluate", "--dataset", "fma_small", "--split", "val", "--device", "cpu"]) == 2
    assert_one_sentence(refusal(capsys), "'val'", "is empty")


@pytest.mark.usefixtures("png_tree")
def test_other_models_have_no_weights_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--dataset", "fma_small", "--model", "baseline", "--device", "cpu"]) == 2
    assert_one_sentence(refusal(capsys), metrics_path("fma_small", "baseline"), "missing")


def test_a_trained_run_is_preferred_to_the_package(
    run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = evaluated(capsys, "--dataset", "fma_mini", "--run", RUN)
    assert "the weights of the package" not in text
    for name in ("accuracy", "artist_balanced_accuracy"):
        mean = np.mean([result["test"][name] for result in run["seeds"]])
        assert f"\n{name.replace('artist_', 'artist-').replace('_', ' ')}  {mean:.4f}\n" in text
    assert "2 seed(s)" in text
