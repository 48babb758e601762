"""Stage 8, calibration: does a model that says 70 % turn out to be right in 7 of 10 cases?

References
----------
C. Guo et al.: "On Calibration of Modern Neural Networks", ICML 2017 (temperature scaling).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.optimize
import scipy.special

from fma_nb.evaluation import Metrics

Probabilities = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def probabilities_and_labels(
    metrics: Metrics, split: str, seed_index: int = 0
) -> tuple[Probabilities, Labels]:
    """Return one seed's probabilities [shape=(n_clips, n_classes)] and the labels [shape=(n_clips,)]."""
    found: dict[str, Any] = metrics["seeds"][seed_index][split]["probabilities"]
    labels = [metrics["genres"].index(metrics["labels"][split][track_id]) for track_id in found]
    return np.array(list(found.values())), np.array(labels)


def fit_temperature(probabilities: Probabilities, labels: Labels) -> float:
    """Return the temperature under which the labels are most likely; above 1 the model was overconfident.

    Fit it on validation, never on the clips it will be evaluated on.
    """
    true_class = np.arange(len(labels)), np.asarray(labels)

    def loss(log_temperature: float) -> float:
        return float(-np.log(apply_temperature(probabilities, np.exp(log_temperature))[true_class]).mean())

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def apply_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Divide the logits behind probabilities [shape=(n_clips, n_classes)] by a temperature.

    The logarithm of a probability is its logit up to a constant of the clip, which softmax ignores.
    """
    logits = np.log(np.maximum(probabilities, 1e-6))  # rounded probabilities may be 0
    softened: Probabilities = scipy.special.softmax(logits / temperature, axis=1)
    return softened


def reliability(probabilities: Probabilities, labels: Labels, n_bins: int = 5) -> pd.DataFrame:
    """Sort clips into bins by the probability of the answer given; return a row per bin that is not empty.

    The columns are ``confidence, accuracy, clips``: mean probability, share of right answers, their number.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    clips = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float), "bin": bins})
    table = clips.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), clips=("bin", "size")
    )
    return table.reset_index(drop=True)


def calibration_error(table: pd.DataFrame) -> float:
    """Return the expected calibration error of a `reliability` table (M. P. Naeini et al., AAAI 2015)."""
    gaps = (table["confidence"] - table["accuracy"]).abs()
    return float((gaps * table["clips"]).sum() / table["clips"].sum())
