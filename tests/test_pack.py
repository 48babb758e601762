"""Stage 4: the pack holds exactly the PNGs' pixels, and follows them when they change."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_sentence, write_png_tree
from PIL import Image

from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack
from fma_nb.metadata import GENRES
from fma_nb.project import FmaNbError, spectrogram_dir

COUNTS = {"train": 3, "val": 2, "test": 1}
Tree = dict[int, tuple[str, str, np.ndarray]]


@pytest.fixture
def folder(project: Path) -> Path:  # noqa: ARG001 (it moves data/)
    return spectrogram_dir("fma_small", "compact")


@pytest.fixture
def tree(folder: Path) -> Tree:
    """A tree of PNGs that somebody else made: no ``mel.json`` beside them."""
    return write_png_tree(folder, COUNTS)


def load() -> Pack:
    return load_pack("fma_small", "compact")


def png(folder: Path, tree: Tree, track_id: int) -> Path:
    split, genre, _ = tree[track_id]
    return folder / split / genre / f"{track_id:06d}.png"


def assert_pack_holds(pack: Pack, tree: Tree) -> None:
    found = {
        int(track_id): (name, pack.genres[label], image)
        for name, split in pack.splits.items()
        for track_id, label, image in zip(split.track_ids, split.labels, split.images, strict=True)
    }
    assert found.keys() == tree.keys()
    for track_id, (split, genre, image) in tree.items():
        assert found[track_id][:2] == (split, genre)
        np.testing.assert_array_equal(found[track_id][2], image)


def test_the_pack_holds_the_pixels_of_the_pngs(tree: Tree) -> None:
    pack = load()
    assert_pack_holds(pack, tree)
    assert {name: len(split) for name, split in pack.splits.items()} == {"train": 24, "val": 16, "test": 8}
    assert pack.image_shape == (128, 32)
    assert pack.split("train").images.dtype == np.uint8


def test_labels_are_in_alphabetical_order(folder: Path) -> None:
    write_png_tree(folder, {"train": 1, "val": 1}, genres=["Rock", "Ambient", "Hip-Hop", "hip", "Blues"])
    assert load().genres == ("Ambient", "Blues", "Hip-Hop", "Rock", "hip")


def test_a_tree_without_a_test_split_is_enough(folder: Path) -> None:
    written = write_png_tree(folder, {"train": 2, "val": 1})
    assert_pack_holds(load(), written)


def test_real_images_of_another_maker(real: Path, folder: Path) -> None:
    expected = {}
    for archive in ("train_a", "val"):
        with zipfile.ZipFile(real / "fma_small_128x128" / f"fma_small_128x128_{archive}.zip") as file:
            for genre in GENRES:
                names = [name for name in file.namelist() if f"/{genre}/" in name and name.endswith(".png")]
                for name in names[:3]:
                    file.extract(name, folder)
                    with Image.open(folder / name) as image:
                        expected[int(Path(name).stem)] = (name.split("/")[0], genre, np.array(image))
    pack = load()
    assert pack.genres == GENRES
    assert_pack_holds(pack, expected)
    assert pack.splits["train"].images.shape == (24, 128, 128)


def test_reopening_changes_nothing(folder: Path, tree: Tree) -> None:
    first = load().fingerprint
    files = [folder / "pack" / name for name in ("pack.json", "train.npy", "val.npy", "test.npy")]
    before = [path.stat().st_mtime_ns for path in files]
    assert load().fingerprint == first
    assert [path.stat().st_mtime_ns for path in files] == before

    os.utime(png(folder, tree, min(tree)), ns=(0, 0))  # looked at again, and found the same
    assert load().fingerprint == first


def change_a_pixel(folder: Path, tree: Tree) -> None:
    _change_a_pixel_of(max(i for i, (split, _, _) in tree.items() if split == "val"), folder, tree)


def _change_a_pixel_of(track_id: int, folder: Path, tree: Tree) -> None:
    split, genre, image = tree[track_id]
    image = image.copy()
    image[3, 4] ^= 1
    path = png(folder, tree, track_id)
    size = path.stat().st_size
    Image.fromarray(image).save(path, compress_level=0)
    assert path.stat().st_size == size  # only the time tells
    tree[track_id] = (split, genre, image)


def add_a_track(folder: Path, tree: Tree) -> None:
    image = np.full((128, 32), 9, dtype=np.uint8)
    tree[999_999] = ("train", "Rock", image)
    Image.fromarray(image).save(png(folder, tree, 999_999))


def remove_a_track(folder: Path, tree: Tree) -> None:
    track_id = next(i for i, (split, _, _) in tree.items() if split == "train")
    png(folder, tree, track_id).unlink()
    del tree[track_id]


def move_a_track_to_another_genre(folder: Path, tree: Tree) -> None:
    track_id = next(i for i, (split, _, _) in tree.items() if split == "train")
    old = png(folder, tree, track_id)
    tree[track_id] = ("train", "Rock", tree[track_id][2])
    old.rename(png(folder, tree, track_id))


@pytest.mark.parametrize(
    "change", [change_a_pixel, add_a_track, remove_a_track, move_a_track_to_another_genre]
)
def test_the_pack_follows_the_pngs(folder: Path, tree: Tree, change: Callable[[Path, Tree], None]) -> None:
    before = load().fingerprint
    change(folder, tree)
    pack = load()
    assert pack.fingerprint != before
    assert_pack_holds(pack, tree)

    # The fingerprint tells of the data alone, not of how the pack came about.
    shutil.rmtree(folder / "pack")
    assert load().fingerprint == pack.fingerprint


def test_the_fingerprint_does_not_know_of_the_test_split(folder: Path, tree: Tree) -> None:
    """Opening the test split at the end must not look like other data to train on."""
    before = load().fingerprint
    _change_a_pixel_of(max(i for i, (split, _, _) in tree.items() if split == "test"), folder, tree)
    pack = load()
    assert_pack_holds(pack, tree)
    assert pack.fingerprint == before
    shutil.rmtree(folder / "test")
    assert load().fingerprint == before


@pytest.mark.usefixtures("tree")
def test_the_fingerprint_does_not_depend_on_the_place() -> None:
    first = load().fingerprint
    other = spectrogram_dir("fma_mini", "full")
    write_png_tree(other, COUNTS)
    assert load_pack("fma_mini", "full").fingerprint == first
    shutil.rmtree(other)
    write_png_tree(other, COUNTS, seed=1)
    assert load_pack("fma_mini", "full").fingerprint != first


def test_the_fingerprint_tells_of_a_label_alone(folder: Path) -> None:
    """A track changes its genre, and all tracks stay in the order in which they are packed."""
    for split, first in (("train", 1), ("val", 5)):
        for track_id, genre in enumerate(("Pop", "Pop", "Rock", "Rock"), first):
            path = folder / split / genre / f"{track_id:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (32, 128), track_id).save(path)
    before = load()
    (folder / "train" / "Pop" / "000002.png").rename(folder / "train" / "Rock" / "000002.png")
    after = load()
    np.testing.assert_array_equal(after.split("train").images, before.split("train").images)
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff\xfe\x00"])
def test_a_damaged_record_is_rebuilt(folder: Path, tree: Tree, content: bytes | None) -> None:
    first = load().fingerprint
    record = folder / "pack" / "pack.json"
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    pack = load()
    assert pack.fingerprint == first
    assert_pack_holds(pack, tree)


@pytest.mark.parametrize("name", ["train.npy", "val.csv"])
@pytest.mark.parametrize("n_bytes", [None, 0, 200])
def test_a_damaged_pack_is_rebuilt(folder: Path, tree: Tree, name: str, n_bytes: int | None) -> None:
    first = load().fingerprint
    path = folder / "pack" / name
    if n_bytes is None:
        path.unlink()
    else:
        os.truncate(path, n_bytes)
    pack = load()
    assert pack.fingerprint == first
    assert_pack_holds(pack, tree)


def test_a_shorter_clip_is_repeated(folder: Path, tree: Tree) -> None:
    track_id = next(i for i, (split, _, _) in tree.items() if split == "val")
    split, genre, image = tree[track_id]
    Image.fromarray(image[:, :12]).save(png(folder, tree, track_id))
    tree[track_id] = (split, genre, np.hstack([image[:, :12], image[:, :12], image[:, :8]]))
    assert_pack_holds(load(), tree)

    # And stays as wide as it is when another PNG changes.
    change_a_pixel(folder, tree)
    assert_pack_holds(load(), tree)


# ----- what is refused -----


def empty_the_train_split(folder: Path, _: Tree) -> tuple[str, ...]:
    shutil.rmtree(folder / "train")
    return ("'train'", str(folder / "train"))


def empty_the_val_split(folder: Path, _: Tree) -> tuple[str, ...]:
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    return ("'val'", str(folder / "val"))


def take_a_genre_out_of_val(folder: Path, _: Tree) -> tuple[str, ...]:
    shutil.rmtree(folder / "val" / "Folk")
    return ("'Folk'", str(folder / "val"))


def take_a_genre_out_of_test(folder: Path, _: Tree) -> tuple[str, ...]:
    shutil.rmtree(folder / "test" / "Pop")
    return ("'Pop'", str(folder / "test"))


def put_a_track_in_two_splits(folder: Path, tree: Tree) -> tuple[str, ...]:
    track_id = next(i for i, (split, _, _) in tree.items() if split == "train")
    shutil.copy(png(folder, tree, track_id), folder / "val" / "Rock")
    return (str(folder), f"track {track_id} ")


def mix_heights(folder: Path, tree: Tree) -> tuple[str, ...]:
    Image.new("L", (32, 64)).save(png(folder, tree, max(tree)))
    return (str(folder), "height")


def give_a_bad_name(folder: Path, tree: Tree) -> tuple[str, ...]:
    path = png(folder, tree, max(tree)).with_name("song.png")
    Image.new("L", (32, 32)).save(path)
    return (str(path),)


def give_a_name_without_zeros(folder: Path, tree: Tree) -> tuple[str, ...]:
    path = png(folder, tree, max(tree)).with_name("2.png")
    Image.new("L", (32, 32)).save(path)
    return (str(path), "000002.png")


def cut_a_png(folder: Path, tree: Tree) -> tuple[str, ...]:
    path = png(folder, tree, max(tree))
    path.write_bytes(path.read_bytes()[:-200])
    return (str(path),)


def write_text_as_png(folder: Path, tree: Tree) -> tuple[str, ...]:
    path = png(folder, tree, max(tree))
    path.write_text("not an image")
    return (str(path),)


def write_a_colour_png(folder: Path, tree: Tree) -> tuple[str, ...]:
    path = png(folder, tree, max(tree))
    Image.new("RGB", (32, 128), "red").save(path)
    return (str(path), "RGB")


def write_a_sliver(folder: Path, tree: Tree) -> tuple[str, ...]:
    Image.new("L", (3, 128)).save(png(folder, tree, max(tree)))
    return (str(folder), "frames")


@pytest.mark.parametrize(
    "damage",
    [
        empty_the_train_split,
        empty_the_val_split,
        take_a_genre_out_of_val,
        take_a_genre_out_of_test,
        put_a_track_in_two_splits,
        mix_heights,
        give_a_bad_name,
        give_a_name_without_zeros,
        cut_a_png,
        write_text_as_png,
        write_a_colour_png,
        write_a_sliver,
    ],
)
@pytest.mark.parametrize("packed_before", [False, True])
def test_a_bad_tree_is_one_clear_sentence(
    folder: Path, tree: Tree, damage: Callable[[Path, Tree], tuple[str, ...]], packed_before: bool
) -> None:
    if packed_before:
        load()
    names = damage(folder, tree)
    for _ in range(2):  # a failed build must not pass for a pack
        with pytest.raises(FmaNbError) as caught:
            load()
        assert_one_sentence(caught.value, *names)
    pack_dir = folder / "pack"
    assert not [p for p in folder.rglob("*.tmp") if p.is_relative_to(pack_dir)]


def test_no_spectrograms_at_all(folder: Path) -> None:
    with pytest.raises(FmaNbError) as caught:
        load()
    assert_one_sentence(caught.value, folder, "fma-nb spectrograms --dataset fma_small --preset compact")
    for dataset, preset in (("fma_tiny", "compact"), ("fma_small", "tiny")):
        with pytest.raises(FmaNbError, match=r"'fma_tiny'|'tiny'"):
            load_pack(dataset, preset)
    assert not folder.exists()


def test_files_of_other_programs_are_no_spectrograms(folder: Path, tree: Tree) -> None:
    (folder / "train" / "Rock" / ".000003.png.abc.tmp").write_bytes(b"half")
    (folder / "train" / "Rock" / "._000003.png").write_bytes(b"resource fork")
    (folder / "train" / "Thumbs.db").write_bytes(b"")
    (folder / "mel.json").write_text(json.dumps({"name": "compact"}))
    assert_pack_holds(load(), tree)
