"""Stage 7: metrics files that say what happened, and statistics checked by hand."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FMA_SPLITS, assert_one_sentence, track_row, write_png_tree, write_tracks_csv
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from torch import nn

from fma_nb.bulk.pack import load_pack
from fma_nb.commands.evaluate import evaluate_run
from fma_nb.dataset import SpectrogramDataset, make_loader
from fma_nb.evaluation import (
    McNemar,
    bootstrap_accuracy,
    clip_table,
    correct_matrix,
    effective_artists,
    evaluate_split,
    genre_report,
    mcnemar,
    paired_difference,
    prediction_table,
    result_summary,
)
from fma_nb.metadata import GENRES, artist_groups, dataset_rows, read_tracks
from fma_nb.model import build_model, count_parameters
from fma_nb.project import FmaNbError, data_dir, outputs_dir, spectrogram_dir
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.checkpoint import load_checkpoint, read_log, run_files
from fma_nb.runs.experiment import (
    metrics_path,
    read_metrics,
    split_facts,
    train_and_evaluate,
    trained_models,
)
from fma_nb.training import predict_logits

CPU = torch.device("cpu")
RUN = "tiny"
CONFIGS = {
    "baseline": Recipe(epochs=3, batch_size=20, seed=4),
    "crnn_no_gru": replace(default_recipe("crnn_no_gru"), epochs=2, batch_size=20),
}
N_SEEDS = 2
Tree = dict[int, tuple[str, str, np.ndarray]]


def remove_some(tree: Tree) -> None:
    """Leave two genres a single track in val and test: macro-F1 is no weighted mean then."""
    for split in ("val", "test"):
        for genre in ("Folk", "Rock"):
            for track_id in [i for i, row in tree.items() if row[:2] == (split, genre)][1:]:
                del tree[track_id]
                folder = spectrogram_dir("fma_small", "compact")
                (folder / split / genre / f"{track_id:06d}.png").unlink()


def write_artists(tree: Tree) -> dict[int, int]:
    """Give the tracks artists: of each split three have two genres, the others one or two tracks of one."""
    artists: dict[int, int] = {}
    for split, name in FMA_SPLITS.items():
        ids = [i for i, row in tree.items() if row[0] == split]
        artists |= {i: 100 * len(name) + n // 2 for n, i in enumerate(ids)}
    rows = [track_row(i, tree[i][1], FMA_SPLITS[tree[i][0]], artist) for i, artist in artists.items()]
    write_tracks_csv(data_dir() / "raw" / "fma_metadata" / "tracks.csv", rows)
    return artists


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tree, dict[str, dict[str, Any]]]]:
    """Two models with two seeds each, trained and evaluated on val and test: the PNGs, the metrics."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(root / "data"))
        patch.setenv("FMA_NB_OUTPUTS", str(root / "outputs"))
        tree = write_png_tree(
            spectrogram_dir("fma_small", "compact"), {"train": 5, "val": 3, "test": 2}, seed=1
        )
        remove_some(tree)
        write_artists(tree)
        pack = load_pack("fma_small", "compact")
        metrics = {
            name: train_and_evaluate(
                config, pack, RUN, CPU, n_seeds=N_SEEDS, evaluation_split="test", progress=False
            )
            for name, config in CONFIGS.items()
        }
        yield tree, metrics


def genres_of(tree: Tree, split: str) -> dict[str, str]:
    return {str(track_id): genre for track_id, (where, genre, _) in tree.items() if where == split}


# ----- metrics files -----


