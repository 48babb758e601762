"""Stage 4, dataset: from the tree of PNGs to batches of a PyTorch ``DataLoader``.

The PNGs are the dataset; the pack is a cache of the same pixels, one memory-mapped array a split, so
that a batch is one gather instead of a hundred file reads. It is rebuilt by itself when a PNG is added,
changed or removed. On a GPU the whole pack lives in device memory and batches never leave it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from numpy.lib.format import write_array_header_1_0
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fma_nb.project import (
    SPLITS,
    FmaNbError,
    atomic_path,
    check_dataset,
    clear_temporaries,
    make_folder,
    spectrogram_dir,
)
from fma_nb.spectrogram import get_preset, png_name, png_path, read_png

PACK_VERSION = 2
MIN_FRAMES = 8
ROW_COLUMNS = ["track_id", "split", "genre", "n_frames", "size", "mtime_ns"]

Batch = tuple[Tensor, Tensor]
Identity = tuple[int, str, str, int, int]
Known = dict[Identity, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Split:
    """The clips of one split.

    Attributes
    ----------
    images
        Grey levels, highest band on top, uint8 [shape=(n_clips, n_mels, n_frames)], memory-mapped.
    labels
        Index into the pack's genres [shape=(n_clips,)].
    track_ids
        FMA's track ids [shape=(n_clips,)].
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    track_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.labels)


@dataclass(frozen=True)
class Pack:
    """The spectrograms of a dataset, ready for training.

    Attributes
    ----------
    dataset, preset
        What it was made from.
    genres
        The class names in the order of the labels: alphabetical, always.
    fingerprint
        SHA-256 over every pixel, track id and label of train and val: two runs with the same one were
        trained and chosen on the same data. A test split that is added later changes nothing in them.
    splits
        `Split` by name; only those whose folder exists.
    """

    dataset: str
    preset: str
    genres: tuple[str, ...]
    fingerprint: str
    splits: dict[str, Split]

    @property
    def n_frames(self) -> int:
        """Return the number of frames of every image."""
        return int(self.splits["train"].images.shape[2])

    def split(self, name: str) -> Split:
        """Return a split, or raise `FmaNbError` that says where its PNGs belong."""
        if name not in self.splits:
            folder = spectrogram_dir(self.dataset, self.preset) / name
            raise FmaNbError(f"split {name!r} is empty: {folder} holds no <Genre>/<track_id>.png.")
        return self.splits[name]


def load_pack(dataset: str, preset: str, needed: Sequence[str] = ("train", "val")) -> Pack:
    """Open the pack of a dataset's spectrograms, building it first where it is missing or stale.

    Parameters
    ----------
    needed
        The splits that must be there: training needs two, evaluating a trained network only its own.

    Raises
    ------
    FmaNbError
        When there are no spectrograms, a split or genre has none, a PNG is unreadable, or a track
        stands in two places.
    """
    check_dataset(dataset)
    get_preset(preset)
    folder = spectrogram_dir(dataset, preset)
    rows = scan_pngs(folder)
    _check_rows(rows, folder, dataset, preset, needed)
    pack_dir = folder / "pack"
    make_folder(pack_dir)
    with filelock.FileLock(pack_dir / ".lock"):
        record = _read_record(pack_dir)
        if record is None or record["state"] != _state_hash(rows):
            old = _known_images(pack_dir, record) if record else {}
            record = _build(rows, folder, pack_dir, old)
    genres = tuple(record["genres"])
    splits = {name: _open_split(pack_dir, name, genres) for name in record["splits"]}
    return Pack(dataset, preset, genres, record["fingerprint"], splits)


def scan_pngs(folder: Path) -> pd.DataFrame:
    """List the PNGs below a spectrogram folder: ``track_id, split, genre, size, mtime_ns``.

    Raises
    ------
    FmaNbError
        When a PNG's name is not a track id.
    """
    found: list[dict[str, Any]] = []
    for split in SPLITS:
        for genre_dir in sorted((folder / split).glob("*/")):
            for png in sorted(genre_dir.glob("[!.]*.png")):
                if not (png.stem.isdecimal() and png.name == png_name(int(png.stem))):
                    raise FmaNbError(f"{png}: a spectrogram is named after its track, as in 000002.png.")
                status = png.stat()
                found.append(
                    {
                        "track_id": int(png.stem),
                        "split": split,
                        "genre": genre_dir.name,
                        "size": status.st_size,
                        "mtime_ns": status.st_mtime_ns,
                    }
                )
    return pd.DataFrame(found, columns=["track_id", "split", "genre", "size", "mtime_ns"])


def _check_rows(rows: pd.DataFrame, folder: Path, dataset: str, preset: str, needed: Sequence[str]) -> None:
    if rows.empty:
        command = f"fma-nb spectrograms --dataset {dataset} --preset {preset}"
        raise FmaNbError(f"{folder} holds no spectrograms: make them with '{command}'.")
    if rows["track_id"].duplicated().any():
        twice = rows["track_id"][rows["track_id"].duplicated()].iloc[0]
        raise FmaNbError(f"{folder}: track {twice} has two PNGs: remove one of them.")
    for split in needed:
        if not (rows["split"] == split).any():
            raise FmaNbError(f"split {split!r} is empty: {folder / split} holds no PNG.")
    genres = set(rows["genre"])
    for split, group in rows.groupby("split"):
        for genre in sorted(genres - set(group["genre"])):
            raise FmaNbError(f"genre {genre!r} has no tracks in {folder / str(split)}.")


def _state_hash(rows: pd.DataFrame) -> str:
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()


