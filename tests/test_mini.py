"""fma_mini: FMA's layout and columns, the same bytes every time, resumable, and music rather than noise."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from fma_nb import metadata
from fma_nb.audio import UnreadableClipError, load_clip, probe
from fma_nb.project import FmaNbError, audio_dir, clip_path, metadata_dir, spectrogram_dir
from fma_nb.raw.clips import BIT_RATES, SAMPLE_RATES, MiniConfig, encode_mp3, plan_tracks
from fma_nb.raw.instruments import INSTRUMENTS, Setting, draw_timbre
from fma_nb.raw.mini import GENERATOR_VERSION, make_fma_mini
from fma_nb.raw.score import GENRES, GROOVES, PLAYERS, STEPS_PER_BAR, synthesize_track

GENRE_IDS = {name: genre.fma_id for name, genre in GENRES.items()}

TINY = MiniConfig(artists_per_genre=3, tracks_per_artist=1, seconds=4.0)

FMA_COLUMNS = {
    "album": "comments date_created date_released engineer favorites id information listens producer tags "
    "title tracks type",
    "artist": "active_year_begin active_year_end associated_labels bio comments date_created favorites id "
    "latitude location longitude members name related_projects tags website wikipedia_page",
    "set": "split subset",
    "track": "bit_rate comments composer date_created date_recorded duration favorites genre_top genres "
    "genres_all information interest language_code license listens lyricist number publisher tags title",
}
FMA_PAIRS = [(top, name) for top, names in FMA_COLUMNS.items() for name in names.split()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny dataset, made by two workers; tests only read it."""
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        make_fma_mini(TINY, workers=2, progress=False)
    return data


