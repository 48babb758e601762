"""Stage 6a: a recipe refuses by name what cannot work, and each of its fields has a part in training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from training_data import BASELINE, data_fixture, pack_fixture, train, weights  # noqa: F401

from fma_nb.dataset import Pack
from fma_nb.model import MODELS
from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "resnet"),
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", "3"),
        ("batch_size", 0),
        ("batch_size", 8.0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "1e-3"),
        ("seed", -1),
        ("optimizer", "sgd"),
        ("weight_decay", -0.1),
        ("warmup", 1.5),
        ("warmup", -0.1),
        ("warmup", "0.2"),
        ("label_smoothing", 1.5),
        ("label_smoothing", -0.1),
        ("freq_mask", 1.5),
        ("time_mask", -0.1),
        ("stretch", 0.95),
        ("stretch", -0.1),
        ("stretch", math.nan),
        ("mel_shift", -1),
        ("mel_shift", 65),
        ("mel_shift", 1.5),
        ("gain", -0.1),
        ("gain", 41),
        ("gain", math.nan),
        ("mixup", -0.1),
        ("mixup", math.nan),
        ("ema", -0.1),
        ("ema", 1.0),
        ("ema", math.nan),
        ("ema", "0.9"),
        ("pooling", "max"),
        ("pooling", None),
        ("width", 0),
        ("width", 0.05),
        ("width", 9),
        ("width", math.nan),
        ("patience", -1),
    ],
)
def test_an_impossible_recipe_is_named(name: str, value: Any) -> None:
    with pytest.raises(FmaNbError) as caught:
        Recipe(**{name: value})
    assert_one_sentence(caught.value, f"{name}={value!r}")


def test_only_a_crnn_has_an_architecture_to_choose() -> None:
    options = {"pooling": "mean", "band_norm": False, "width": 0.5, "dropout": 0.1}
    assert Recipe("baseline", **options).architecture() == {}
    for model in MODELS[1:]:
        assert Recipe(model, **options).architecture() == options


def test_the_ingredients_are_used_in_training(pack: Pack, tmp_path: Path) -> None:
    plain = replace(Recipe("crnn", width=0.25), epochs=1, batch_size=20, optimizer="adamw")
    ingredients: list[dict[str, Any]] = [
        {},
        {"time_shift": True},
        {"stretch": 0.3},
        {"mel_shift": 2},
        {"gain": 5.0},
        {"freq_mask": 0.3},
        {"time_mask": 0.3},
        {"mixup": 0.3},
        {"ema": 0.9},
        {"pooling": "mean"},
        {"band_norm": False},
        {"dropout": 0.1},
        {"label_smoothing": 0.1},
        {"weight_decay": 0.5},
        {"warmup": 0.5},
        {"optimizer": "adam", "weight_decay": 0.5},
        {"optimizer": "muon"},
        {"optimizer": "muon", "filter_lr": 0.01},
    ]
    states = set()
    for i, ingredient in enumerate(ingredients):
        files = train(replace(plain, **ingredient), pack, tmp_path / str(i))
        states.add(tuple(weights(files)[-1].flatten().tolist()))
    assert len(states) == len(ingredients)
