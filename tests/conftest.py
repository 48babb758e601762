"""Small real files that the tests are made of: an FMA-like dataset of short MP3s, and trees of PNGs.

No test sees the user's own ``data/`` and ``outputs/``: both are moved to temporary folders throughout.
"""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import soundfile as sf
import torch
from PIL import Image

from fma_nb.metadata import GENRES
from fma_nb.project import project_root
from fma_nb.raw.mini import make_fma_mini

_COLUMNS_BY_GROUP = {
    "album": """comments date_created date_released engineer favorites id information listens producer tags
        title tracks type""",
    "artist": """active_year_begin active_year_end associated_labels bio comments date_created favorites id
        latitude location longitude members name related_projects tags website wikipedia_page""",
    "set": "split subset",
    "track": """bit_rate comments composer date_created date_recorded duration favorites genre_top genres
        genres_all information interest language_code license listens lyricist number publisher tags title""",
}
TRACKS_COLUMNS = [(group, name) for group, names in _COLUMNS_BY_GROUP.items() for name in names.split()]
FMA_SPLITS = {"train": "training", "val": "validation", "test": "test"}
# (sample rate in Hz, channels): all that occur in FMA-Small.
FORMATS = ((44_100, 2), (48_000, 2), (22_050, 2), (44_100, 1), (48_000, 1), (22_050, 1))
CLIP_SECONDS = 5.5
TINY_COUNTS = {"train": 3, "val": 1, "test": 1}

TrackRow = dict[Any, Any]


def track_row(
    track_id: int,
    genre: str,
    split: str = "training",
    artist_id: int | None = None,
    subset: str = "small",
    title: str | None = None,
) -> TrackRow:
    """One row of FMA's ``tracks.csv``, with an awkward bio; ``split`` in FMA's own word."""
    return {
        "track_id": track_id,
        ("album", "information"): "<p>Recorded, mixed and lost</p>",
        ("album", "listens"): 6073,
        ("artist", "bio"): f'<p>Born "in a bar",\nraised by {track_id} wolves.</p>\n',
        ("artist", "id"): track_id if artist_id is None else artist_id,
        ("set", "split"): split,
        ("set", "subset"): subset,
        ("track", "bit_rate"): 256000,
        ("track", "genre_top"): genre,
        ("track", "genres"): "[21, 4]",
        ("track", "license"): "Attribution-NonCommercial-ShareAlike 3.0 International",
        ("track", "title"): f"Song, no. {track_id}" if title is None else title,
    }


def tracks_csv_text(rows: Sequence[TrackRow], columns: Sequence[tuple[str, str]] = TRACKS_COLUMNS) -> str:
    """FMA's ``tracks.csv``: two header rows, the ``track_id`` row, 52 columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(group for group, _ in columns)])
    writer.writerow(["", *(name for _, name in columns)])
    writer.writerow(["track_id", *("" for _ in columns)])
    for row in rows:
        writer.writerow([row["track_id"], *(row.get(column, "") for column in columns)])
    return text.getvalue()


def write_tracks_csv(path: Path, rows: Sequence[TrackRow]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tracks_csv_text(rows), encoding="utf-8")
    return path


def tiny_rows() -> list[TrackRow]:
    """8 genres x (3 train, 1 val, 1 test) tracks; no artist in two splits, some with two tracks."""
    rows: list[TrackRow] = []
    for genre in GENRES:
        for split, count in TINY_COUNTS.items():
            for i in range(count):
                track_id = 2 + 137 * len(rows)
                artist_id = track_id - 137 if i == 1 else track_id
                rows.append(track_row(track_id, genre, FMA_SPLITS[split], artist_id))
    return rows


def music(seed: int, sample_rate: int, n_channels: int, seconds: float = CLIP_SECONDS) -> np.ndarray:
    """Notes over noise [shape=(n_samples, n_channels)]: something in every band, never the same twice."""
    rng = np.random.default_rng(seed)
    sound = 0.02 * rng.standard_normal((int(seconds * sample_rate), n_channels), dtype=np.float32)
    note_times = np.arange(sample_rate // 2) / sample_rate
    for start in np.arange(0, seconds - 0.5, 0.25):
        frequency = 110 * 2 ** rng.uniform(0, 6)
        note = 0.2 * np.sin(2 * np.pi * frequency * note_times) * np.exp(-6 * note_times)
        first = int(start * sample_rate)
        sound[first : first + len(note)] += note[:, None] * rng.uniform(0.2, 1, n_channels)
    return np.clip(sound, -0.99, 0.99).astype(np.float32)


def write_mp3(path: Path, samples: np.ndarray, sample_rate: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, samples, sample_rate, format="MP3", subtype="MPEG_LAYER_III")
    return path


def mp3_path(data: Path, track_id: int, dataset: str = "fma_small") -> Path:
    name = f"{track_id:06d}"
    return data / "raw" / dataset / name[:3] / f"{name}.mp3"


def write_png_tree(
    folder: Path,
    counts: Mapping[str, int],
    genres: Sequence[str] = GENRES,
    shape: tuple[int, int] = (128, 32),
    seed: int = 0,
) -> dict[int, tuple[str, str, np.ndarray]]:
    """Write PNGs in which a genre is a bright band at its own height; return them by track id."""
    rng = np.random.default_rng(seed)
    written: dict[int, tuple[str, str, np.ndarray]] = {}
    for split, count in counts.items():
        for i, genre in enumerate(genres):
            for _ in range(count):
                # Ids do not rise with split or genre, as in FMA.
                track_id = 7 + (len(written) * 7919) % 100_000
                image = rng.integers(0, 120, shape)
                top = i * shape[0] // len(genres)
                image[top : top + shape[0] // len(genres)] += 100
                path = folder / split / genre / f"{track_id:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                written[track_id] = (split, genre, image.astype(np.uint8))
                Image.fromarray(written[track_id][2]).save(path, compress_level=0)  # all of one size
    return written


def assert_one_sentence(error: BaseException, *names: object) -> None:
    """A message for users is one sentence that names what is wrong."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".") or text.endswith("}")
    for name in names:
        assert str(name) in text, f"{name!r} is not in {text!r}"


