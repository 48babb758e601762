"""Data as users have them: unpacked in other ways, incomplete, read-only, or with files of other programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    assert_one_sentence,
    mp3_path,
    tiny_rows,
    track_row,
    tracks_csv_text,
    write_png_tree,
    write_tracks_csv,
)
from PIL import Image

from fma_nb.bulk.pack import load_pack
from fma_nb.bulk.spectrograms import make_spectrograms
from fma_nb.metadata import ERRATA, artist_groups, load_index
from fma_nb.project import FmaNbError, clip_path, metadata_dir, spectrogram_dir
from fma_nb.raw.clips import MiniConfig
from fma_nb.raw.mini import make_fma_mini

READ_ONLY = "setpriv", "--bounding-set=-dac_override,-dac_read_search"  # root may write everywhere


@pytest.fixture
def data(project: Path, tiny_data: Path) -> Path:
    shutil.copytree(tiny_data, project / "data")
    return project / "data"


@pytest.fixture
def made(data: Path) -> Path:  # noqa: ARG001 (it fills data/)
    """The tiny dataset with all its spectrograms there: pictures that somebody else made."""
    folder = spectrogram_dir("fma_small", "compact")
    for row in load_index("fma_small").tracks.itertuples():
        png = folder / row.split / row.genre / f"{row.track_id:06d}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((128, 128), row.track_id % 250, np.uint8)).save(png)
    return folder


def state(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def make() -> list[tuple[int, str]]:
    skipped = make_spectrograms("fma_small", "compact", workers=2, progress=False)
    return list(zip(skipped["track_id"], skipped["reason"], strict=True))


def as_reader(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code as somebody who may read these folders and write none of them."""
    user = READ_ONLY if os.getuid() == 0 else ()
    for folder in folders:
        subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    done = subprocess.run([*user, sys.executable, "-c", code], capture_output=True, text=True)
    for folder in folders:
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    return done


# ----- metadata -----


def test_the_broken_clips_are_those_of_fmas_wiki() -> None:
    assert sorted(ERRATA) == [98565, 98567, 98569, 99134, 108925, 133297]


def test_an_infinite_artist_is_one_sentence(data: Path) -> None:
    rows = tiny_rows()
    rows[7]["artist", "id"] = "inf"
    path = data / "raw" / "fma_metadata" / "tracks.csv"
    path.write_text(tracks_csv_text(rows))
    with pytest.raises(FmaNbError) as caught:
        load_index("fma_small")
    assert_one_sentence(caught.value, path, "artist.id")


@pytest.mark.usefixtures("project")
def test_without_metadata_each_clip_is_a_group_of_its_own() -> None:
    assert len(set(artist_groups("fma_small", [2, 3, 4, 5]))) == 4