def test_the_file_holds_what_was_returned(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    for name in CONFIGS:
        path = metrics_path(RUN, name)
        assert path == outputs_dir() / RUN / "metrics" / f"{name}.json"
        assert json.loads(path.read_text()) == metrics[name]
    assert read_metrics(RUN, list(CONFIGS)) == metrics


def test_the_file_tells_how_it_came_about(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    pack = load_pack("fma_small", "compact")
    for name, config in CONFIGS.items():
        found = metrics[name]
        assert found["config"] == asdict(config)
        assert (found["model"], found["dataset"], found["preset"]) == (name, "fma_small", "compact")
        assert found["synthetic"] is False
        assert found["fingerprint"] == pack.fingerprint
        assert found["genres"] == list(GENRES)
        assert found["n_parameters"] == count_parameters(build_model(name, 8, 128, 32))
        assert found["versions"]["torch"] == torch.__version__
        assert found["device"].startswith("CPU")
        assert [result["seed"] for result in found["seeds"]] == [config.seed, config.seed + 1]
        for result in found["seeds"]:
            files = run_files(RUN, name, result["seed"], config.seed)
            rows = read_log(RUN, name, [result["seed"]])
            assert result["epochs"] == len(rows) == config.epochs
            best_epoch = load_checkpoint(files.best)["epoch"]
            assert result["best_epoch"] == best_epoch + 1  # people count from one
            assert result["last_val_accuracy"] == rows["val_accuracy"].iloc[-1]
            assert result["seconds"] == pytest.approx(rows["seconds"].sum(), abs=0.06)
            best = rows.set_index("epoch").loc[best_epoch]
            assert result["val"]["accuracy"] == pytest.approx(best["val_accuracy"])


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("model", CONFIGS)
def test_scores_follow_from_the_predictions(run: tuple[Tree, dict[str, Any]], model: str, split: str) -> None:
    tree, metrics = run
    truth = genres_of(tree, split)
    assert metrics[model]["labels"][split] == truth
    accuracies = []
    for result in metrics[model]["seeds"]:
        found = result[split]
        assert found["predictions"].keys() == found["probabilities"].keys() == truth.keys()
        correct = [found["predictions"][track_id] == genre for track_id, genre in truth.items()]
        assert found["accuracy"] == pytest.approx(sum(correct) / len(correct))
        y, p = zip(*((genre, found["predictions"][i]) for i, genre in truth.items()), strict=True)
        expected = f1_score(y, p, labels=GENRES, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected)
        for track_id, probabilities in found["probabilities"].items():
            assert sum(probabilities) == pytest.approx(1, abs=5e-4)
            assert probabilities[GENRES.index(found["predictions"][track_id])] == max(probabilities)
        accuracies.append(found["accuracy"])
    assert 0 < min(accuracies) < 1  # else this test would show little


class Guess(nn.Module):
    """Answers by the first pixels, which are noise: some clips of every artist are right."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, 0, 0, :8]


def test_artists_count_equally_within_a_genre_and_genres_equally(run: tuple[Tree, dict[str, Any]]) -> None:
    """Against scikit-learn with a weight a clip, against a group-by, and against the bootstrap's value."""
    tree, _ = run
    pack = load_pack("fma_small", "compact")
    result = evaluate_split(Guess(), pack, "train", CPU)
    artist_of = {i: artist for i, artist in write_artists(tree).items() if tree[i][0] == "train"}
    assert split_facts(pack, ["train"])["artists"] == {"train": {str(i): a for i, a in artist_of.items()}}
    genres = [tree[i][1] for i in artist_of]
    cells = list(zip(genres, artist_of.values(), strict=True))
    predicted = [result["predictions"][str(i)] for i in artist_of]
    weights = [1 / cells.count(cell) for cell in cells]
    expected = balanced_accuracy_score(genres, predicted, sample_weight=weights)
    table = pd.DataFrame(cells, columns=["genre", "artist"])
    table["correct"] = table["genre"] == predicted
    by_hand = table.groupby(["genre", "artist"])["correct"].mean().groupby("genre").mean().mean()
    assert result["artist_balanced_accuracy"] == pytest.approx(expected)
    assert by_hand == pytest.approx(expected)
    assert abs(expected - result["accuracy"]) > 0.01  # else this test would show little

    metrics = {"seeds": [{"seed": 0, "train": result}]} | split_facts(pack, ["train"])
    correct, clips = correct_matrix(metrics, "train"), clip_table(metrics, "train")
    assert list(clips.index) == list(correct.columns)
    assert clips["genre"].to_dict() == {i: tree[i][1] for i in artist_of}
    assert clips["artist"].to_dict() == artist_of
    estimate = bootstrap_accuracy(correct, clips["artist"].tolist(), clips["genre"].tolist())
    assert estimate.value == pytest.approx(result["artist_balanced_accuracy"])


def test_predictions_are_the_best_checkpoints(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    pack = load_pack("fma_small", "compact")
    split = pack.split("test")
    for name in CONFIGS:
        networks = list(trained_models(RUN, name, pack, CPU))
        assert len(networks) == N_SEEDS
        for network, result in zip(networks, metrics[name]["seeds"], strict=True):
            assert evaluate_split(network, pack, "test", CPU) == result["test"]
            loader = make_loader(SpectrogramDataset(split), 16)
            logits, _ = predict_logits(network, loader, True)
            predicted = {
                str(i): pack.genres[g] for i, g in zip(split.track_ids, logits.argmax(1), strict=True)
            }
            assert predicted == result["test"]["predictions"]
        first, second = (
            predict_logits(n, make_loader(SpectrogramDataset(split), 16), True)[0] for n in networks
        )
        assert not torch.equal(first, second)


@pytest.mark.usefixtures("run")
def test_the_best_checkpoint_is_evaluated_and_not_the_last() -> None:
    """Validation calls each genre by the name of the next: the more is learned, the worse it gets there."""
    pack = load_pack("fma_small", "compact")
    val = pack.split("val")
    turned = replace(pack, splits=pack.splits | {"val": replace(val, labels=(val.labels + 1) % 8)})
    config = replace(CONFIGS["baseline"], epochs=8, lr=3e-3)
    result = train_and_evaluate(config, turned, "turned", CPU, progress=False)["seeds"][0]
    log = read_log("turned", "baseline").set_index("epoch")
    assert result["val"]["accuracy"] == pytest.approx(log["val_accuracy"].max())
    assert log["val_accuracy"].max() > log["val_accuracy"].iloc[-1]  # else this test would show little


def test_what_is_finished_is_not_trained_again(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    folder = outputs_dir() / RUN / "checkpoints"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    pack = load_pack("fma_small", "compact")
    again = train_and_evaluate(
        CONFIGS["baseline"], pack, RUN, CPU, n_seeds=N_SEEDS, evaluation_split="test", progress=False
    )
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert again["seeds"] == metrics["baseline"]["seeds"]


def test_fewer_seeds_are_those_asked_for_and_the_others_are_kept(run: tuple[Tree, dict[str, Any]]) -> None:
    pack = load_pack("fma_small", "compact")
    shutil.copytree(outputs_dir() / RUN, outputs_dir() / "fewer")
    fewer = train_and_evaluate(CONFIGS["baseline"], pack, "fewer", CPU, n_seeds=1, progress=False)
    assert [result["seed"] for result in fewer["seeds"]] == [4]
    assert fewer["seeds"][0]["val"] == run[1]["baseline"]["seeds"][0]["val"]
    assert set(read_log("fewer", "baseline")["seed"]) == {4, 5}
    assert set(read_log("fewer", "baseline", [4])["seed"]) == {4}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"evaluation_split": "train"}, "evaluation_split='train'"), ({"n_seeds": 0}, "n_seeds=0")],
)
@pytest.mark.usefixtures("run")
def test_parameters_are_checked_before_training(arguments: dict[str, Any], name: str) -> None:
    pack = load_pack("fma_small", "compact")
    with pytest.raises(FmaNbError) as caught:
        train_and_evaluate(CONFIGS["baseline"], pack, "untouched", CPU, progress=False, **arguments)
    assert_one_sentence(caught.value, name)
    assert not (outputs_dir() / "untouched").exists()


