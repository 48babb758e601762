"""The planted effect of notebook 05 in more seeds, longer, and beside the genres: a line a measurement.

    python benchmarks/planted_effect.py CSV [--dataset fma_mini] [--split test] [--run fma_mini]
        [--seeds 3] [--rounds 18]

Runs the notebook's own cells, those with the tag ``planted``, and adds to the CSV. ``accuracy`` is the share
of orders told right. Lines of the model ``genres`` give the mean accuracy of networks that were trained on
genres, on clips without and with calls: the CRNNs of ``--run``, or the shipped one where that is empty.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch
from torch import nn

from fma_nb import dataset as ds
from fma_nb import training
from fma_nb.bulk.pack import load_pack
from fma_nb.model import ShuffleFrames
from fma_nb.project import SHIPPED_WEIGHTS, project_root
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import load_model
from fma_nb.runs.experiment import trained_models

COLUMNS = (
    *("dataset", "split", "model", "strength", "seed", "steps", "accuracy"),
    *("genre_accuracy_plain", "genre_accuracy_planted"),
)
STRENGTHS = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 1.0)
# As in the notebook: the arguments of its train_on_calls.
CONTROLS = {"crnn": ("crnn",), "crnn_no_gru": ("crnn_no_gru",), "crnn_steps_shuffled": ("crnn", True)}
STEPS_A_ROUND = 20


def notebook_cells(**names: Any) -> dict[str, Any]:
    """Return the names that notebook 05 has after its cells with the tag ``planted``."""
    cells = nbformat.read(project_root() / "notebooks" / "05_comparison.ipynb", as_version=4).cells
    for cell in cells:
        if "planted" in cell.metadata.get("tags", ()):
            exec(cell.source, names)
    return names


def networks_for_genres(options: argparse.Namespace, pack: ds.Pack) -> list[nn.Module]:
    cpu = torch.device("cpu")
    if options.run:
        return list(trained_models(options.run, "crnn", pack, cpu))
    return [load_model(SHIPPED_WEIGHTS, "crnn", pack, cpu)]


def genre_accuracy(networks: list[nn.Module], clips: ds.Split) -> float:
    loader = ds.make_loader(ds.SpectrogramDataset(clips), 256)
    return float(np.mean([training.evaluate(network, loader, bfloat16=False)[1] for network in networks]))


def genre_lines(networks: list[nn.Module], cells: dict[str, Any]) -> Iterator[dict[str, Any]]:
    clips = cells["clips"]
    plain = genre_accuracy(networks, clips)
    for strength in STRENGTHS:
        calls = cells["plant"](clips.images, (strength, strength), np.random.default_rng(0))
        with_calls = genre_accuracy(networks, replace(calls, labels=np.tile(clips.labels, 2)))
        yield {
            "model": "genres",
            "strength": strength,
            "genre_accuracy_plain": round(plain, 4),
            "genre_accuracy_planted": round(with_calls, 4),
        }


def order_lines(options: argparse.Namespace, cells: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        cells["seed"] = seed
        for model in options.models.split(","):
            network, right = cells["train_on_calls"](*CONTROLS[model])
            print(model, seed, *(f"{share:.2f}" for share in right), flush=True)
            for strength in STRENGTHS:
                accuracy = round(cells["hears"](network, strength), 4)
                steps = STEPS_A_ROUND * options.rounds
                yield {
                    "model": model,
                    "strength": strength,
                    "seed": seed,
                    "steps": steps,
                    "accuracy": accuracy,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--dataset", default="fma_mini")
    parser.add_argument("--split", default="test")
    parser.add_argument("--run", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--models", default=",".join(CONTROLS), help="empty: only the genres")
    parser.add_argument("--genres", action="store_true", help="also measure the genres")
    options = parser.parse_args()
    training.make_deterministic()
    pack = load_pack(options.dataset, "compact")
    cells = notebook_cells(
        np=np,
        ds=ds,
        training=training,
        Recipe=Recipe,
        replace=replace,
        ShuffleFrames=ShuffleFrames,
        pack=pack,
        dataset=options.dataset,
        preset="compact",
        clips=pack.split(options.split),
        backgrounds=pack.split("train").images,
        planted_rounds=options.rounds,
        torch_device=torch.device("cpu"),
    )
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        given = {"dataset": options.dataset, "split": options.split}
        if options.genres:
            for line in genre_lines(networks_for_genres(options, pack), cells):
                writer.writerow(given | line)
        for line in order_lines(options, cells) if options.models else ():
            writer.writerow(given | line)
            file.flush()


if __name__ == "__main__":
    main()
