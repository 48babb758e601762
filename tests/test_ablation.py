"""Stage 7b: every row takes out what its name says, and finished rows stay."""

from __future__ import annotations

import contextlib
import io
import json
import re
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_sentence, write_png_tree
from PIL import Image

from fma_nb.commands.cli import main
from fma_nb.evaluation import bootstrap_accuracy, clip_table, correct_matrix, paired_difference
from fma_nb.model import CRNN, BaselineCNN, build_model, count_parameters
from fma_nb.project import FmaNbError, outputs_dir, spectrogram_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.ablation import ALL_ROWS, CSV_COLUMNS, ROWS, ablation_table, finished_rows, row_recipe

RUN = "tiny"
N_SEEDS = 2
# What lets a small CRNN learn something in one epoch from bands at a genre's own height.
QUICK = {
    "epochs": "1",
    "width": "0.25",
    "batch_size": "2",
    "lr": "0.01",
    "ema": "0",
    "mel_shift": "0",
    "freq_mask": "0",
    "seed": "3",
}
MODEL_OF = {"final": "crnn", "no_gru": "crnn_no_gru"}


def ablate(*arguments: str, dataset: str = "fma_small", run: str = RUN) -> tuple[int, str]:
    """Run ``fma-nb ablate`` with the quick recipe; return the exit status and what it printed."""
    changes = [word for name, value in QUICK.items() for word in ("-p", name, value)]
    options = ["--dataset", dataset, "--run", run, "--device", "cpu", "--jobs", "1"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["ablate", *options, *changes, *arguments])
    return status, printed.getvalue()


def refusal(capsys: pytest.CaptureFixture[str]) -> FmaNbError:
    """Return what the command line said about bad input, one line."""
    said = capsys.readouterr().err
    assert said.startswith("fma-nb: ")
    assert said.count("\n") == 1
    return FmaNbError(said.strip())


def stamps(folder: Path) -> dict[str, int]:
    found = {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    assert found
    return found


def metrics_of(row: str, model: str, run: str = RUN) -> dict[str, Any]:
    path = outputs_dir() / run / "ablation" / row / "metrics" / f"{model}.json"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def printed() -> str:
    """What an ablation of two rows with two seeds printed; its files are in this module's folders."""
    write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 6, "val": 3, "test": 1})
    status, text = ablate("--rows", "final,no_gru", "--seeds", str(N_SEEDS))
    assert status == 0
    return text


# ----- rows -----

# Rows that take out what the plain recipe has as well, or has in another form.
NOT_PLAIN = {"no_gru": "crnn_no_gru", "no_muon": "adamw", "no_dropout": 0.0, "no_band_norm": False}


def changed_fields(config: Recipe, base: Recipe) -> dict[str, Any]:
    before = asdict(base)
    return {name: value for name, value in asdict(config).items() if value != before[name]}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_changes_what_its_name_says_and_nothing_else(row: str) -> None:
    """A change that left the final recipe as it is would measure nothing."""
    base = replace(default_recipe("crnn"), epochs=7, seed=5)
    changed = changed_fields(row_recipe(row, base), base)
    assert changed.keys() == ROWS[row].keys()
    assert bool(changed) == (row != "final")
    if row in NOT_PLAIN:
        assert list(changed.values()) == [NOT_PLAIN[row]]
    elif row.startswith("no_"):
        plain = asdict(Recipe())
        assert changed == {name: plain[name] for name in changed}


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [
        ("shorter", "epochs", 7),
        ("mixup", "mixup", 0.3),
        ("mean_pooling", "pooling", "mean"),
    ],
)
def test_other_rows_do_what_their_names_say(row: str, name: str, value: object) -> None:
    base = replace(default_recipe("crnn"), epochs=14, width=1.4)
    assert changed_fields(row_recipe(row, base), base) == {name: value}