def _read_record(pack_dir: Path) -> dict[str, Any] | None:
    """Return the record of a pack whose files are all there in full, else ``None``."""
    try:
        record: dict[str, Any] = json.loads((pack_dir / "pack.json").read_text())
        whole = record["version"] == PACK_VERSION and all(
            (pack_dir / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _build(rows: pd.DataFrame, folder: Path, pack_dir: Path, old: Known) -> dict[str, Any]:
    """Write the arrays and row tables, and last the record that makes them valid.

    PNGs that have not changed since the ``old`` pack are copied from it instead of being decoded.
    """
    (pack_dir / "pack.json").unlink(missing_ok=True)
    clear_temporaries(pack_dir)
    sizes = [_image_size(row, folder, old) for row in rows.itertuples()]
    if min(width for _, width in sizes) < MIN_FRAMES:
        raise FmaNbError(f"{folder}: a PNG has fewer than {MIN_FRAMES} frames: remove it.")
    if len({height for height, _ in sizes}) > 1:
        raise FmaNbError(f"{folder}: its PNGs differ in height: keep those of one preset only.")
    rows = rows.assign(n_frames=[width for _, width in sizes])[ROW_COLUMNS]
    height, width = sizes[0][0], max(width for _, width in sizes)
    genres = sorted(set(rows["genre"]))
    digest = hashlib.sha256(json.dumps([genres, height, width]).encode())
    fingerprint = digest.hexdigest()
    for split, group in rows.groupby("split", sort=False):  # in the order of SPLITS: test comes last
        with atomic_path(pack_dir / f"{split}.npy") as temporary:
            _write_images(temporary, group, folder, old, (len(group), height, width), digest)
        with atomic_path(pack_dir / f"{split}.csv") as temporary:
            group.to_csv(temporary, index=False)
        if split != "test":
            fingerprint = digest.hexdigest()
    splits = list(rows["split"].unique())
    record = {
        "version": PACK_VERSION,
        "state": _state_hash(rows.drop(columns="n_frames")),
        "fingerprint": fingerprint,
        "genres": genres,
        "splits": splits,
        "files": {name: (pack_dir / name).stat().st_size for name in _file_names(splits)},
    }
    with atomic_path(pack_dir / "pack.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    return record


def _write_images(
    path: Path,
    rows: pd.DataFrame,
    folder: Path,
    old: Known,
    shape: tuple[int, int, int],
    digest: hashlib._Hash,
) -> None:
    """Write one split's array image by image, as a plain ``.npy`` file that a full disk cannot corrupt."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        write_array_header_1_0(file, header)
        for row in rows.itertuples():
            known = old.get(_identity(row))
            image = read_png(_png_of(row, folder)) if known is None else known
            pixels = _fit_width(image, shape[2]).tobytes()
            digest.update(f"{row.track_id}/{row.split}/{row.genre}".encode())
            digest.update(pixels)
            file.write(pixels)


def _known_images(pack_dir: Path, record: dict[str, Any]) -> Known:
    """Return views of the images of a pack by the identity of the PNG each was read from."""
    known: Known = {}
    for split in record["splits"]:
        images = np.load(pack_dir / f"{split}.npy", mmap_mode="r")
        for i, row in enumerate(pd.read_csv(pack_dir / f"{split}.csv").itertuples()):
            known[_identity(row)] = images[i, :, : row.n_frames]
    return known


def _identity(row: Any) -> Identity:
    return (row.track_id, row.split, row.genre, row.size, row.mtime_ns)


def _png_of(row: Any, folder: Path) -> Path:
    return png_path(folder, row.split, row.genre, row.track_id)


def _image_size(row: Any, folder: Path, old: Known) -> tuple[int, int]:
    """Return height and width, from the header alone where the image is not known."""
    known = old.get(_identity(row))
    if known is not None:
        return known.shape[0], known.shape[1]
    path = _png_of(row, folder)
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError) as error:
        raise FmaNbError(f"{path} is not a readable PNG: remove it and make it again.") from error


def _file_names(splits: Sequence[str]) -> list[str]:
    return [f"{split}.{ending}" for split in splits for ending in ("npy", "csv")]


def _fit_width(image: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Repeat a shorter clip from its start up to ``width`` frames: music, not invented silence."""
    repeats = -(-width // image.shape[1])
    return np.tile(image, repeats)[:, :width]


def _open_split(pack_dir: Path, name: str, genres: tuple[str, ...]) -> Split:
    rows = pd.read_csv(pack_dir / f"{name}.csv")
    labels = np.array([genres.index(genre) for genre in rows["genre"]], dtype=np.int64)
    # Copy-on-write: PyTorch warns about read-only arrays, and nothing here writes.
    images = np.load(pack_dir / f"{name}.npy", mmap_mode="c")
    return Split(images, labels, rows["track_id"].to_numpy(np.int64, copy=True))


class SpectrogramDataset(Dataset[Batch]):
    """A split as a PyTorch dataset that hands out whole batches by index.

    Items are grey levels uint8 [shape=(n_mels, n_frames)] and the label; `to_input` turns a batch of
    them into what a model takes. With ``device`` on a GPU all images are kept there.
    """

    def __init__(self, split: Split, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self.images = torch.from_numpy(split.images).to(device)
        self.labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return one clip's image and label."""
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
    """Return a ``DataLoader`` over clips whose order depends on ``seed`` alone."""
    return DataLoader(
        clips,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_already_a_batch,
    )


def _already_a_batch(batch: Any) -> Any:
    return batch


def to_input(images: Tensor) -> Tensor:
    """Scale grey levels [shape=(batch, n_mels, n_frames)] to float [shape=(batch, 1, n_mels, n_frames)].

    0 is 80 dB below the clip's maximum, 1 is the maximum.
    """
    return images.unsqueeze(1).float().div_(255)
