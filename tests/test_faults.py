"""The spectrogram stage and the pack under kills, full disks, broken audio and company.

The sizes fit into ``make test``; ``pytest -m slow tests/test_faults.py`` runs the full ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import (
    assert_one_sentence,
    mp3_path,
    music,
    tiny_rows,
    track_row,
    write_mp3,
    write_png_tree,
    write_tracks_csv,
)
from PIL import Image

from fma_nb.bulk.pack import load_pack
from fma_nb.bulk.spectrograms import make_spectrograms
from fma_nb.metadata import GENRES, load_index
from fma_nb.project import FmaNbError

WORKER_MB = 500
BULK = (
    "from fma_nb.bulk.spectrograms import make_spectrograms; "
    "make_spectrograms('fma_small', 'compact', workers=2, progress=False)"
)
MEASURED_BULK = f"""
import resource
from fma_nb.project import FmaNbError
try:
    {BULK}
except FmaNbError:
    pass  # more than 5 % unreadable: the list is written all the same
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""
PACK = "from fma_nb.bulk.pack import load_pack; load_pack('fma_small', 'compact')"


def start(code: str, data: Path) -> subprocess.Popen[str]:
    """Start Python in a process group of its own, so that its workers can be killed with it."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"FMA_NB_DATA": str(data)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def tree_hash(folder: Path, pattern: str) -> dict[str, str]:
    paths = sorted(p for p in folder.rglob(pattern) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def tiny_copy(tiny_data: Path, data: Path) -> Path:
    shutil.copytree(tiny_data / "raw", data / "raw")
    return data / "spectrograms" / "fma_small-compact"


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a small file system, or skip where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def run_undisturbed(code: str, data: Path) -> float:
    """Return how many seconds it took."""
    started = time.monotonic()
    process = start(code, data)
    assert process.wait() == 0, process.communicate()
    return time.monotonic() - started


def kill_often(code: str, data: Path, made: Path, times: int, longest: float) -> None:
    """Kill a command at random moments; what comes to its end before that is undone and does not count."""
    rng = random.Random(0)
    n_killed = 0
    while n_killed < times:
        process = start(code, data)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        if process.poll() is None:
            n_killed += 1
        else:
            shutil.rmtree(made)
        kill(process)


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_spectrogram_runs_end_in_the_same_bytes(project: Path, tiny_data: Path, times: int) -> None:
    undisturbed = tiny_copy(tiny_data, project / "calm")
    seconds = run_undisturbed(BULK, project / "calm")
    tree = tiny_copy(tiny_data, project / "data")
    kill_often(BULK, project / "data", tree, times, longest=seconds)
    make_spectrograms("fma_small", "compact", workers=2, progress=False)
    assert tree_hash(tree, "*.png") == tree_hash(undisturbed, "*.png")
    assert not list(tree.rglob("*.tmp"))


@pytest.mark.parametrize("times", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_packing_ends_in_the_same_pack(project: Path, times: int) -> None:
    for name in ("calm", "data"):
        write_png_tree(
            project / name / "spectrograms" / "fma_small-compact", {"train": 60, "val": 4}, shape=(128, 128)
        )
    packs = [project / name / "spectrograms" / "fma_small-compact" / "pack" for name in ("calm", "data")]
    seconds = run_undisturbed(PACK, project / "calm")
    kill_often(PACK, project / "data", packs[1], times, longest=seconds)
    load_pack("fma_small", "compact")
    assert tree_hash(packs[1], "*.npy") == tree_hash(packs[0], "*.npy")
    assert not list(packs[1].glob(".*.tmp"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_afterwards(project: Path, tiny_data: Path) -> None:
    tree = tiny_copy(tiny_data, project / "data")
    with small_disk(tree, "size=100k"):
        with pytest.raises(FmaNbError) as caught:
            make_spectrograms("fma_small", "compact", workers=2, progress=False)
        assert_one_sentence(caught.value, "make space")
        finished = list(tree.rglob("*.png"))
        for png in finished:
            assert Image.open(png).size == (128, 128)
        before = {png: png.stat().st_mtime_ns for png in finished}
        subprocess.run(["mount", "-o", "remount,size=10m", tree], check=True)
        make_spectrograms("fma_small", "compact", workers=2, progress=False)
        assert len(list(tree.rglob("*.png"))) == len(tiny_rows())
        assert before == {png: png.stat().st_mtime_ns for png in before}


def test_a_read_only_data_folder_is_one_sentence(project: Path, tiny_data: Path) -> None:
    with small_disk(project / "data", "size=40m"):
        tree = tiny_copy(tiny_data, project / "data")
        subprocess.run(["mount", "-o", "remount,ro", project / "data"], check=True)
        with pytest.raises(FmaNbError) as caught:
            make_spectrograms("fma_small", "compact", progress=False)
        assert_one_sentence(caught.value, tree.parent.name)


def test_paths_with_spaces_and_other_alphabets(
    project: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = project / "Musik für 音楽 ordner"
    tiny_copy(tiny_data, data)
    monkeypatch.setenv("FMA_NB_DATA", str(data))
    assert make_spectrograms("fma_small", "compact", progress=False).empty
    assert len(load_pack("fma_small", "compact").split("train")) == 24


def test_two_runs_at_once_do_the_work_once(project: Path, tiny_data: Path) -> None:
    tree = tiny_copy(tiny_data, project / "data")
    first, second = start(BULK, project / "data"), start(BULK, project / "data")
    assert first.wait() == second.wait() == 0, (first.communicate(), second.communicate())
    assert len(list(tree.rglob("*.png"))) == len(tiny_rows())
    assert not list(tree.rglob("*.tmp"))


def test_a_pack_that_another_run_is_writing_is_left_alone(project: Path, tiny_data: Path) -> None:
    """Once the last PNG is there, another run may pack, while the first one still tidies up."""
    tree = tiny_copy(tiny_data, project / "data")
    half_packed, half_made = tree / "pack" / ".train.npy.x.tmp", tree / "train" / ".000003.png.x.tmp"
    for temporary in (half_packed, half_made):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    make_spectrograms("fma_small", "compact", workers=2, progress=False)
    assert half_packed.exists() and not half_made.exists()


def test_a_worker_that_is_killed_costs_no_clip(project: Path, tiny_data: Path) -> None:
    """Kill the workers, not the parent: the pool starts new ones, and the run ends in order."""
    tree = tiny_copy(tiny_data, project / "data")
    process = start(BULK, project / "data")
    while process.poll() is None and not list(tree.rglob("*.png")):
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True
    )
    for child in children.stdout.split()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(list(tree.rglob("*.png"))) == len(tiny_rows())
    assert (tree / "skipped.csv").read_text().count("\n") == 1


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 10, 200))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutants(content: bytes, others: list[bytes], n: int) -> Iterator[tuple[str, bytes]]:
    """Yield ``n`` damaged versions of an MP3, each with the kind of damage."""
    rng = random.Random(0)
    kinds = {
        "bits flipped": lambda: flip_bits(content, rng),
        "cut": lambda: content[: rng.randrange(len(content))],
        "hole": lambda: (
            content[: (i := rng.randrange(len(content)))] + bytes(rng.randrange(9000)) + content[i:]
        ),
        "concatenated": lambda: content[: rng.randrange(len(content))] + content,
        "ID3 garbage": lambda: (
            b"ID3\x04\x00\x00" + rng.randbytes(4) + rng.randbytes(rng.randrange(3000)) + content
        ),
        "head flipped": lambda: flip_bits(content[:400], rng) + content[400:],
        "noise": lambda: rng.randbytes(rng.randrange(1, 60_000)),
        "another format": lambda: rng.choice(others),
        "zero bytes": lambda: bytes(rng.randrange(0, 40_000)),
    }
    for i in range(n):
        kind = list(kinds)[i % len(kinds)]
        yield kind, kinds[kind]()


def other_formats(folder: Path) -> list[bytes]:
    """A WAV, a PNG, 8 kHz mono, six channels, and a very long silence, all to be named .mp3."""
    paths = [folder / name for name in ("a.wav", "six.flac", "8k.mp3", "long.flac", "image.png")]
    sf.write(paths[0], music(1, 22_050, 2), 22_050)
    sf.write(paths[1], music(2, 22_050, 6), 22_050)
    write_mp3(paths[2], music(3, 8_000, 1), 8_000)
    with sf.SoundFile(paths[3], "w", samplerate=8_000, channels=1) as file:
        file.write(music(4, 8_000, 1)[:, 0])
        for _ in range(8 * 60):
            file.write(np.zeros(8_000 * 60, dtype=np.float32))
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(paths[4])
    return [path.read_bytes() for path in paths]


@pytest.mark.parametrize("n_mutants", [90, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_clips_end_as_a_spectrogram_or_in_the_list(project: Path, n_mutants: int) -> None:
    source = write_mp3(project / "source.mp3", music(0, 44_100, 2), 44_100)
    rows, written = [], {}
    for i, (_, content) in enumerate(mutants(source.read_bytes(), other_formats(project), n_mutants)):
        track_id = 2 + i
        split = ("training", "training", "validation", "test")[(i // 8) % 4]
        rows.append(track_row(track_id, GENRES[i % 8], split))
        path = mp3_path(project / "data", track_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written[track_id] = path
    write_tracks_csv(project / "data" / "raw" / "fma_metadata" / "tracks.csv", rows)
    process = start(MEASURED_BULK, project / "data")
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert int(printed) < WORKER_MB
    tree = project / "data" / "spectrograms" / "fma_small-compact"
    made = {int(png.stem) for png in tree.rglob("*.png")}
    listed = {int(line.split(",")[0]) for line in (tree / "skipped.csv").read_text().splitlines()[1:]}
    dropped = set(load_index("fma_small").dropped["track_id"])
    assert made | listed | dropped == set(written)
    assert not made & listed and not made & dropped
    assert len(made) > n_mutants / 4
    for png in tree.rglob("*.png"):
        assert Image.open(png).size == (128, 128)