@pytest.mark.parametrize("row", ALL_ROWS)
def test_every_row_gives_a_network_that_answers(row: str) -> None:
    config = row_recipe(row, replace(default_recipe("crnn"), width=0.25))
    network = build_model(config.model, 8, 128, 128, **config.architecture()).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, 1, 128, 128)).shape == (2, 8)


def test_architectures_differ_as_their_names_say() -> None:
    base = default_recipe("crnn")

    def network(row: str) -> Any:
        config = row_recipe(row, base)
        return build_model(config.model, 8, 128, 128, **config.architecture())

    final = network("final")
    assert isinstance(final, CRNN)
    assert isinstance(final.rnn, torch.nn.GRU) and final.rnn.bidirectional
    assert network("no_gru").rnn is None
    assert isinstance(network("lstm").rnn, torch.nn.LSTM)
    assert isinstance(network("one_way").rnn, torch.nn.GRU) and not network("one_way").rnn.bidirectional
    assert isinstance(network("baseline_with_recipe"), BaselineCNN)
    assert count_parameters(network("shuffled")) == count_parameters(final)
    assert 2 * network("mean_pooling").classifier.in_features == final.classifier.in_features
    assert (
        len(final.state_dict()) - len(network("no_band_norm").state_dict()) == 3
    )  # mean, variance, batches seen
    assert (final.dropout.p, network("no_dropout").dropout.p) == (0.3, 0)


@pytest.mark.parametrize(
    ("row", "change"),
    [("baseline", {})],
)
def test_plain_rows_train_as_the_baseline_does(row: str, change: dict[str, Any]) -> None:
    config = row_recipe(row, default_recipe("crnn"))
    assert config == replace(default_recipe("baseline"), **change)
    assert config.optimizer == "adam" and config.warmup is None and not config.time_shift
    assert config.crop == 1
    assert config.stretch == config.gain == config.freq_mask == config.mixup == config.ema == 0


@pytest.mark.usefixtures("printed")
def test_an_unknown_row_is_named_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FmaNbError) as caught:
        row_recipe("no_drums", default_recipe("crnn"))
    assert_one_sentence(caught.value, "no_drums", "no_gru", "baseline")

    assert ablate("--rows", "final,no_drums", run="untouched") == (2, "")
    assert_one_sentence(refusal(capsys), "no_drums")
    assert not (outputs_dir() / "untouched").exists()


# ----- the command -----


def test_the_csv_has_a_line_a_training_with_the_metrics_numbers(printed: str) -> None:
    path = outputs_dir() / RUN / "ablation.csv"
    assert f"  {path}\n" in printed
    table = pd.read_csv(path)
    assert list(table.columns) == CSV_COLUMNS
    assert table["row"].tolist() == ["final", "final", "no_gru", "no_gru"]
    assert table["seed"].tolist() == [3, 4, 3, 4]
    for line in table.to_dict("records"):
        model = MODEL_OF[line["row"]]
        metrics = metrics_of(line["row"], model)
        result = metrics["seeds"][line["seed"] - 3]
        assert line["model"] == metrics["model"] == model
        assert line["epochs"] == result["epochs"] == 1
        assert line["best_epoch"] == result["best_epoch"] == 1
        assert line["last_val_accuracy"] == line["val_accuracy"]  # of a single epoch
        assert line["val_accuracy"] == pytest.approx(result["val"]["accuracy"], abs=1e-5)
        for score in ("macro_f1", "artist_balanced_accuracy"):
            assert line[f"val_{score}"] == pytest.approx(result["val"][score], abs=1e-5)
        assert line["parameters"] == count_parameters(build_model(model, 8, 32, 32, width=0.25))
        assert line["seconds"] == result["seconds"]
        assert (line["device"], line["date"]) == (metrics["device"], metrics["date"])


@pytest.mark.usefixtures("printed")
def test_rows_are_trained_with_the_changes_of_the_command_line() -> None:
    for row, model in MODEL_OF.items():
        config = metrics_of(row, model)["config"]
        assert {name: config[name] for name in QUICK} == {n: float(v) for n, v in QUICK.items()}
        assert config["optimizer"] == default_recipe("crnn").optimizer
        assert config["label_smoothing"] == default_recipe("crnn").label_smoothing


