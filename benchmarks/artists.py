"""How many artists a split and a genre have, and as how many they count: n² / Σ nᵢ².

    python benchmarks/artists.py fma_small OUT.csv

Needs FMA's metadata alone. FMA's broken clips are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from fma_nb.evaluation import effective_artists
from fma_nb.metadata import ERRATA, dataset_rows, read_tracks
from fma_nb.project import SPLITS, metadata_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = dataset_rows(read_tracks(metadata_dir(options.dataset) / "tracks.csv"), options.dataset)
    rows = rows[~rows["track_id"].isin(ERRATA)]
    lines = []
    for split in (*SPLITS, "train and val"):
        of_split = rows[rows["split"].isin(split.split(" and "))]
        groups = [("all", of_split), *of_split.groupby("genre")]
        for genre, group in groups:
            sizes = group["artist_id"].value_counts()
            line = {"split": split, "genre": genre, "clips": len(group), "artists": len(sizes)}
            line["effective_artists"] = round(effective_artists(group["artist_id"].tolist()), 1)
            lines.append(line | {"clips_of_the_largest": int(sizes.iloc[0])})
    table = pd.DataFrame(lines)
    table.to_csv(options.out, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
