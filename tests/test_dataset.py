"""Stage 4: splits by name, and batches that are the clips they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import assert_one_sentence, write_png_tree

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