def assert_clean_progress(notebook: nbformat.NotebookNode) -> None:
    """Each piece of work shows one line of progress, which says in the end how long it took."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    assert not re.findall(r"^.*(?:: starting|\d s left|\d%\|).*$", shown, re.MULTILINE)
    finished = re.findall(r"^(.+): \d+ \w+ in [\d.]+ s$", shown, re.MULTILINE)
    assert len(finished) == len(set(finished)), finished


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Work this small is faster on one thread, and much faster while other programs keep the cores busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """Undo what a shell does to jobs in the background: they and their children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _away_from_the_users_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("project")
        patch.setenv("FMA_NB_DATA", str(root / "data"))
        patch.setenv("FMA_NB_OUTPUTS", str(root / "outputs"))
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for the test, whose ``data/`` and ``outputs/`` the package uses."""
    monkeypatch.setenv("FMA_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FMA_NB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data/`` folder with 40 real MP3s in FMA's layout; copy it before changing anything."""
    data = tmp_path_factory.mktemp("tiny") / "data"
    rows = tiny_rows()
    write_tracks_csv(data / "raw" / "fma_metadata" / "tracks.csv", rows)

    def write_clip(i: int) -> Path:
        sample_rate, n_channels = FORMATS[min(i, len(FORMATS) - 1)]  # the last is quick to encode
        return write_mp3(mp3_path(data, rows[i]["track_id"]), music(i, sample_rate, n_channels), sample_rate)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_clip, range(len(rows))))
    return data


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """One MP3 for each sample rate and number of channels in `FORMATS`."""
    folder = tmp_path_factory.mktemp("clips")
    return {
        (rate, n): write_mp3(folder / f"{rate}_{n}.mp3", music(rate, rate, n), rate) for rate, n in FORMATS
    }


def fma_nb(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "fma_nb", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@dataclass(frozen=True)
class WholeRun:
    """The main job, done once for all tests: where its outputs lie, how it ended, how to call it again."""

    outputs: Path
    done: subprocess.CompletedProcess[str]
    again: Callable[[], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """All five notebooks on fma_mini, one epoch and one seed, no planted effect, in a folder of their own."""
    data, outputs = project_root() / "data", tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        make_fma_mini()
    command = (
        "run",
        "--run",
        "tiny",
        "--device",
        "cpu",
        "-p",
        "epochs",
        "1",
        "-p",
        "n_seeds",
        "1",
        "-p",
        "planted_rounds",
        "0",
    )
    run = partial(fma_nb, *command, FMA_NB_DATA=str(data), FMA_NB_OUTPUTS=str(outputs))
    return WholeRun(outputs, run(), run)


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real data that the environment names; see the reason when it does not."""
    folder = os.environ.get("FMA_NB_REAL")
    if not folder:
        pytest.skip("FMA_NB_REAL is not set: it names a folder with real FMA data")
    return Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device"))