@pytest.fixture
def tiny_data(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMA_NB_DATA", str(tiny))
    return tiny


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FMA_NB_DATA", str(tmp_path))
    return tmp_path


def contents(data: Path) -> dict[str, bytes]:
    """Every file of a data folder but the locks, by its path below the folder."""
    files = (path for path in data.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


# --- Layout and audio


def test_every_planned_file_is_there_and_nothing_else(tiny_data: Path) -> None:
    wanted = {str(clip_path("fma_mini", t.track_id).relative_to(tiny_data)) for t in plan_tracks(TINY)}
    described = {f"raw/fma_mini_metadata/{name}" for name in ("tracks.csv", "genres.csv", "mini.json")}
    assert set(contents(tiny_data)) == wanted | described
    assert len(wanted) == 8 * 3 * 1 + 2
    assert {path.parent.name for path in audio_dir("fma_mini").rglob("*.mp3")} == {"000", "001"}


@pytest.mark.usefixtures("tiny_data")
def test_clips_decode_as_planned() -> None:
    for track in plan_tracks(TINY):
        if not track.damage:
            samples, sample_rate = sf.read(clip_path("fma_mini", track.track_id), always_2d=True)
            assert (sample_rate, samples.shape[1]) == (track.sample_rate, track.n_channels)
            assert len(samples) == pytest.approx(4.0 * sample_rate, abs=0.1 * sample_rate)
            assert 0.3 < np.abs(samples).max() < 1.0, track
            assert samples.std() > 0.01, track


def header_fields(mp3: bytes) -> tuple[int, int, int]:
    """MPEG version and layer bits, bit rate in kbit/s and sample rate in Hz of the first frame."""
    mpeg1 = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    mpeg2 = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
    is_mpeg1 = bool(mp3[1] & 0b1000)
    rate = [44_100, 48_000, 32_000][mp3[2] >> 2 & 3] // (1 if is_mpeg1 else 2)
    return mp3[1] >> 1 & 3, (mpeg1 if is_mpeg1 else mpeg2)[mp3[2] >> 4], rate


@pytest.mark.parametrize("bit_rate", BIT_RATES)
@pytest.mark.parametrize("n_channels", [1, 2])
@pytest.mark.parametrize("sample_rate", SAMPLE_RATES)
def test_mp3s_are_layer_3_and_their_header_tells_the_length(
    tmp_path: Path, sample_rate: int, n_channels: int, bit_rate: int
) -> None:
    time = np.arange(30 * sample_rate) / sample_rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time, dtype=np.float32)[:, None].repeat(n_channels, axis=1)
    path = tmp_path / "tone.mp3"
    path.write_bytes(mp3 := encode_mp3(tone, sample_rate, bit_rate))
    assert mp3[0] == 0xFF and mp3[1] >> 5 == 7
    assert header_fields(mp3) == (1, bit_rate // 1000, sample_rate)
    assert b"Info" in mp3[:64]
    info = probe(path)
    assert (info.sample_rate, info.n_channels) == (sample_rate, n_channels)
    assert info.seconds == pytest.approx(30.0, abs=0.1)
    decoded = sf.read(path, always_2d=True)[0]
    assert len(decoded) == round(info.seconds * sample_rate)
    assert decoded.std() == pytest.approx(0.95 * tone.std(), rel=0.02), "LAME leaves 5 % of headroom"
    assert len(mp3) * 8 / 30 == pytest.approx(bit_rate, rel=0.01)


@pytest.mark.usefixtures("tiny_data")
def test_one_truncated_and_one_empty_file_in_training() -> None:
    damaged = {track.damage: track for track in plan_tracks(TINY) if track.damage}
    assert set(damaged) == {"truncated", "empty"}
    assert {track.split for track in damaged.values()} == {"training"}
    assert clip_path("fma_mini", damaged["empty"].track_id).stat().st_size == 0
    assert 100 < clip_path("fma_mini", damaged["truncated"].track_id).stat().st_size < 1000
    for track in damaged.values():
        with pytest.raises(UnreadableClipError):
            load_clip(clip_path("fma_mini", track.track_id), min_seconds=1.0)


# --- Metadata


def test_tracks_csv_has_fmas_three_header_rows_and_52_columns(tiny_data: Path) -> None:
    lines = (tiny_data / "raw/fma_mini_metadata/tracks.csv").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "," + ",".join(top for top, _ in FMA_PAIRS)
    assert lines[1] == "," + ",".join(name for _, name in FMA_PAIRS)
    assert lines[2] == "track_id" + 52 * ","
    assert len(FMA_PAIRS) == 52


@pytest.mark.skipif("FMA_NB_REAL" not in os.environ, reason="FMA_NB_REAL is not set")
def test_header_and_genre_ids_equal_the_real_files(tiny_data: Path) -> None:
    real = Path(os.environ["FMA_NB_REAL"]) / "fma_metadata_head"
    ours = tiny_data / "raw/fma_mini_metadata"
    with (real / "tracks.csv").open("rb") as theirs, (ours / "tracks.csv").open("rb") as mini:
        assert [theirs.readline() for _ in range(3)] == [mini.readline() for _ in range(3)]
    real_ids = pd.read_csv(real / "genres.csv").set_index("title")["genre_id"]
    assert {name: real_ids[name] for name in GENRE_IDS} == GENRE_IDS


@pytest.mark.usefixtures("tiny_data")
def test_rows_are_plausible_and_say_that_they_are_synthetic() -> None:
    tracks = metadata.read_tracks(metadata_dir("fma_mini") / "tracks.csv")
    assert list(tracks.columns) == FMA_PAIRS
    assert (tracks["set", "subset"] == "small").all()
    assert set(tracks["set", "split"]) == {"training", "validation", "test"}
    assert set(tracks["track", "genre_top"]) == set(metadata.GENRES)
    assert tracks["artist", "bio"].str.contains("synthetic").all()
    assert tracks["artist", "bio"].str.contains('".*,.*\n', regex=True).all()
    assert tracks["track", "tags"].str.contains("synthetic").all()
    assert set(tracks["track", "bit_rate"]) == set(BIT_RATES)
    per_album = tracks.groupby(("album", "id"))
    assert (per_album.size() == per_album[[("album", "tracks")]].first()["album", "tracks"]).all()
    assert all(sorted(album["track", "number"]) == list(range(1, len(album) + 1)) for _, album in per_album)
    assert tracks["track", "duration"].between(30, 2000).all()
    ids = tracks["track", "genre_top"].map(GENRE_IDS)
    assert (tracks["track", "genres"] == "[" + ids.astype(str) + "]").all()
    assert not set(tracks.index) & set(metadata.ERRATA)
    assert tracks.index.is_monotonic_increasing


@pytest.mark.usefixtures("tiny_data")
def test_the_index_stage_takes_it_for_fma() -> None:
    index = metadata.load_index("fma_mini")
    assert len(index.tracks) + len(index.dropped) == len(plan_tracks(TINY))
    assert index.dropped["reason"].tolist() == ["file empty"]
    assert list(GENRES) == list(metadata.GENRES)


def test_genres_csv_counts_the_tracks(tiny_data: Path) -> None:
    with (tiny_data / "raw/fma_mini_metadata/genres.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["genre_id", "#tracks", "parent", "title", "top_level"]
    assert {row["title"]: int(row["genre_id"]) for row in rows} == GENRE_IDS
    assert sum(int(row["#tracks"]) for row in rows) == len(plan_tracks(TINY))


# --- Plan


def test_the_default_plan_is_the_one_of_the_course() -> None:
    tracks = plan_tracks(MiniConfig())
    regular = [track for track in tracks if not track.damage]
    assert (len(tracks), len(regular)) == (242, 240)
    assert Counter(t.split for t in regular) == {"training": 144, "validation": 48, "test": 48}
    assert set(Counter((t.genre, t.split) for t in regular).values()) == {18, 6}
    rates = Counter(track.sample_rate for track in tracks)
    assert set(rates) == {44_100, 48_000, 22_050}
    assert rates[44_100] > 200 and min(rates.values()) >= 3
    assert 10 < sum(track.n_channels == 1 for track in tracks) < 60
    first_genres = [track.genre for track in tracks[:40]]
    assert len(set(first_genres)) > 4, "tracks are not mixed"


def test_artists_are_uneven_as_in_fma() -> None:
    by_split: dict[tuple[str, str], Counter[int]] = {}
    for track in plan_tracks(MiniConfig()):
        if not track.damage:
            by_split.setdefault((track.genre, track.split), Counter())[track.artist] += 1
    assert {split: {len(c) for (_, s), c in by_split.items() if s == split} for _, split in by_split} == {
        "training": {6},
        "validation": {2},
        "test": {2},
    }
    effective = {key: c.total() ** 2 / sum(n * n for n in c.values()) for key, c in by_split.items()}
    assert all(effective[key] < 0.91 * len(c) for key, c in by_split.items())
    assert len({tuple(c.values()) for (_, split), c in by_split.items() if split == "training"}) > 4


@pytest.mark.parametrize("seed", range(20))
def test_no_split_has_artists_with_equally_many_tracks(seed: int) -> None:
    for mean in (2, 3):
        counts: dict[tuple[str, str], Counter[int]] = {}
        for track in plan_tracks(MiniConfig(seed, 10, mean)):
            if not track.damage:
                counts.setdefault((track.genre, track.split), Counter())[track.artist] += 1
        for (_, split), found in counts.items():
            assert found.total() == mean * {"training": 6, "validation": 2, "test": 2}[split]
            assert len(set(found.values())) > 1


@pytest.mark.parametrize("n_artists", [3, 4, 5, 10])
def test_artists_never_cross_splits(n_artists: int) -> None:
    splits: dict[tuple[str, int], set[str]] = {}
    for track in plan_tracks(MiniConfig(artists_per_genre=n_artists)):
        splits.setdefault((track.genre, track.artist), set()).add(track.split)
    assert all(len(found) == 1 for found in splits.values())
    for genre in GENRES:
        assert {s for (g, _), found in splits.items() if g == genre for s in found} == {
            "training",
            "validation",
            "test",
        }


@pytest.mark.parametrize(
    ("name", "value"), [("artists_per_genre", 2), ("tracks_per_artist", 0), ("seconds", 0.5), ("seed", -1)]
)
def test_impossible_configurations_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(FmaNbError, match=name):
        MiniConfig(**{name: value})


# --- Same bytes, resumable


def test_one_worker_or_two_second_run_or_first_the_bytes_are_the_same(
    tiny: Path, own_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_fma_mini(TINY, workers=1)
    made = contents(own_data)
    assert made == contents(tiny)
    assert len(capfd.readouterr().out.splitlines()) == 1, "a log wants one line, not a bar"
    times = {path: path.stat().st_mtime_ns for path in own_data.rglob("*") if path.is_file()}

    make_fma_mini(TINY, workers=1)
    assert all(path.stat().st_mtime_ns == times[path] for path in times if path.name != ".lock")

    lost = next(path for path in sorted(audio_dir("fma_mini").rglob("*.mp3")) if path.stat().st_size > 2000)
    lost.unlink()
    half_written = lost.with_name(f".{lost.name}.x.tmp")
    half_written.write_bytes(b"half")
    make_fma_mini(TINY, workers=1)
    assert contents(own_data) == made
    rewritten = {path for path in times if path.suffix == ".mp3" and path.stat().st_mtime_ns != times[path]}
    assert rewritten == {lost}


def test_another_configuration_replaces_everything(own_data: Path) -> None:
    short = MiniConfig(artists_per_genre=3, tracks_per_artist=1, seconds=1.0)
    make_fma_mini(short, workers=1, progress=False)
    before = contents(own_data)
    stale = spectrogram_dir("fma_mini", "compact") / "train" / "Folk" / "000002.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of the old music")

    make_fma_mini(MiniConfig(1, 3, 1, 1.0), workers=1, progress=False)

    after = contents(own_data)
    assert not stale.exists()
    assert json.loads(after["raw/fma_mini_metadata/mini.json"])["seed"] == 1
    music = [name for name in before if name.endswith(".mp3") and len(before[name]) > 1000]
    assert all(before[name] != after[name] for name in music)


def test_another_version_of_the_generator_replaces_everything(
    own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = MiniConfig(artists_per_genre=3, tracks_per_artist=1, seconds=1.0)
    make_fma_mini(short, workers=1, progress=False)
    made = contents(own_data)
    clip = next(path for path in audio_dir("fma_mini").rglob("*.mp3") if path.stat().st_size > 1000)
    clip.write_bytes(b"of another version")
    make_fma_mini(short, workers=1, progress=False)
    assert clip.read_bytes() == b"of another version", "made again although nothing has changed"
    monkeypatch.setattr("fma_nb.raw.mini.GENERATOR_VERSION", GENERATOR_VERSION + 1)
    make_fma_mini(short, workers=1, progress=False)
    assert clip.read_bytes() == made[str(clip.relative_to(own_data))]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_leaves_whole_files_and_the_next_run_goes_on(tiny: Path, own_data: Path) -> None:
    code = (
        "from fma_nb.raw.mini import *\n"
        "if __name__ == '__main__': make_fma_mini(MiniConfig(0, 3, 1, 4.0), workers=2, progress=False)"
    )
    script = own_data / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(own_data.rglob("*.mp3")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    script.unlink()

    finished = {name: data for name, data in contents(own_data).items() if name.endswith(".mp3")}
    assert 0 < len(finished) < len(plan_tracks(TINY))
    assert finished.items() <= contents(tiny).items()
    assert not (metadata_dir("fma_mini") / "tracks.csv").exists()
    make_fma_mini(TINY, workers=1, progress=False)
    assert contents(own_data) == contents(tiny)


def test_an_unwritable_folder_is_named(own_data: Path) -> None:
    (own_data / "raw").write_text("a file where a folder should be")
    with pytest.raises(FmaNbError, match=r"fma_mini_metadata|raw"):
        make_fma_mini(TINY, workers=1, progress=False)


# --- Sound


@pytest.mark.parametrize("genre", GENRES)
def test_tracks_are_finite_stereo_music_with_headroom(genre: str) -> None:
    samples = synthesize_track(genre, artist=0, track=0, seconds=8.0, sample_rate=22_050)
    assert (samples.shape, samples.dtype) == ((8 * 22_050, 2), np.float32)
    assert np.isfinite(samples).all()
    assert 0.5 < np.abs(samples).max() <= 0.6501
    spectrum = np.abs(np.fft.rfft(samples.mean(axis=1))) ** 2
    flatness = np.exp(np.log(spectrum + 1e-12).mean()) / spectrum.mean()
    assert flatness < 0.1, "white noise has 0.56"


def test_tracks_artists_and_seeds_differ_and_repeat() -> None:
    def sound(**changes: int) -> np.ndarray:
        return synthesize_track("Folk", **{"artist": 0, "track": 0, "seconds": 2, **changes})

    assert np.array_equal(sound(), sound())
    for change in ({"artist": 1}, {"track": 1}, {"seed": 1}):
        assert not np.array_equal(sound(), sound(**change))


def test_the_same_piece_is_played_at_every_sample_rate() -> None:
    envelopes = []
    for sample_rate in (22_050, 44_100):
        samples = synthesize_track("Hip-Hop", 2, 1, seconds=8.0, sample_rate=sample_rate)
        frames = samples[: 160 * (sample_rate // 20)].reshape(160, -1)
        envelopes.append(np.log(frames.std(axis=1) + 1e-3))
    assert np.corrcoef(envelopes)[0, 1] > 0.95


@pytest.mark.parametrize(
    "name", ["nylon guitar", "piano", "distorted guitar", "flute", "voice", "reed", "strings", "saw lead"]
)
@pytest.mark.parametrize("hertz", [196.0, 523.25])
def test_instruments_are_in_tune(name: str, hertz: float) -> None:
    rng = np.random.default_rng(0)
    note = INSTRUMENTS[name](np.array([hertz]), 1.5, Setting(44_100, draw_timbre(rng), rng))
    spectrum = np.abs(np.fft.rfft(note * np.hanning(note.size), 2**19))
    near = np.arange(spectrum.size) * 44_100 / 2**19
    window = (near > hertz / 1.06) & (near < hertz * 1.06)
    peak = near[window][spectrum[window].argmax()]
    assert abs(1200 * np.log2(peak / hertz)) < 20, f"{peak:.1f} Hz"


def test_every_line_has_a_player_and_whole_bars() -> None:
    for genre in GENRES.values():
        for name, line in genre.lines.items():
            assert name in PLAYERS
            assert all(form.isdigit() for form in line.forms)
            for pattern in line.patterns:
                bars = GROOVES[pattern].values() if pattern in GROOVES else pattern.split("|")
                assert {len(bar.strip()) for bar in bars} == {STEPS_PER_BAR}, pattern