@pytest.mark.usefixtures("project")
def test_a_missing_test_split_is_noticed_before_training() -> None:
    write_png_tree(spectrogram_dir("fma_mini", "compact"), {"train": 2, "val": 1})
    pack = load_pack("fma_mini", "compact")
    with pytest.raises(FmaNbError, match="split 'test' is empty"):
        train_and_evaluate(CONFIGS["baseline"], pack, RUN, CPU, evaluation_split="test", progress=False)
    assert not outputs_dir().exists()
    metrics = train_and_evaluate(CONFIGS["baseline"], pack, RUN, CPU, progress=False)
    assert metrics["synthetic"] is True
    assert list(metrics["labels"]) == ["val"]
    assert "test" not in metrics["seeds"][0]


Damage = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (lambda m: m | {"fingerprint": "another"}, "fingerprint"),
        (lambda m: m | {"preset": "full"}, "preset"),
        (lambda m: m | {"dataset": "fma_mini"}, "dataset"),
        (lambda m: m | {"genres": m["genres"][::-1]}, "genres"),
        (lambda m: m | {"labels": {"val": m["labels"]["val"]}}, "labels"),
        (lambda m: m | {"model": "baseline"}, "'baseline'"),
        (lambda m: {key: value for key, value in m.items() if key != "artists"}, "another version"),
        (lambda _: {"model": "crnn_no_gru"}, "metrics"),
        (lambda _: [], "metrics"),
    ],
)
@pytest.mark.usefixtures("project")
def test_metrics_of_other_data_are_refused(
    run: tuple[Tree, dict[str, Any]], damage: Damage, name: str
) -> None:
    _, metrics = run
    for model, content in metrics.items():
        path = metrics_path(RUN, model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(damage(content) if model == "crnn_no_gru" else content))
    with pytest.raises(FmaNbError) as caught:
        read_metrics(RUN, list(CONFIGS))
    assert_one_sentence(caught.value, metrics_path(RUN, "crnn_no_gru"), name)