@pytest.mark.usefixtures("printed")
def test_rows_are_judged_on_validation_only() -> None:
    for row, model in MODEL_OF.items():
        metrics = metrics_of(row, model)
        assert list(metrics["labels"]) == ["val"]
        assert not any("test" in result for result in metrics["seeds"])


def test_a_second_run_trains_nothing_again(printed: str) -> None:
    folder = outputs_dir() / RUN
    before, csv = stamps(folder), (folder / "ablation.csv").read_bytes()
    status, text = ablate("--rows", "final,no_gru", "--seeds", str(N_SEEDS))
    assert status == 0
    assert stamps(folder) == before
    assert (folder / "ablation.csv").read_bytes() == csv
    assert text.splitlines()[-7:] == printed.splitlines()[-7:]  # the table, and where the files lie


def test_the_table_compares_every_row_with_the_final_recipe(printed: str) -> None:
    table = ablation_table(RUN).set_index("row")
    assert list(table.index) == ["final", "no_gru"]
    assert table.loc["final", ["difference", "difference_low", "balanced_difference"]].isna().all()
    found = finished_rows(RUN)
    matrices = {row: correct_matrix(metrics, "val") for row, metrics in found.items()}
    assert not matrices["no_gru"].equals(matrices["final"])  # else this test would show little
    clips = clip_table(found["final"], "val")
    artists = clips["artist"].tolist()
    for prefix, score, genres in (
        ("", "accuracy", None),
        ("balanced_", "artist_balanced_accuracy", clips["genre"].tolist()),
    ):
        gap = paired_difference(matrices["no_gru"], matrices["final"], artists, genres)
        columns = [f"{prefix}difference{end}" for end in ("", "_low", "_high")]
        assert table.loc["no_gru", columns].tolist() == [gap.value, gap.low, gap.high]
        for row, line in table.iterrows():
            estimate = bootstrap_accuracy(matrices[str(row)], artists, genres)
            columns = [f"{prefix}accuracy{end}" for end in ("", "_low", "_high")]
            assert line[columns].tolist() == [estimate.value, estimate.low, estimate.high]
            scores = [r["val"][score] for r in metrics_of(str(row), MODEL_OF[str(row)])["seeds"]]
            assert line[f"{prefix}accuracy"] == pytest.approx(statistics.mean(scores))
            assert line[f"{prefix}spread"] == pytest.approx(statistics.stdev(scores))
    for _, line in table.iterrows():
        assert (line["seeds"], line["epochs"]) == (N_SEEDS, 1)
        assert line["last"] == pytest.approx(line["accuracy"])  # of a single epoch
    shown = re.search(r"no_gru +2 +1 +([\d.]+)", printed)
    assert shown and float(shown[1]) == pytest.approx(table.loc["no_gru", "accuracy"], abs=1e-4)


def test_the_table_is_drawn_with_what_it_says_inside(printed: str) -> None:
    drawn = outputs_dir() / RUN / "figures" / "11_ablation.png"
    assert f"The table is drawn in {drawn}" in printed
    with Image.open(drawn) as picture:
        assert "Ablation on validation" in picture.info["Description"]
        assert np.asarray(picture).std() > 0


def test_a_run_without_the_final_recipe_has_no_table() -> None:
    assert ablation_table("nothing_here").empty


