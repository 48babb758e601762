"""The builder of the pack: every pixel of a tree of PNGs in one memory-mapped array a split.

The pack is a cache: it is rebuilt by itself when a PNG is added, changed or removed. `fma_nb.dataset`
reads it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.lib.format import write_array_header_1_0
from PIL import Image

from fma_nb.bulk.folders import clear_temporaries, locked
from fma_nb.dataset import MIN_FRAMES, Pack, open_pack
from fma_nb.project import SPLITS, FmaNbError, atomic_path, check_dataset, spectrogram_dir, write_text
from fma_nb.spectrogram import Preset, get_preset, png_name, png_path, read_png

PACK_VERSION = 2
FRAMES_OF_A_CLIP = 1292  # 30 s, all frames kept
ROW_COLUMNS = ["track_id", "split", "genre", "n_frames", "size", "mtime_ns"]


def load_pack(dataset: str, preset: str, needed: Sequence[str] = ("train", "val")) -> Pack:
    """Open the pack of a dataset's spectrograms, building it first where it is missing or stale.

    The splits in ``needed`` must be there: training needs two, evaluating a trained network only its own.
    `FmaNbError` tells of a split or genre without PNGs, a PNG that cannot be used, or a track with two.
    """
    check_dataset(dataset)
    settings = get_preset(preset)
    folder = spectrogram_dir(dataset, preset)
    rows = scan_pngs(folder)
    _check_rows(rows, folder, dataset, preset, needed)
    pack_dir, state = folder / "pack", hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()
    if not _is_current(pack_dir, state):  # what is complete may be somebody else's: it is not even locked
        with locked(pack_dir):
            if not _is_current(pack_dir, state):
                _build(rows, state, folder, settings)
    return open_pack(dataset, preset)


def scan_pngs(folder: Path) -> pd.DataFrame:
    """List the PNGs below a spectrogram folder: ``track_id, split, genre, size, mtime_ns``."""
    found = []
    for split in SPLITS:
        for png in sorted((folder / split).glob("[!.]*/[!.]*.png")):
            if not (png.stem.isdecimal() and png.name == png_name(int(png.stem))):
                raise FmaNbError(f"{png}: a spectrogram is named after its track, as in 000002.png.")
            try:
                status = png.stat()
            except OSError as error:
                is_link = png.is_symlink()
                cause = "is a link to a file that was not fetched" if is_link else f"is {error.strerror}"
                raise FmaNbError(f"{png} {cause}: get it (git annex get, dvc pull), or remove it.") from error
            found.append((int(png.stem), split, png.parent.name, status.st_size, status.st_mtime_ns))
    return pd.DataFrame(found, columns=["track_id", "split", "genre", "size", "mtime_ns"])


def _check_rows(rows: pd.DataFrame, folder: Path, dataset: str, preset: str, needed: Sequence[str]) -> None:
    if rows.empty:
        command = f"fma-nb spectrograms --dataset {dataset} --preset {preset}"
        raise FmaNbError(f"{folder} holds no spectrograms: make them with '{command}'.")
    twice = rows[rows["track_id"].duplicated(keep=False)].sort_values("track_id", kind="stable")
    if len(twice):
        first, second = (png_path(folder, r.split, r.genre, r.track_id) for r in twice.head(2).itertuples())
        raise FmaNbError(f"track {twice['track_id'].iloc[0]} has two PNGs, {first} and {second}: remove one.")
    for split in sorted(set(needed) - set(rows["split"])):
        raise FmaNbError(f"split {split!r} is empty: {folder / split} holds no PNG.")
    for split, group in rows.groupby("split"):
        for genre in sorted(set(rows["genre"]) - set(group["genre"])):
            raise FmaNbError(f"genre {genre!r} has no tracks in {folder / str(split)}.")


def _is_current(pack_dir: Path, state: str) -> bool:
    """Tell whether a pack was made from PNGs in this state and its files are all there in full."""
    try:
        record = json.loads((pack_dir / "pack.json").read_text())
        sizes = {name: (pack_dir / name).stat().st_size for name in record["files"]}
        return record["version"] == PACK_VERSION and record["state"] == state and record["files"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(rows: pd.DataFrame, state: str, folder: Path, preset: Preset) -> None:
    """Write the arrays and row tables, and last the record that makes them valid."""
    pack_dir = folder / "pack"
    (pack_dir / "pack.json").unlink(missing_ok=True)
    clear_temporaries(pack_dir)
    pngs = [png_path(folder, row.split, row.genre, row.track_id) for row in rows.itertuples()]
    widths = _checked_widths(pngs, preset)
    shape = preset.n_mels, max(widths)
    genres, splits = sorted(set(rows["genre"])), list(rows["split"].unique())
    digest = hashlib.sha256(json.dumps([genres, *shape]).encode())
    fingerprint = digest.hexdigest()
    table = rows.assign(n_frames=widths, png=pngs)
    for split, group in table.groupby("split", sort=False):  # in the order of SPLITS: test comes last
        with atomic_path(pack_dir / f"{split}.npy") as temporary:
            _write_images(temporary, group, (len(group), *shape), digest)
        with atomic_path(pack_dir / f"{split}.csv") as temporary:
            group[ROW_COLUMNS].to_csv(temporary, index=False)
        if split != "test":
            fingerprint = digest.hexdigest()
    files = [f"{split}.{ending}" for split in splits for ending in ("npy", "csv")]
    record = {
        "version": PACK_VERSION,
        "state": state,
        "fingerprint": fingerprint,
        "genres": genres,
        "splits": splits,
        "files": {name: (pack_dir / name).stat().st_size for name in files},
    }
    write_text(pack_dir / "pack.json", json.dumps(record, indent=2) + "\n")


def _checked_widths(pngs: list[Path], preset: Preset) -> list[int]:
    """Return the PNGs' widths after looking at their headers; tell of what is unusual and can be used."""
    widths, converted = [], []
    expected = preset.n_frames or FRAMES_OF_A_CLIP
    for png in pngs:
        try:
            with Image.open(png) as image:  # this reads the header alone
                height, width, mode = image.height, image.width, image.mode
        except PermissionError as error:
            raise FmaNbError(f"{png} cannot be read: you have no permission to read it.") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise FmaNbError(f"{png} is not a readable PNG: remove it and make it again.") from error
        if height != preset.n_mels or not MIN_FRAMES <= width <= 2 * expected:
            raise FmaNbError(
                f"{png} has a height of {height} bands and {width} frames, preset {preset.name!r} has "
                f"{preset.n_mels} and {expected}: make it anew, or remove it."
            )
        widths.append(width)
        converted += [f"{png} is {mode}"] * (mode != "L")
    if converted:
        print(f"{len(converted)} of {len(pngs)} PNGs are not 8-bit grey and are converted ({converted[0]}).")
    if 2 * max(widths) < expected:
        print(f"The PNGs have at most {max(widths)} frames, preset {preset.name!r} has {expected}.")
    return widths


def _write_images(path: Path, rows: pd.DataFrame, shape: tuple[int, ...], digest: "hashlib._Hash") -> None:
    """Write one split's array image by image, as a plain ``.npy`` file that a full disk cannot corrupt."""
    with path.open("wb") as file:
        write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for row in rows.itertuples():
            image = read_png(row.png)[:, : shape[2]]
            # A shorter clip is repeated from its start: zeros would add a silence.
            pixels = np.pad(image, ((0, 0), (0, shape[2] - image.shape[1])), mode="wrap").tobytes()
            digest.update(f"{row.track_id}/{row.split}/{row.genre}".encode())
            digest.update(pixels)
            file.write(pixels)
