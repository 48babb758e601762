"""Cross-validation by artist: folds over training and validation clips together, and their pooled answers.

The official validation split holds few artists, and unevenly many clips of each. With folds every clip of
both splits is judged once, by a network that has heard no clip of its artist. The test split is left out.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from fma_nb.dataset import Pack, Split
from fma_nb.evaluation import Metrics
from fma_nb.project import FmaNbError

Ids = npt.NDArray[np.int64]


def cut_folds(pack: Pack, n_folds: int) -> list[Ids]:
    """Cut the training and validation clips into folds; return each fold's track ids.

    Folds are balanced by genre, and all clips of an artist lie in one fold. They depend on the track ids,
    genres and artists alone.

    Raises
    ------
    FmaNbError
        When there are fewer than two folds, or a genre has fewer artists than there are folds.
    """
    if n_folds < 2:
        raise FmaNbError(f"--folds {n_folds} must be at least 2.")
    clips = _joined(pack)
    clips = clips.take(np.argsort(clips.track_ids))
    for label, genre in enumerate(pack.genres):
        n_artists = len(set(clips.artists[clips.labels == label]))
        if n_artists < n_folds:
            raise FmaNbError(
                f"--folds {n_folds}: {genre} has clips of only {n_artists} artist(s) in train and val: "
                "choose fewer folds."
            )
    cutter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():  # it counts clips where artists count, which was done above
        warnings.simplefilter("ignore", UserWarning)
        cuts = list(cutter.split(clips.track_ids, clips.labels, clips.artists))
    return [clips.track_ids[held_out] for _, held_out in cuts]


def _joined(pack: Pack) -> Split:
    parts = [pack.split(name) for name in ("train", "val")]
    fields = ("images", "labels", "track_ids", "artists")
    return Split(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def fold_pack(pack: Pack, held_out: Ids) -> Pack:
    """Return a pack that trains on all clips of train and val but those of a fold, and validates on these."""
    clips = _joined(pack)
    inside = np.isin(clips.track_ids, held_out)
    content = pack.fingerprint + json.dumps(held_out.tolist())
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return replace(
        pack, fingerprint=fingerprint, splits={"train": clips.take(~inside), "val": clips.take(inside)}
    )


def pooled(folds: Sequence[Metrics]) -> Metrics:
    """Join the metrics of all folds of one recipe as if every clip had been judged in one go.

    ``folds`` keeps the results of every seed on each fold.
    """
    seeds = []
    for results in zip(*(metrics["seeds"] for metrics in folds), strict=True):
        answers = {
            name: _union([result["val"][name] for result in results])
            for name in ("predictions", "probabilities")
        }
        last = float(np.mean([result["last_val_accuracy"] for result in results]))
        seeds.append({"seed": results[0]["seed"], "val": answers, "last_val_accuracy": last})
    return folds[0] | {
        "fingerprint": " ".join(metrics["fingerprint"] for metrics in folds),
        "labels": {"val": _union([metrics["labels"]["val"] for metrics in folds])},
        "artists": {"val": _union([metrics["artists"]["val"] for metrics in folds])},
        "seeds": seeds,
        "folds": [[result["val"] for result in metrics["seeds"]] for metrics in folds],
    }


def _union(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
