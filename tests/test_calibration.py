"""Stage 7c: a temperature that is known is found again, and reliability is counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fma_nb.calibration import (
    apply_temperature,
    calibration_error,
    fit_temperature,
    probabilities_and_labels,
    reliability,
)
from fma_nb.metadata import GENRES


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


def honest_clips(n_clips: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of eight genres, and labels drawn with the very probabilities that the logits say."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n_clips, 8))
    # The largest of logits + Gumbel noise falls on a genre with its softmax probability.
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


# ----- temperature -----


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.0])
def test_a_known_temperature_is_found(factor: float) -> None:
    logits, labels = honest_clips()
    assert fit_temperature(softmax(factor * logits), labels) == pytest.approx(factor, rel=0.04)


def test_four_decimals_as_in_a_metrics_file_are_enough() -> None:
    logits, labels = honest_clips()
    rounded = softmax(2 * logits).round(4)
    assert (rounded == 0).any()  # else this test would show little
    assert fit_temperature(rounded, labels) == pytest.approx(2, rel=0.04)


def test_the_fitted_temperature_beats_its_neighbours_on_the_labels() -> None:
    logits, labels = honest_clips(400)
    probabilities = softmax(2.5 * logits)
    fitted = fit_temperature(probabilities, labels)

    def loss(temperature: float) -> float:
        scaled = torch.from_numpy(np.log(probabilities) / temperature)
        return float(torch.nn.functional.cross_entropy(scaled, torch.from_numpy(labels)))

    assert loss(fitted) < min(loss(0.98 * fitted), loss(1.02 * fitted), loss(1.0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 10.0])
def test_a_temperature_divides_the_logits_and_keeps_the_answer(temperature: float) -> None:
    logits, _ = honest_clips(500)
    probabilities = softmax(logits)
    found = apply_temperature(probabilities, temperature)
    np.testing.assert_allclose(found, softmax(np.log(probabilities) / temperature), atol=1e-12)
    np.testing.assert_allclose(found, softmax(logits / temperature), atol=1e-12)
    assert (found.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_a_probability_of_zero_gives_numbers() -> None:
    found = apply_temperature(np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), 2.0)
    assert (found > 0).all()  # a wrong answer given with all certainty costs much, but not infinitely much
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[0, 1] == found[0, 2] < found[0, 0]


def test_a_fitted_temperature_lowers_the_calibration_error_of_an_overconfident_model() -> None:
    logits, labels = honest_clips()
    probabilities = softmax(3 * logits)
    fitted = apply_temperature(probabilities, fit_temperature(probabilities, labels))
    before, after = (calibration_error(reliability(p, labels)) for p in (probabilities, fitted))
    assert before > 0.2
    assert after < 0.02


# ----- reliability -----

PROBABILITIES = np.array(
    [
        [1.00, 0.00, 0.00],  # as sure as can be, and right
        [0.90, 0.10, 0.00],  # wrong
        [0.50, 0.30, 0.20],  # right
        [0.30, 0.55, 0.15],  # wrong
        [0.33, 0.32, 0.35],  # right
    ]
)
LABELS = np.array([0, 1, 0, 0, 2])


@pytest.mark.parametrize(
    ("n_bins", "rows", "error"),
    [
        (5, [(0.35, 1.0, 1), (0.525, 0.5, 2), (0.95, 0.5, 2)], (0.65 + 2 * 0.025 + 2 * 0.45) / 5),
        (2, [(0.35, 1.0, 1), (0.7375, 0.5, 4)], (0.65 + 4 * 0.2375) / 5),
        (1, [(0.66, 0.6, 5)], 0.06),
    ],
)
def test_reliability_by_hand(n_bins: int, rows: list[tuple[float, float, int]], error: float) -> None:
    """Empty bins are left out, and a confidence of exactly 1 belongs to the last bin."""
    table = reliability(PROBABILITIES, LABELS, n_bins)
    expected = pd.DataFrame(rows, columns=["confidence", "accuracy", "clips"])
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
    assert calibration_error(table) == pytest.approx(error)


def test_reliability_has_five_bins_unless_told() -> None:
    pd.testing.assert_frame_equal(reliability(PROBABILITIES, LABELS), reliability(PROBABILITIES, LABELS, 5))


def test_always_sure_and_always_right_is_no_error() -> None:
    table = reliability(np.eye(8), np.arange(8))
    assert table.to_numpy().tolist() == [[1.0, 1.0, 8.0]]
    assert calibration_error(table) == 0


def test_always_sure_and_always_wrong_is_an_error_of_one() -> None:
    assert calibration_error(reliability(np.eye(8), (np.arange(8) + 1) % 8)) == 1


# ----- metrics files -----


def split_result(seed: int, track_ids: list[str]) -> dict[str, Any]:
    rows = np.random.default_rng(seed).dirichlet(np.ones(8), len(track_ids))
    return {"probabilities": dict(zip(track_ids, rows.tolist(), strict=True))}


def test_answers_and_labels_are_in_one_order() -> None:
    """The labels of a metrics file are found by track id, in whatever order they stand."""
    val = {"141": "Rock", "2": "Folk", "5": "Electronic"}
    metrics = {
        "genres": list(GENRES),
        "labels": {"val": val, "test": {"9": "Pop"}},
        "seeds": [
            {"val": split_result(seed, ["5", "141", "2"]), "test": split_result(10 + seed, ["9"])}
            for seed in range(2)
        ],
    }
    for i, result in enumerate(metrics["seeds"]):
        probabilities, labels = probabilities_and_labels(metrics, "val", i)
        assert probabilities.shape == (3, 8)
        assert [GENRES[label] for label in labels] == ["Electronic", "Rock", "Folk"]
        for row, track_id in zip(probabilities, ["5", "141", "2"], strict=True):
            assert row.tolist() == result["val"]["probabilities"][track_id]
    np.testing.assert_array_equal(
        probabilities_and_labels(metrics, "val")[0], probabilities_and_labels(metrics, "val", 0)[0]
    )
    assert [GENRES[label] for label in probabilities_and_labels(metrics, "test")[1]] == ["Pop"]