@pytest.mark.parametrize("content", [None, b"", b'{"model": ', b"\xff\xfe\x00"])
@pytest.mark.usefixtures("project")
def test_a_missing_or_damaged_metrics_file_is_named(content: bytes | None) -> None:
    path = metrics_path(RUN, "crnn")
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(FmaNbError) as caught:
        read_metrics(RUN, ["crnn"])
    assert_one_sentence(caught.value, path, "missing" if content is None else "damaged")


def test_trained_models_are_evaluated_on_demand(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    text = evaluate_run(RUN, "baseline", load_pack("fma_small", "compact", needed=["test"]), "test", CPU)
    scores = [result["test"] for result in metrics["baseline"]["seeds"]]
    assert f"{np.mean([s['accuracy'] for s in scores]):.4f}" in text
    assert f"{np.mean([s['macro_f1'] for s in scores]):.4f}" in text
    balanced = np.mean([s["artist_balanced_accuracy"] for s in scores])
    assert f"\nartist-balanced accuracy  {balanced:.4f}\n" in text
    assert "by 7 artists, who count as 7, 2 seed(s)" in text  # two tracks each, 14 in all
    recall = genre_report(metrics["baseline"], "test")["recall"]
    for genre in GENRES:
        assert f"{genre:<14}{recall[genre]:.3f}" in text


# ----- tables -----


def test_prediction_table_and_matrix(run: tuple[Tree, dict[str, Any]]) -> None:
    tree, metrics = run
    table = prediction_table(metrics["baseline"], "val")
    assert len(table) == N_SEEDS * 20
    assert table["track_id"].tolist()[:20] == [int(i) for i in metrics["baseline"]["labels"]["val"]]
    assert (table["genre"] == [tree[i][1] for i in table["track_id"]]).all()
    assert (table["correct"] == (table["genre"] == table["predicted"])).all()

    matrix = correct_matrix(metrics["baseline"], "val")
    assert matrix.shape == (N_SEEDS, 20)
    for seed, result in zip(matrix.index, metrics["baseline"]["seeds"], strict=True):
        assert seed == result["seed"]
        assert matrix.loc[seed].mean() == pytest.approx(result["val"]["accuracy"])
        for track_id in matrix.columns:
            right = result["val"]["predictions"][str(track_id)] == tree[track_id][1]
            assert matrix.loc[seed, track_id] == right


def test_genre_report_averages_over_seeds(run: tuple[Tree, dict[str, Any]]) -> None:
    tree, metrics = run
    truth = genres_of(tree, "val")
    reports = [
        precision_recall_fscore_support(
            list(truth.values()),
            [result["val"]["predictions"][i] for i in truth],
            labels=GENRES,
            zero_division=0,
        )
        for result in metrics["baseline"]["seeds"]
    ]
    report = genre_report(metrics["baseline"], "val")
    assert list(report.index) == list(GENRES)
    for i, column in enumerate(["precision", "recall", "f1-score", "support"]):
        expected = np.mean([r[i] for r in reports], axis=0)
        np.testing.assert_allclose(report[column].to_numpy(), expected)


def test_result_summary_has_a_row_a_model(run: tuple[Tree, dict[str, Any]]) -> None:
    _, metrics = run
    table = result_summary(metrics).set_index("model")
    assert list(table.index) == list(CONFIGS)
    names = {"accuracy": "accuracy", "artist-balanced": "artist_balanced_accuracy", "macro-F1": "macro_f1"}
    for model, row in table.iterrows():
        results = metrics[model]["seeds"]
        for split in ("val", "test"):
            for shown, score in names.items():
                scores = [result[split][score] for result in results]
                expected = f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"
                assert row[f"{split} {shown}"] == expected
        assert row["parameters"] == f"{metrics[model]['n_parameters']:,}"
        assert row["seeds"] == str(N_SEEDS)
        assert row["seconds a seed"] == f"{statistics.mean(r['seconds'] for r in results):.0f}"


def test_result_summary_of_one_seed_and_one_split(run: tuple[Tree, dict[str, Any]]) -> None:
    metrics = run[1]["baseline"]
    single = metrics | {"labels": {"val": metrics["labels"]["val"]}, "seeds": metrics["seeds"][:1]}
    shown = result_summary({"baseline": single}).iloc[0]
    assert shown["val accuracy"] == f"{single['seeds'][0]['val']['accuracy']:.3f}"  # no spread of one seed
    assert "test accuracy" not in shown
    both = result_summary({"baseline": metrics}, ["val"]).iloc[0]
    assert "val accuracy" in both and "test accuracy" not in both


# ----- statistics -----


def matrix(values: np.ndarray) -> pd.DataFrame:
    """Right and wrong answers [shape=(n_seeds, n_tracks)] as `correct_matrix` gives them."""
    return pd.DataFrame(np.atleast_2d(values).astype(float))


def answers(n_tracks: int, accuracy: float, seed: int = 0, n_seeds: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((n_seeds, n_tracks)) < accuracy


def exact_binomial(k: int, n: int) -> float:
    """Two-sided: all outcomes that are at most as likely as the one seen."""
    chances = [math.comb(n, i) / 2**n for i in range(n + 1)]
    return min(1.0, sum(chance for chance in chances if chance <= chances[k] * (1 + 1e-9)))


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (5, 0), (3, 9), (9, 3), (40, 60), (8, 8)]
)
def test_mcnemar_by_hand(only_first: int, only_second: int) -> None:
    first = [1] * 20 + [0] * 15 + [1] * only_first + [0] * only_second
    second = [1] * 20 + [0] * 15 + [0] * only_first + [1] * only_second
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    assert result.p_value == pytest.approx(exact_binomial(only_first, only_first + only_second))
    assert mcnemar(second, first).p_value == pytest.approx(result.p_value)


