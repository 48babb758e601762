"""Differences between rows that the fold tables do not hold, and what one band does to the test split.

    python benchmarks/differences.py

Reads the answers in assets/results/ and FMA's metadata; writes differences.csv and band.csv there.
"""

from __future__ import annotations

import pandas as pd

from fma_nb.evaluation import paired_difference
from fma_nb.metadata import dataset_rows, read_tracks
from fma_nb.project import metadata_dir, project_root

RESULTS = project_root() / "assets" / "results"
STEPS = (
    ("folds_compact", "baseline_with_recipe", "baseline"),
    ("folds_compact", "no_gru", "baseline_with_recipe"),
    ("folds_compact", "final", "no_gru"),
    ("folds_compact", "no_gru", "shuffled"),
    ("folds_first3s", "final", "no_gru"),
    ("folds_first3s", "no_gru", "shuffled"),
    ("evaluation_val", "final", "no_gru"),
    ("evaluation_test", "final", "no_gru"),
)


def right_answers(source: str, row: str, tracks: pd.DataFrame) -> pd.DataFrame:
    """Return which tracks a row has right, the mean of its seeds [shape=(1, n_tracks)]."""
    answers = pd.read_csv(RESULTS / f"{source}_answers.csv").set_index("track_id")
    number = {genre: i for i, genre in enumerate(sorted(tracks["genre"].unique()))}
    labels = tracks.loc[answers.index, "genre"].map(number)
    seeds = [name for name in answers if name == row or name.startswith(f"{row}_seed")]
    return answers[seeds].eq(labels, axis=0).mean(axis=1).to_frame().T


def differences(tracks: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for source, first, second in STEPS:
        ours, theirs = (right_answers(source, row, tracks) for row in (first, second))
        chosen = tracks.loc[ours.columns]
        for name, genres in (("accuracy", None), ("artist-balanced", chosen["genre"].tolist())):
            gap = paired_difference(ours, theirs, chosen["artist_id"].tolist(), genres)
            line = {"source": source, "row": first, "minus": second, "accuracy": name}
            lines.append(line | {"difference": gap.value, "low": gap.low, "high": gap.high})
    return pd.DataFrame(lines)


def band(tracks: pd.DataFrame) -> pd.DataFrame:
    folk = tracks.query("split == 'test' and genre == 'Folk'")
    largest = folk["artist_id"] == folk["artist_id"].mode()[0]
    of_band, others = folk.index[largest], folk.index[~largest]
    lines = []
    for row in ("baseline", "baseline_with_recipe", "no_gru", "final"):
        right = right_answers("evaluation_test", row, tracks).iloc[0]
        line = {"row": row, "clips_of_band": len(of_band), "recall_of_band": right[of_band].mean()}
        line |= {"recall_of_other_folk": right[others].mean()}
        lines.append(line | {"accuracy": right.mean(), "accuracy_without_band": right.drop(of_band).mean()})
    return pd.DataFrame(lines)


def main() -> None:
    tracks = dataset_rows(read_tracks(metadata_dir("fma_small") / "tracks.csv"), "fma_small")
    tracks = tracks.set_index("track_id")
    for name, table in (("differences", differences(tracks)), ("band", band(tracks))):
        table.round(5).to_csv(RESULTS / f"{name}.csv", index=False)
        print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
