"""What the tests of training share: tiny spectrograms, two recipes, and what a training leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_png_tree

from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack
from fma_nb.project import spectrogram_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.checkpoint import RunFiles, load_checkpoint, load_log
from fma_nb.runs.fit import fit

CPU = torch.device("cpu")
BASELINE = Recipe(epochs=3, batch_size=20)
CRNN = replace(default_recipe("crnn"), epochs=3, batch_size=20, warmup=0.2, width=0.25)


@pytest.fixture(scope="module", name="data")
def data_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data/`` folder with tiny spectrograms: 48 to train on, 24 to validate."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(folder))
        write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 6, "val": 3})
    return folder


@pytest.fixture(scope="module", name="pack")
def pack_fixture(data: Path) -> Pack:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        return load_pack("fma_small", "compact")


@pytest.fixture(scope="module", name="trained")
def trained_fixture(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFiles]:
    """A baseline and a CRNN, trained without interruption. Copy before changing anything."""
    root = tmp_path_factory.mktemp("trained")
    return {
        recipe.model: train(recipe, pack, root / recipe.model)
        for recipe in (replace(BASELINE, epochs=8, lr=3e-3), CRNN)
    }


def files_in(folder: Path) -> RunFiles:
    return RunFiles(folder / "m_best.pt", folder / "m_last.pt", folder / "m.csv")


def train(recipe: Recipe, pack: Pack, folder: Path) -> RunFiles:
    files = files_in(folder)
    fit(recipe, pack, files, CPU, progress=False)
    return files


def checkpoints(files: RunFiles) -> tuple[bytes, bytes]:
    return files.best.read_bytes(), files.last.read_bytes()


def epochs_in(files: RunFiles) -> list[int]:
    return load_log(files.log)["epoch"].tolist()


def weights(files: RunFiles) -> list[torch.Tensor]:
    state = load_checkpoint(files.last)["model_state"]
    return [value for name, value in state.items() if name.endswith("weight")]


def copy_of(files: RunFiles, folder: Path) -> RunFiles:
    shutil.copytree(files.best.parent, folder)
    return files_in(folder)


def batch(n_clips: int = 8, n_mels: int = 40, n_frames: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (n_clips, n_mels, n_frames), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n_clips)
