"""Do two views of the same clips gain together? The mean of two runs' log-probabilities, fold by fold.

    python benchmarks/two_views.py fma_small first3s OUT.csv

Both runs need the row `final` of `fma-nb ablate --folds 5` on the same tracks. The lines are the first run
alone, the second run alone, and both together; differences are from the first line.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fma_nb.evaluation import Metrics
from fma_nb.runs.ablation import FINAL, finished_rows
from fma_nb.runs.tables import comparison_table, write_table


def both(first: Metrics, second: Metrics) -> Metrics:
    """Answer by the mean of the log-probabilities of the networks that both left a clip out."""
    probabilities = [metrics["seeds"][0]["val"]["probabilities"] for metrics in (first, second)]
    logs = {i: np.log(np.maximum([p[i] for p in probabilities], 1e-4)).mean(0) for i in probabilities[0]}
    answers = {i: first["genres"][int(log.argmax())] for i, log in logs.items()}
    folds = {k: v for k, v in first.items() if k != "folds"}
    labels = first["labels"]["val"]
    confidence = {i: (np.exp(log) / np.exp(log).sum()).tolist() for i, log in logs.items()}
    result = {"predictions": answers, "probabilities": confidence}
    result |= {name: np.nan for name in ("accuracy", "artist_balanced_accuracy")}
    return folds | {"seeds": [{"seed": 0, "val": result}], "labels": {"val": labels}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    first, second = (finished_rows(run, 5)[FINAL] for run in options.runs)
    assert set(first["labels"]["val"]) == set(second["labels"]["val"])
    names = (*options.runs, "both")
    found = dict(zip(names, (first, second, both(first, second)), strict=True))
    table = comparison_table(found, options.runs[0], "val")
    write_table(options.out, table)
    print(table.T.to_string())


if __name__ == "__main__":
    main()