def test_the_number_of_tracks_without_an_artist_is_said(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [track_row(2, "Rock", artist_id=70), track_row(5, "Rock", artist_id=70)]
    write_tracks_csv(project / "data" / "raw" / "fma_metadata" / "tracks.csv", rows)
    assert artist_groups("fma_small", [5, 2]) == [70, 70]
    assert capsys.readouterr().out == ""
    assert len(set(artist_groups("fma_small", [5, 2, 70, 71]))) == 3
    assert "2 of 4 tracks are not in fma_small's metadata" in capsys.readouterr().out


# ----- where an archive was unpacked -----


def one_level_too_deep(data: Path) -> None:
    for name in ("fma_small", "fma_metadata"):
        (data / "raw" / name).rename(data / "x")
        (data / "raw" / name).mkdir()
        (data / "x").rename(data / "raw" / name / name)


def flat(data: Path) -> None:
    for path in (data / "raw" / "fma_small").glob("*/*.mp3"):
        path.rename(data / "raw" / "fma_small" / path.name)
    for folder in (data / "raw" / "fma_small").glob("*/"):
        folder.rmdir()


def without_raw(data: Path) -> None:
    for path in (data / "raw").iterdir():
        path.rename(data / path.name)
    (data / "raw").rmdir()


def flat_and_too_deep_without_raw(data: Path) -> None:
    flat(data)
    one_level_too_deep(data)
    without_raw(data)


@pytest.mark.parametrize("layout", [one_level_too_deep, flat, without_raw, flat_and_too_deep_without_raw])
def test_an_archive_unpacked_another_way_is_read_where_it_is(
    data: Path, layout: Callable[[Path], None]
) -> None:
    layout(data)
    index = load_index("fma_small")
    assert len(index.tracks) == len(tiny_rows()) and index.dropped.empty
    assert clip_path("fma_small", 2).exists()
    assert clip_path("fma_mini", 2) == data / "raw" / "fma_mini" / "000" / "000002.mp3"
    assert metadata_dir("fma_mini") == data / "raw" / "fma_mini_metadata"


def test_what_was_found_instead_of_mp3s_is_said(data: Path) -> None:
    folder = data / "raw" / "fma_small"
    shutil.rmtree(folder)
    (folder / "some folder").mkdir(parents=True)
    with pytest.raises(FmaNbError) as caught:
        load_index("fma_small")
    assert_one_sentence(caught.value, folder, "some folder", "000/000002.mp3", "fma-nb download")


def test_missing_metadata_is_no_reason_to_download_the_mp3s_again(data: Path) -> None:
    shutil.rmtree(data / "raw" / "fma_metadata")
    with pytest.raises(FmaNbError, match="'fma-nb download metadata'"):
        load_index("fma_small")


# ----- incomplete datasets -----


def test_missing_mp3s_are_counted_before_the_work_which_goes_on(
    data: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = [row["track_id"] for row in tiny_rows()[::5]]  # a training clip of each genre: a fifth
    for track_id in lost:
        mp3_path(data, track_id).unlink()
    first = next(made.rglob("*.png"))
    first.unlink()
    skipped = make_spectrograms("fma_small", "compact", workers=1)
    assert capsys.readouterr().out.startswith("32 of 40 MP3s are there.\n")
    assert sorted(skipped["track_id"]) == lost
    assert set(skipped["reason"]) == {"file missing"}


def test_a_genre_that_lacks_its_clips_stops_the_work_before_it_begins(data: Path) -> None:
    mp3_path(data, tiny_rows()[3]["track_id"]).unlink()
    mp3_path(data, tiny_rows()[3]["track_id"]).symlink_to("nowhere.mp3")
    with pytest.raises(FmaNbError) as caught:
        make()
    assert_one_sentence(caught.value, "'val'", "'Electronic'", "39 of 40", "fma-nb download")
    assert not (data / "spectrograms").exists()
    skipped = make_spectrograms("fma_small", "compact", workers=1, partial=True)
    assert set(skipped["reason"]) == {"file missing"}


# ----- clips that were skipped -----


def lose_the_first_clip(data: Path, folder: Path) -> tuple[Path, Path]:
    """Return a clip's MP3 and PNG; the PNG has to be made."""
    png = folder / "train" / "Electronic" / "000002.png"
    png.unlink()
    return mp3_path(data, 2), png


def test_a_clip_is_tried_again_when_its_bytes_change_and_only_then(data: Path, made: Path) -> None:
    mp3, png = lose_the_first_clip(data, made)
    good = mp3.read_bytes()
    mp3.write_bytes(b"no music" * (len(good) // 8) + b"x" * (len(good) % 8))
    times = mp3.stat()
    assert make() == [(2, "not audio that libsndfile can decode")]
    listed = made / "skipped.csv"
    listed.write_text(listed.read_text().replace("not audio", "known as not audio"))
    os.utime(mp3)  # another time, the same bytes
    assert make()[0][1].startswith("known as")

    mp3.write_bytes(good)  # other bytes, the same size and time
    os.utime(mp3, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert make() == []
    assert png.exists()


def test_a_clip_that_could_not_be_opened_is_tried_again(data: Path, made: Path) -> None:
    mp3, png = lose_the_first_clip(data, made)
    mp3.chmod(0)
    code = (
        "from fma_nb.bulk.spectrograms import make_spectrograms as m;"
        "print(len(m('fma_small', 'compact', workers=1, progress=False)))"
    )
    done = as_reader(code)
    assert (done.stdout, png.exists()) == ("1\n", False), done.stderr
    mp3.chmod(0o644)
    assert make() == []
    assert png.exists()


def test_too_many_unreadable_clips_say_how_to_try_again(data: Path, made: Path) -> None:
    for row in tiny_rows()[:15:5]:
        mp3_path(data, row["track_id"]).write_bytes(b"")
    with pytest.raises(FmaNbError, match=r"3 of 40 clips cannot be read.*delete .*skipped\.csv"):
        make()
    assert len(list(made.rglob("*.png"))) == 40


# ----- folders of somebody else -----

USE = """
from fma_nb.bulk.pack import load_pack
from fma_nb.bulk.spectrograms import make_spectrograms
from fma_nb.project import FmaNbError
try:
    make_spectrograms("fma_small", "compact", progress=False)
    print(load_pack("fma_small", "compact").fingerprint)
except FmaNbError as error:
    print(error)
"""


def test_complete_data_are_used_without_writing(data: Path, made: Path) -> None:
    (made / "train" / "Rock" / ".000009.png.x.tmp").touch()
    fingerprint = load_pack("fma_small", "compact").fingerprint
    before = state(data)
    done = as_reader(USE, data)
    assert done.stdout == f"{fingerprint}\n", done.stderr
    assert state(data) == before


@pytest.mark.parametrize("missing", ["train/Rock", "pack"])
def test_what_cannot_be_written_is_one_sentence_before_any_work(data: Path, made: Path, missing: str) -> None:
    load_pack("fma_small", "compact")
    shutil.rmtree(made / missing)
    done = as_reader(USE, data)
    assert done.stdout.count("\n") == 1 and "cannot be written (Permission denied)" in done.stdout
    assert str(made) in done.stdout


def test_a_lock_of_somebody_else_is_one_sentence(data: Path, made: Path) -> None:
    load_pack("fma_small", "compact")
    (made / "pack" / "pack.json").unlink()
    done = as_reader(USE, made / "pack" / ".lock")
    assert f"{made / 'pack' / '.lock'} cannot be written" in done.stdout, (done.stderr, data)


@pytest.mark.usefixtures("project")
def test_a_complete_fma_mini_is_used_without_writing(project: Path) -> None:
    code = "from fma_nb.raw.mini import *; print(make_fma_mini({config}, workers=1, progress=False))"
    config = MiniConfig(artists_per_genre=5, tracks_per_artist=1)
    folder = make_fma_mini(config, workers=2, progress=False)
    done = as_reader(code.format(config=repr(config)), project / "data")
    assert done.stdout == f"{folder}\n", done.stderr


# ----- pictures of other kinds -----


@pytest.fixture
def tree(project: Path) -> Path:  # noqa: ARG001 (it moves data/)
    folder = spectrogram_dir("fma_small", "compact")
    write_png_tree(folder, {"train": 2, "val": 1}, shape=(128, 128))
    return folder


def pack() -> np.ndarray:
    return np.array(load_pack("fma_small", "compact").split("train").images)


def to_sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    mode: lambda image, mode=mode: image.convert(mode) for mode in ("RGB", "RGBA", "P", "LA")
} | {"I;16": to_sixteen_bits}


@pytest.mark.parametrize("mode", KINDS)
def test_grey_saved_in_another_way_is_converted_and_that_is_said_once(
    tree: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = pack()
    for path in tree.rglob("*/*/*.png"):
        with Image.open(path) as image:
            converted = KINDS[mode](image)
        converted.save(path)
    assert (pack() == expected).all()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "24 of 24 PNGs are not 8-bit grey and are converted" in said
    assert (pack() == expected).all()
    assert capsys.readouterr().out == ""


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


REFUSED = {
    "colours": noise(128, 128, 3),
    "see-through": noise(128, 128, 4),
    "64 bands": noise(64, 128),
    "256 bands": noise(256, 128),
    "all frames in compact": noise(128, 1292),
    "very wide": noise(128, 100_000),
    "a sliver": noise(128, 7),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_picture_that_does_not_fit_is_named(tree: Path, kind: str) -> None:
    path = sorted((tree / "train" / "Rock").glob("*.png"))[1]
    REFUSED[kind].save(path)
    with pytest.raises(FmaNbError) as caught:
        load_pack("fma_small", "compact")
    assert_one_sentence(caught.value, path)


def test_a_bomb_of_a_picture_is_named(tree: Path) -> None:
    path = next((tree / "train" / "Rock").glob("*.png"))
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(FmaNbError) as caught:
        load_pack("fma_small", "compact")
    assert_one_sentence(caught.value, path)


@pytest.mark.parametrize(("width", "said"), [(130, False), (64, False), (40, True)])
def test_trees_of_other_widths_are_used(
    project: Path, width: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png_tree(
        project / "data/spectrograms/fma_small-compact", {"train": 1, "val": 1}, shape=(128, width)
    )
    assert load_pack("fma_small", "compact").image_shape == (128, width)
    assert (f"at most {width} frames" in capsys.readouterr().out) == said


def test_links_to_nowhere_are_named(tree: Path) -> None:
    link = tree / "train" / "Rock" / "099999.png"
    link.symlink_to("../.git/annex/objects/x.png")
    with pytest.raises(FmaNbError) as caught:
        load_pack("fma_small", "compact")
    assert_one_sentence(caught.value, link, "git annex get", "dvc pull")


def test_a_track_twice_names_both_files(tree: Path) -> None:
    path = next((tree / "train" / "Rock").glob("*.png"))
    twin = shutil.copy(path, tree / "val" / "Folk")
    with pytest.raises(FmaNbError) as caught:
        load_pack("fma_small", "compact")
    assert_one_sentence(caught.value, path, twin)


def test_files_of_other_programs_are_no_pictures(tree: Path) -> None:
    expected = pack()
    rock = tree / "train" / "Rock"
    for folder in (tree / "train" / ".ipynb_checkpoints", rock / ".ipynb_checkpoints"):
        shutil.copytree(tree / "train" / "Pop", folder)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._000003.png"):
        (rock / name).write_bytes(b"\0\5\26\7")
        (tree / "train" / name).write_bytes(b"\0\5\26\7")
    (tree / "train" / "._Rock").write_bytes(b"\0\5\26\7")
    assert (pack() == expected).all()


def test_a_genre_of_one_clip_is_a_genre(project: Path) -> None:
    folder = spectrogram_dir("fma_small", "compact")
    write_png_tree(folder, {"train": 1, "val": 1}, genres=["Pop", "Rock"], shape=(128, 128))
    assert load_pack("fma_small", "compact").genres == ("Pop", "Rock"), project


def test_a_foreign_tree_gets_no_record_of_how_it_was_made(made: Path) -> None:
    assert make() == []
    assert not (made / "mel.json").exists()
    (made / "mel.json").write_text(json.dumps({"name": "full"}))
    with pytest.raises(FmaNbError, match="other settings"):
        make()