def test_mcnemar_counts_every_clip() -> None:
    for clip in np.eye(5):
        assert mcnemar(clip, np.zeros(5)) == McNemar(1, 0, 1.0)
        assert mcnemar(np.zeros(5), clip) == McNemar(0, 1, 1.0)


def test_mcnemar_needs_the_same_clips() -> None:
    with pytest.raises(FmaNbError, match="same clips"):
        mcnemar([1], [0, 1, 1])


@pytest.mark.parametrize("accuracy", [0.3, 0.6])
def test_bootstrap_of_independent_tracks_is_normal(accuracy: float) -> None:
    correct = answers(800, accuracy)
    estimate = bootstrap_accuracy(matrix(correct), range(800))
    mean = correct.mean()
    half_width = 1.96 * math.sqrt(mean * (1 - mean) / 800)
    assert estimate.value == pytest.approx(mean)
    assert estimate.low == pytest.approx(mean - half_width, abs=0.1 * half_width)
    assert estimate.high == pytest.approx(mean + half_width, abs=0.1 * half_width)


def test_bootstrap_by_artist_is_wider_when_artists_agree() -> None:
    correct = answers(80, 0.5).repeat(10, axis=1)  # 80 artists with 10 tracks, all right or all wrong
    artists = np.arange(80).repeat(10)
    alone = bootstrap_accuracy(matrix(correct), range(800))
    grouped = bootstrap_accuracy(matrix(correct), list(artists))
    assert alone.value == grouped.value == pytest.approx(correct.mean())
    ratio = (grouped.high - grouped.low) / (alone.high - alone.low)
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)
    # The order of tracks and the names of artists do not matter.
    order = np.random.default_rng(0).permutation(800)
    shuffled = bootstrap_accuracy(matrix(correct[:, order]), list(1000 - artists[order]))
    assert shuffled.high - shuffled.low == pytest.approx(grouped.high - grouped.low, rel=0.1)


