"""Stage 4: splits by name, and batches that are the clips they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_sentence, track_row, write_png_tree, write_tracks_csv

from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack, SpectrogramDataset, make_loader, open_pack, to_input
from fma_nb.metadata import GENRES
from fma_nb.project import FmaNbError, spectrogram_dir


@pytest.fixture(scope="module")
def pack() -> Pack:
    """The pack of 24 and 16 clips, 128 x 48 pixels each, without a test split."""
    write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 3, "val": 2}, shape=(128, 48))
    load_pack("fma_small", "compact")
    return open_pack("fma_small", "compact")


def test_a_pack_knows_what_is_in_it(pack: Pack) -> None:
    assert (pack.dataset, pack.preset, pack.genres) == ("fma_small", "compact", GENRES)
    assert pack.image_shape == (128, 48)
    assert pack.fingerprint == load_pack("fma_small", "compact").fingerprint
    for name, n_clips in (("train", 24), ("val", 16)):
        split = pack.split(name)
        assert len(split) == len(split.track_ids) == n_clips
        assert split.images.shape == (n_clips, 128, 48)
        assert np.bincount(split.labels).tolist() == [n_clips // 8] * 8


def test_images_stay_on_the_disk_until_they_are_needed(pack: Pack) -> None:
    assert isinstance(pack.split("train").images, np.memmap)


def test_chosen_clips_keep_what_belongs_to_them(pack: Pack) -> None:
    split = pack.split("train")
    for chosen in (np.array([5, 2, 11]), split.labels == 3, slice(4, 9)):
        part = split.take(chosen)
        for field in ("images", "labels", "track_ids", "artists"):
            np.testing.assert_array_equal(getattr(part, field), getattr(split, field)[chosen])
    assert len(split.take(split.labels == 3)) == 3


def test_without_metadata_each_clip_is_its_own_artist(pack: Pack) -> None:
    artists = np.concatenate([pack.split(name).artists for name in ("train", "val")])
    assert len(set(artists)) == 40
    assert (artists < 0).all()  # no artist of FMA has such a number


def test_clips_know_their_artists_and_what_the_metadata_lacks_is_said_once(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 2, "val": 1})
    known = {track_id: 500 + i // 2 for i, track_id in enumerate(tree) if i > 2}
    rows = [track_row(i, tree[i][1], artist_id=artist) for i, artist in known.items()]
    write_tracks_csv(project / "data" / "raw" / "fma_metadata" / "tracks.csv", rows)
    capsys.readouterr()
    pack = load_pack("fma_small", "compact")
    assert capsys.readouterr().out.count("3 of 24 tracks are not in fma_small's metadata") == 1
    found = {int(i): int(a) for s in pack.splits.values() for i, a in zip(s.track_ids, s.artists, strict=True)}
    assert {i: artist for i, artist in found.items() if i in known} == known
    assert len(set(found.values()) - set(known.values())) == 3


def test_a_pack_whose_tracks_are_all_unknown_to_the_metadata_says_so(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 2, "val": 1})
    write_tracks_csv(project / "data" / "raw" / "fma_metadata" / "tracks.csv", [track_row(2, "Rock")])
    pack = load_pack("fma_small", "compact")
    assert "24 of 24 tracks are not in fma_small's metadata" in capsys.readouterr().out
    assert len({artist for split in pack.splits.values() for artist in split.artists}) == 24


def test_a_split_that_is_not_there_is_named(pack: Pack) -> None:
    with pytest.raises(FmaNbError) as caught:
        pack.split("test")
    assert_one_sentence(caught.value, "'test'", spectrogram_dir("fma_small", "compact") / "test")


def orders(pack: Pack, seed: int) -> list[list[bytes]]:
    """The first pixels of the clips of three epochs: which clip came when."""
    loader = make_loader(SpectrogramDataset(pack.split("train")), 5, shuffle=True, seed=seed)
    return [[image[0, :6].numpy().tobytes() for images, _ in loader for image in images] for _ in range(3)]


def test_the_order_depends_on_the_seed_alone(pack: Pack) -> None:
    torch.manual_seed(1)
    first = orders(pack, seed=0)
    torch.manual_seed(2)
    torch.rand(10)
    assert orders(pack, seed=0) == first
    assert orders(pack, seed=1) != first
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1])


def test_batches_equal_single_clips(pack: Pack) -> None:
    split = pack.split("train")
    loader = make_loader(SpectrogramDataset(split), 7)
    dataset = loader.dataset
    singles = [dataset[i] for i in range(len(split))]
    batches = list(loader)

    assert [len(labels) for _, labels in batches] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([x for x, _ in singles]))
    assert torch.equal(torch.cat([labels for _, labels in batches]), torch.stack([y for _, y in singles]))
    np.testing.assert_array_equal(torch.cat([images for images, _ in batches]).numpy(), split.images)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in batches]).numpy(), split.labels)

    shuffled = make_loader(SpectrogramDataset(split), 7, shuffle=True, seed=3)
    by_id = {image.numpy().tobytes(): int(label) for image, label in singles}
    for images, labels in shuffled:
        assert [by_id[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_grey_levels_become_numbers_from_0_to_1() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
    inputs = to_input(images)
    assert inputs.shape == (2, 1, 8, 16)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs[:, 0], torch.arange(256).reshape(2, 8, 16) / 255)
    assert images[1, 7, 15] == 255  # the pack itself stays as it was
