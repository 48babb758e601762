"""Stage 4, dataset: from the pack of a dataset's spectrograms to batches of a PyTorch ``DataLoader``.

The PNGs are the dataset; the pack is a cache of the same pixels, one memory-mapped array a split, so
that a batch is one gather instead of a hundred file reads. `fma_nb.bulk.pack` builds it. On a GPU the
whole pack lives in device memory and batches never leave it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fma_nb.metadata import artist_groups
from fma_nb.project import FmaNbError, spectrogram_dir

MIN_FRAMES = 8  # the baseline halves the frames three times

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """The clips of one split: images [shape=(n_clips, n_mels, n_frames)], the rest [shape=(n_clips,)]."""

    images: npt.NDArray[np.uint8]  # grey levels, highest band on top, memory-mapped
    labels: npt.NDArray[np.int64]  # index into the pack's genres
    track_ids: npt.NDArray[np.int64]  # FMA's
    artists: npt.NDArray[np.int64]  # from `fma_nb.metadata.artist_groups`

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: npt.NDArray[Any] | slice) -> "Split":
        """Return the clips of an index: a slice, places or a mask."""
        return Split(self.images[chosen], self.labels[chosen], self.track_ids[chosen], self.artists[chosen])


@dataclass(frozen=True)
class Pack:
    """The spectrograms of a dataset, made by a preset and ready for training.

    Its fingerprint is the SHA-256 over every pixel, track id and label of train and val: two runs with the
    same one were trained and chosen on the same data. A test split that is added later does not change it.
    """

    dataset: str
    preset: str
    genres: tuple[str, ...]  # the class names in the order of the labels: alphabetical, always
    fingerprint: str
    splits: dict[str, Split]  # by name; only those whose folder exists

    @property
    def image_shape(self) -> tuple[int, int]:
        """Return the size of every image: mel bands and frames."""
        _, n_mels, n_frames = next(iter(self.splits.values())).images.shape
        return n_mels, n_frames

    def split(self, name: str) -> Split:
        """Return a split, or raise `FmaNbError` that says where its PNGs belong."""
        if name not in self.splits:
            folder = spectrogram_dir(self.dataset, self.preset) / name
            raise FmaNbError(f"split {name!r} is empty: {folder} holds no <Genre>/<track_id>.png.")
        return self.splits[name]


def open_pack(dataset: str, preset: str) -> Pack:
    """Open the pack that `fma_nb.bulk.pack` has built; no pixel is read before it is needed."""
    pack_dir = spectrogram_dir(dataset, preset) / "pack"
    record = json.loads((pack_dir / "pack.json").read_text())
    genres = tuple(record["genres"])
    rows = {name: pd.read_csv(pack_dir / f"{name}.csv", keep_default_na=False) for name in record["splits"]}
    track_ids = [track_id for table in rows.values() for track_id in table["track_id"].tolist()]
    artists = dict(zip(track_ids, artist_groups(dataset, track_ids), strict=True))
    splits = {name: _open_split(pack_dir / f"{name}.npy", rows[name], genres, artists) for name in rows}
    return Pack(dataset, preset, genres, record["fingerprint"], splits)


def _open_split(path: Path, rows: pd.DataFrame, genres: tuple[str, ...], artists: dict[int, int]) -> Split:
    labels = np.array([genres.index(genre) for genre in rows["genre"]], dtype=np.int64)
    # Copy-on-write: PyTorch warns about read-only arrays, and nothing here writes.
    images = np.load(path, mmap_mode="c")
    track_ids = rows["track_id"].to_numpy(np.int64, copy=True)
    return Split(images, labels, track_ids, rows["track_id"].map(artists).to_numpy(np.int64, copy=True))


class SpectrogramDataset(Dataset[Batch]):
    """A split as a PyTorch dataset; an item is a grey image uint8 [shape=(n_mels, n_frames)] and its label.

    `make_loader` makes batches of it: a ``DataLoader`` calls ``__getitems__`` for a whole batch, so that
    nothing is left to collate. `to_input` turns a batch into what a model takes. With ``device`` on a GPU
    all images are kept there.
    """

    def __init__(self, split: Split, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch with one gather: images [shape=(batch, n_mels, n_frames)], labels."""
        chosen = torch.tensor(indices)
        if self.labels.is_cuda:  # from pageable memory the copy would wait for the GPU in every step
            chosen = chosen.pin_memory().to(self.labels.device, non_blocking=True)
        return self.images[chosen], self.labels[chosen]


def make_loader(
    clips: SpectrogramDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0
) -> DataLoader[Batch]:
    """Return a ``DataLoader`` over clips whose order depends on the seed and on the passes before."""
    return DataLoader(
        clips,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda batch: batch,  # it is one already
    )


def to_input(images: Tensor) -> Tensor:
    """Scale grey levels [shape=(batch, n_mels, n_frames)] to float [shape=(batch, 1, n_mels, n_frames)].

    0 is 80 dB below the clip's maximum, 1 is the maximum.
    """
    return images.unsqueeze(1).float().div_(255)