def test_bootstrap_sees_how_much_seeds_differ() -> None:
    half = answers(800, 0.5)
    alike = bootstrap_accuracy(matrix(half.repeat(3, axis=0)), range(800))
    single = bootstrap_accuracy(matrix(half), range(800))
    assert alike.high - alike.low == pytest.approx(single.high - single.low, rel=0.1)
    apart = np.vstack([answers(800, accuracy, seed=i) for i, accuracy in enumerate((0.3, 0.5, 0.7))])
    spread = bootstrap_accuracy(matrix(apart), range(800))
    assert spread.high - spread.low > 3 * (single.high - single.low)


def test_bootstrap_is_the_same_every_time() -> None:
    correct = matrix(answers(100, 0.5, n_seeds=3))
    assert bootstrap_accuracy(correct, range(100)) == bootstrap_accuracy(correct, range(100))
    assert str(bootstrap_accuracy(matrix(np.ones(50)), range(50))) == "+1.000 [+1.000, +1.000]"


@pytest.mark.parametrize("genres", [None, [i // 100 for i in range(800)]])
def test_a_model_does_not_differ_from_itself(genres: list[int] | None) -> None:
    correct = matrix(answers(800, 0.6))
    estimate = paired_difference(correct, correct, [i // 3 for i in range(800)], genres)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


Cells = dict[int, list[tuple[str, float]]]  # an artist's clips: genre, and how right the model is


def balanced(cells: Sequence[list[tuple[str, float]]]) -> float:
    """The mean over genres of the mean over artists of the mean over clips; an artist may come twice."""
    artists: defaultdict[str, list[float]] = defaultdict(list)
    for clips in cells:
        for genre in {genre for genre, _ in clips}:
            artists[genre].append(statistics.mean(right for one, right in clips if one == genre))
    return statistics.mean(statistics.mean(means) for means in artists.values())


def slow_interval(cells: Cells, n_resamples: int = 3000) -> tuple[float, float, float]:
    """A percentile bootstrap over artists in plain Python: value, and the ends of the 95 % interval."""
    chance, names = random.Random(0), list(cells)
    drawn = sorted(
        balanced([cells[name] for name in chance.choices(names, k=len(names))]) for _ in range(n_resamples)
    )
    low, high = drawn[round(0.025 * n_resamples)], drawn[round(0.975 * n_resamples)]
    return balanced(list(cells.values())), low, high


def uneven_answers() -> tuple[list[int], list[str], pd.DataFrame]:
    """40 artists of 1 to 12 clips in four genres, some in two, and two models' answers to their clips."""
    rng = np.random.default_rng(1)
    artists = np.arange(40).repeat(rng.integers(1, 13, 40))
    genres = np.array(list("abcd"))[(artists % 4 + (rng.random(len(artists)) < 0.1)) % 4]
    skill = rng.random((2, 40))[:, artists]
    return artists.tolist(), genres.tolist(), matrix(rng.random((2, len(artists))) < 0.3 + 0.4 * skill)


def test_the_interval_of_the_balanced_accuracy_is_that_of_a_slow_bootstrap() -> None:
    artists, genres, correct = uneven_answers()
    cells: Cells = defaultdict(list)
    for artist, genre, right in zip(artists, genres, correct.iloc[0], strict=True):
        cells[artist].append((genre, right))
    value, low, high = slow_interval(cells)
    estimate = bootstrap_accuracy(correct.iloc[:1], artists, genres)
    assert estimate.value == pytest.approx(value)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    plain = bootstrap_accuracy(correct.iloc[:1], artists)
    assert abs(plain.value - value) > 0.01  # else this test would show little


def test_the_interval_of_a_balanced_difference_is_that_of_a_slow_bootstrap() -> None:
    """A mean of differences: the same artists are drawn for both models."""
    artists, genres, correct = uneven_answers()
    cells: Cells = defaultdict(list)
    for artist, genre, gain in zip(artists, genres, correct.iloc[1] - correct.iloc[0], strict=True):
        cells[artist].append((genre, gain))
    value, low, high = slow_interval(cells)
    estimate = paired_difference(correct.iloc[1:], correct.iloc[:1], artists, genres)
    assert estimate.value == pytest.approx(value)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.05 * (high - low))


@pytest.mark.parametrize(("sizes", "expected"), [([1] * 5, 5), ([20], 1), ([31, *[1] * 9], 1600 / 970)])
def test_effective_artists_by_hand(sizes: list[int], expected: float) -> None:
    artists = np.arange(len(sizes)).repeat(sizes)
    assert effective_artists(artists.tolist()) == pytest.approx(expected)
    assert effective_artists((7 - artists[::-1]).tolist()) == pytest.approx(expected)


def test_effective_artists_of_the_real_splits(real: Path) -> None:
    rows = dataset_rows(read_tracks(real / "fma_small_metadata" / "tracks.csv"), "fma_small")
    found = {
        split: (len(part), round(effective_artists(part["artist_id"].tolist())))
        for split, part in rows.groupby("split")
    }
    assert found == {"train": (6400, 403), "val": (800, 53), "test": (800, 30)}


def test_pairing_sees_a_small_steady_difference() -> None:
    baseline = answers(800, 0.5)
    better = baseline.copy()
    better[0, np.flatnonzero(~baseline[0])[:40]] = True  # the same answers, and 5 % more right
    estimate = paired_difference(matrix(better), matrix(baseline), range(800))
    half_width = 1.96 * math.sqrt(0.05 * 0.95 / 800)
    assert estimate.value == pytest.approx(0.05)
    assert estimate.low == pytest.approx(0.05 - half_width, abs=0.15 * half_width)
    assert estimate.high == pytest.approx(0.05 + half_width, abs=0.15 * half_width)
    reverse = paired_difference(matrix(baseline), matrix(better), range(800))
    assert reverse.value == pytest.approx(-0.05)


def test_pairing_needs_the_same_tracks() -> None:
    correct = matrix(answers(20, 0.5))
    for other in (correct.iloc[:, :-1], correct.iloc[:, ::-1], correct.rename(columns={3: 99})):
        with pytest.raises(FmaNbError, match="same tracks"):
            paired_difference(correct, other, range(20))


def test_comparing_trained_models(run: tuple[Tree, dict[str, Any]]) -> None:
    """The way from metrics files to a comparison, as notebook 05 goes it."""
    _, metrics = run
    first, second = (correct_matrix(metrics[name], "test") for name in ("crnn_no_gru", "baseline"))
    estimate = paired_difference(first, second, artist_groups("fma_small", list(first.columns)))
    means = [
        statistics.mean(result["test"]["accuracy"] for result in metrics[name]["seeds"])
        for name in ("crnn_no_gru", "baseline")
    ]
    assert estimate.value == pytest.approx(means[0] - means[1])
    assert estimate.low <= estimate.value <= estimate.high


def test_the_same_networks_under_two_conditions_share_their_seeds() -> None:
    """Two seeds of very different skill, both of which lose the first of four tracks when disturbed."""
    whole = pd.DataFrame([[1.0, 1, 1, 1], [1.0, 0, 0, 0]], columns=[2, 3, 5, 8])
    disturbed = whole.assign(**{"2": 0.0}).drop(columns=2).rename(columns={"2": 2})[[2, 3, 5, 8]]
    together = paired_difference(whole, disturbed, [2, 3, 5, 8], same_networks=True)
    apart = paired_difference(whole, disturbed, [2, 3, 5, 8])
    assert together.value == apart.value == 0.25
    # Only the tracks matter: of four drawn, none to three are the first one in 95 % of cases.
    assert (together.low, together.high) == (0, 0.75)
    assert apart.low < 0 < 0.75 < apart.high