@pytest.mark.usefixtures("project")
def test_a_row_made_from_other_data_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers to other clips cannot be compared clip by clip; after a new training they can."""
    write_png_tree(spectrogram_dir("fma_mini", "compact"), {"train": 2, "val": 1})
    assert ablate("--rows", "final,no_gru", "--seeds", "1", dataset="fma_mini")[0] == 0
    assert ablation_table(RUN)["row"].tolist() == ["final", "no_gru"]
    assert ablation_table(RUN)[["spread", "balanced_spread"]].isna().all(axis=None)  # no spread of one seed
    write_png_tree(spectrogram_dir("fma_mini", "compact"), {"train": 2, "val": 1}, seed=1)
    assert ablate("--rows", "no_gru", "--seeds", "1", dataset="fma_mini")[0] == 0
    capsys.readouterr()
    assert ablation_table(RUN)["row"].tolist() == ["final"]
    assert "Left out, made from other data or with another recipe: no_gru" in capsys.readouterr().out
    assert ablate("--rows", "final", "--seeds", "1", dataset="fma_mini")[0] == 0
    assert ablation_table(RUN)["row"].tolist() == ["final", "no_gru"]


@pytest.mark.usefixtures("project")
def test_a_row_made_with_another_recipe_is_left_out() -> None:
    """Else a change of the recipe would be taken for the effect of the row."""
    write_png_tree(spectrogram_dir("fma_mini", "compact"), {"train": 2, "val": 1})
    assert ablate("--rows", "final,no_gru", "--seeds", "1", dataset="fma_mini")[0] == 0
    assert ablate("--rows", "no_gru", "--seeds", "1", "-p", "gain", "3", dataset="fma_mini")[0] == 0
    assert ablation_table(RUN)["row"].tolist() == ["final"]


@pytest.mark.usefixtures("project")
def test_a_test_split_that_appears_later_trains_nothing_again() -> None:
    folder = spectrogram_dir("fma_mini", "compact")
    write_png_tree(folder, {"train": 2, "val": 1, "test": 1})
    (folder / "test").rename(folder.parent / "held back")
    assert ablate("--rows", "final", "--seeds", "1", dataset="fma_mini")[0] == 0
    before = stamps(outputs_dir() / RUN)
    (folder.parent / "held back").rename(folder / "test")
    assert ablate("--rows", "final,no_gru", "--seeds", "1", dataset="fma_mini")[0] == 0
    after = stamps(outputs_dir() / RUN)
    assert {path: after[path] for path in before} == before
    assert ablation_table(RUN)["row"].tolist() == ["final", "no_gru"]


@pytest.mark.usefixtures("project")
def test_fewer_seeds_lose_nothing_that_was_trained() -> None:
    write_png_tree(spectrogram_dir("fma_mini", "compact"), {"train": 2, "val": 1})
    assert ablate("--rows", "final", "--seeds", "3", dataset="fma_mini")[0] == 0
    before = stamps(outputs_dir() / RUN)
    for n_seeds in (1, 3):
        assert ablate("--rows", "final", "--seeds", str(n_seeds), dataset="fma_mini")[0] == 0
        assert ablation_table(RUN)["seeds"].tolist() == [n_seeds]
    assert stamps(outputs_dir() / RUN) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drums", "1"),
        ("epochs", "many"),
        ("epochs", "1.5"),
        ("epochs", "0"),
        ("lr", "nan"),
        ("time_shift", "maybe"),
        ("width", "100"),
        ("warmup", "2"),
        ("pooling", "max"),
        ("model", "resnet"),
    ],
)
def test_a_bad_change_of_the_recipe_is_one_sentence(
    capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    assert ablate("-p", name, value, run="untouched") == (2, "")
    assert_one_sentence(refusal(capsys), name)
    assert not (outputs_dir() / "untouched").exists()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--seeds", "0", "--rows", "final"], "--seeds 0"),
        (["--jobs", "0", "--rows", "final"], "--jobs 0"),
        (["--device", "abacus"], "abacus"),
        (["--preset", "huge"], "huge"),
        (["--dataset", "fma_mini"], "fma_mini"),
        (["--run", "../x", "--rows", "final"], "../x"),
    ],
)
@pytest.mark.usefixtures("printed")
def test_bad_options_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], name: str
) -> None:
    assert ablate(*arguments, run="untouched")[0] == 2
    assert_one_sentence(refusal(capsys), name)
    assert not (outputs_dir() / "untouched").exists()
