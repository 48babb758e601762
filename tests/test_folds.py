"""Cross-validation by artist: folds that leak nothing, and the same weights however they are trained."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import FMA_SPLITS, assert_one_sentence, track_row, write_png_tree, write_tracks_csv
from test_workers import (  # noqa: F401
    kill,
    scheduler_fixture,
    start_scheduler,
    start_worker,
    two_workers_fixture,
    wait_for_workers,
)
from training_data import CPU

from fma_nb.bulk.pack import load_pack
from fma_nb.commands.cli import main
from fma_nb.dataset import Pack, Split
from fma_nb.evaluation import clip_table, correct_matrix, evaluate_split, paired_difference
from fma_nb.metadata import ERRATA, GENRES, dataset_rows, read_tracks
from fma_nb.project import FmaNbError, data_dir, outputs_dir, spectrogram_dir
from fma_nb.runs.ablation import FOLD_COLUMNS, ablation_table, cut_folds, finished_rows, fold_pack, pooled
from fma_nb.runs.checkpoint import load_checkpoint, load_model, read_log

RUN, N_FOLDS, N_EPOCHS = "tiny", 2, 20
# A rate so high, without averaging, that the last epoch is hardly ever the best.
QUICK = {"epochs": str(N_EPOCHS), "width": "0.25", "batch_size": "8", "lr": "0.02", "ema": "0", "seed": "3"}
COMMAND = ("ablate", "--dataset", "fma_small", "--run", RUN, "--device", "cpu", "--folds", str(N_FOLDS))
CHANGES = tuple(word for name, value in QUICK.items() for word in ("-p", name, value))
Tree = dict[int, tuple[str, str, np.ndarray]]


def ablate(*arguments: str) -> tuple[int, str]:
    """Run ``fma-nb ablate`` with folds; return the exit status and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main([*COMMAND, *CHANGES, *arguments])
    return status, printed.getvalue()


def refusal(capsys: pytest.CaptureFixture[str]) -> FmaNbError:
    said = capsys.readouterr().err
    assert said.startswith("fma-nb: ")
    assert said.count("\n") == 1, said
    return FmaNbError(said.strip())


def write_data(without: int = 0) -> Tree:
    """Ten clips a genre, nine of them in train and val, by artists of one to three clips.

    In each genre one artist has clips in train and in val. ``tracks.csv`` lacks the first few tracks.
    """
    tree = write_png_tree(
        spectrogram_dir("fma_small", "compact"), {"train": 6, "val": 3, "test": 1}, shape=(128, 16)
    )
    rows = []
    for g, genre in enumerate(GENRES):
        ids = [i for i, row in tree.items() if row[1] == genre]
        artists = [0, 0, 0, 1, 2, 3, 3, 4, 4, 5]  # the seventh clip is the first of val
        rows += [
            track_row(i, genre, FMA_SPLITS[tree[i][0]], artist_id=10 * g + artist)
            for i, artist in zip(ids, artists, strict=True)
        ]
    write_tracks_csv(data_dir() / "raw" / "fma_metadata" / "tracks.csv", rows[without:])
    return tree


@pytest.fixture(scope="module", name="tree")
def tree_fixture() -> Tree:
    return write_data()


@pytest.fixture(scope="module", name="pack")
def pack_fixture(tree: Tree) -> Pack:  # noqa: ARG001 (it must be there)
    return load_pack("fma_small", "compact")


def ids(pack: Pack, split: str) -> list[int]:
    return pack.split(split).track_ids.tolist()


# ----- folds -----


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_folds_hold_each_clip_of_train_and_val_once_and_none_of_test(
    tree: Tree, pack: Pack, n_folds: int
) -> None:
    both = sorted(i for i, row in tree.items() if row[0] != "test")
    cut = cut_folds(pack, n_folds)
    assert len(cut) == n_folds
    assert sorted(np.concatenate(cut).tolist()) == both
    for held_out in cut:
        fold = fold_pack(pack, held_out)
        assert fold.splits.keys() == {"train", "val"}
        assert sorted(ids(fold, "val")) == sorted(held_out.tolist())
        assert sorted(ids(fold, "train") + ids(fold, "val")) == both
        for part in fold.splits.values():
            for i, label, image in zip(part.track_ids, part.labels, part.images, strict=True):
                assert tree[i][1] == pack.genres[label]
                np.testing.assert_array_equal(image, tree[i][2])


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_no_artist_is_torn_apart_not_even_one_of_train_and_val(pack: Pack, n_folds: int) -> None:
    official = [set(pack.split(name).artists.tolist()) for name in ("train", "val")]
    assert len(official[0] & official[1]) == len(GENRES)
    for held_out in cut_folds(pack, n_folds):
        fold = fold_pack(pack, held_out)
        assert not set(fold.split("train").artists.tolist()) & set(fold.split("val").artists.tolist())


@pytest.mark.parametrize("n_folds", [2, 3])
def test_folds_are_balanced_by_genre(pack: Pack, n_folds: int) -> None:
    for held_out in cut_folds(pack, n_folds):
        counts = np.bincount(fold_pack(pack, held_out).split("val").labels, minlength=8)
        assert (abs(counts - 9 / n_folds) <= 2).all(), counts


def real_pack(real: Path) -> Pack:
    """FMA-Small's official splits without pixels, less the clips on FMA's list of broken ones."""
    rows = dataset_rows(read_tracks(real / "fma_small_metadata" / "tracks.csv"), "fma_small")
    rows = rows[~rows["track_id"].isin(ERRATA)]
    splits = {}
    for name, part in rows.groupby("split"):
        labels = np.array([GENRES.index(genre) for genre in part["genre"]])
        images = np.zeros((len(part), 1, 1), np.uint8)
        splits[name] = Split(images, labels, part["track_id"].to_numpy(), part["artist_id"].to_numpy())
    return Pack("fma_small", "compact", GENRES, "f00d", splits)


def test_folds_of_the_real_artists(real: Path) -> None:
    pack = real_pack(real)
    artists = np.concatenate([pack.split(name).artists for name in ("train", "val")])
    cut = cut_folds(pack, 5)
    assert [len(held_out) for held_out in cut] == [1466, 1431, 1433, 1432, 1432]
    judged = [fold_pack(pack, held_out).split("val") for held_out in cut]
    assert sum(len(set(part.artists.tolist())) for part in judged) == len(set(artists.tolist())) > 2000
    for part in judged:
        counts = np.bincount(part.labels).tolist()
        instrumental = counts.pop(GENRES.index("Instrumental"))  # one artist has 208 of 899 clips
        assert set(counts) <= {179, 180}
        assert 172 <= instrumental <= 210


def test_folds_do_not_depend_on_the_order_or_the_split_of_the_clips(pack: Pack) -> None:
    train, val = pack.split("train"), pack.split("val")
    order = np.random.default_rng(0).permutation(len(train))
    moved = replace(pack, splits={"train": val, "val": train.take(order)})
    for ours, theirs in zip(cut_folds(pack, 3), cut_folds(moved, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_fold_is_never_taken_for_other_data(pack: Pack) -> None:
    """Trainings are found again by fingerprint: that of a fold belongs to it alone."""
    cut = [held_out for n_folds in (2, 3) for held_out in cut_folds(pack, n_folds)]
    both = pack, replace(pack, fingerprint="another")
    found = {fold_pack(one, held_out).fingerprint for one in both for held_out in cut}
    assert len({pack.fingerprint, *found}) == 11


@pytest.mark.parametrize("n_folds", [1, 0, -1])
def test_fewer_than_two_folds_are_refused(pack: Pack, n_folds: int) -> None:
    with pytest.raises(FmaNbError) as caught:
        cut_folds(pack, n_folds)
    assert_one_sentence(caught.value, f"--folds {n_folds}")


def test_a_genre_with_fewer_artists_than_folds_is_named(pack: Pack) -> None:
    train = pack.split("train")
    folk = train.labels == GENRES.index("Folk")
    few = replace(train, artists=np.where(folk, train.artists[folk][0], train.artists))
    with pytest.raises(FmaNbError) as caught:
        cut_folds(replace(pack, splits=pack.splits | {"train": few}), 4)
    assert_one_sentence(caught.value, "--folds 4", "Folk", "only 3 artist(s)", "fewer folds")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--folds", "1"], ["--folds 1"]),
        (["--folds", "-3"], ["--folds -3"]),
        (["--folds", "6"], ["--folds 6", "Electronic"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--jobs", "0"], ["--jobs 0", "at least 1"]),
    ],
)
@pytest.mark.usefixtures("pack")
def test_bad_options_are_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    assert ablate("--run", "untouched", *arguments) == (2, "")
    assert_one_sentence(refusal(capsys), *names)
    assert not (outputs_dir() / "untouched").exists()


# ----- the command -----


def fold_metrics() -> list[dict[str, Any]]:
    """The metrics of the final recipe's folds."""
    runs = [outputs_dir() / RUN / "ablation" / f"final_fold{i + 1}of{N_FOLDS}" for i in range(N_FOLDS)]
    return [json.loads((run / "metrics" / "crnn.json").read_text()) for run in runs]


def results() -> dict[str, Any]:
    """What a run left, but the times: checkpoints, answers and tables, byte by byte."""
    run = outputs_dir() / RUN
    found: dict[str, Any] = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.pt")}
    assert len(found) == 2 * N_FOLDS
    found |= {name: (run / name).read_bytes() for name in ("folds_table.csv", "folds_answers.csv")}
    trainings = pd.read_csv(run / "folds.csv").drop(columns=["seconds", "date"])
    answers = [metrics["seeds"][0]["val"] for metrics in fold_metrics()]
    return found | {"folds.csv": trainings.to_csv(), "metrics": answers}


@pytest.fixture(scope="module", name="trained")
def trained_fixture(pack: Pack) -> str:  # noqa: ARG001 (its clips must be there)
    """What cross-validation of the final recipe printed, one training after the other, undisturbed."""
    status, printed = ablate("--rows", "final", "--jobs", "1")
    assert status == 0
    return printed


@pytest.fixture(name="elsewhere")
def elsewhere_fixture(
    trained: str,  # noqa: ARG001 (its files must be there)
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """An empty folder for outputs; the results of the undisturbed run, to compare with."""
    undisturbed = results()
    monkeypatch.setenv("FMA_NB_OUTPUTS", str(tmp_path / "outputs"))
    return undisturbed


@pytest.fixture(name="copied")
def copied_fixture(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """A copy of the undisturbed run, into which a test may put rows."""
    shutil.copytree(outputs_dir(), tmp_path / "outputs")
    monkeypatch.setenv("FMA_NB_OUTPUTS", str(tmp_path / "outputs"))


@pytest.mark.usefixtures("trained")
def test_folds_are_judged_after_their_last_epoch(pack: Pack) -> None:
    best_epochs = []
    for i, (held_out, metrics) in enumerate(zip(cut_folds(pack, N_FOLDS), fold_metrics(), strict=True), 1):
        fold, result = fold_pack(pack, held_out), metrics["seeds"][0]
        name = f"{RUN}/ablation/final_fold{i}of{N_FOLDS}"
        log = read_log(name, "crnn")
        assert len(log) == result["epochs"] == N_EPOCHS
        assert metrics["fingerprint"] == fold.fingerprint and metrics["checkpoint"] == "last"
        assert result["val"]["accuracy"] == pytest.approx(log["val_accuracy"].iloc[-1])
        checkpoints = outputs_dir() / name / "checkpoints"
        assert load_checkpoint(checkpoints / "crnn_last.pt")["epoch"] == N_EPOCHS - 1
        network = load_model(checkpoints / "crnn_last.pt", "crnn", fold, CPU)
        assert evaluate_split(network, fold, "val", CPU) == result["val"]
        best_epochs.append(result["best_epoch"])
    assert min(best_epochs) < N_EPOCHS  # else this test could not tell the last epoch from the best one


@pytest.mark.usefixtures("trained")
def test_pooled_folds_hold_each_clip_once(tree: Tree) -> None:
    metrics = finished_rows(RUN, N_FOLDS)["final"]
    both = {str(i): row[1] for i, row in tree.items() if row[0] != "test"}
    assert metrics["labels"] == {"val": both}
    (result,) = metrics["seeds"]
    assert result["val"]["predictions"].keys() == result["val"]["probabilities"].keys() == both.keys()
    n_right = 0.0
    for fold in fold_metrics():
        answers = fold["seeds"][0]["val"]
        n_right += answers["accuracy"] * len(answers["predictions"])
        for name in ("predictions", "probabilities"):
            assert result["val"][name].items() >= answers[name].items()
        assert metrics["artists"]["val"].items() >= fold["artists"]["val"].items()
    correct = correct_matrix(metrics, "val")
    assert correct.shape == (1, len(both))
    assert correct.to_numpy().sum() == pytest.approx(n_right)
    assert list(clip_table(metrics, "val").index) == list(correct.columns)


def test_the_tables_say_what_the_folds_found(trained: str, pack: Pack) -> None:
    lines = pd.read_csv(outputs_dir() / RUN / "folds.csv")
    assert list(lines.columns) == FOLD_COLUMNS
    assert lines["fold"].tolist() == [1, 2] and lines["folds"].tolist() == [2, 2]
    assert lines["held_out_clips"].sum() == 72
    folds = [metrics["seeds"][0]["val"] for metrics in fold_metrics()]
    for score in ("accuracy", "artist_balanced_accuracy", "macro_f1"):
        assert lines[score].tolist() == pytest.approx([fold[score] for fold in folds], abs=1e-5)
    table = ablation_table(RUN, N_FOLDS).iloc[0]
    for column, score in (("spread", "accuracy"), ("balanced_spread", "artist_balanced_accuracy")):
        error = statistics.stdev(fold[score] for fold in folds) / 2**0.5
        assert table[column] == pytest.approx(error)
    assert table["accuracy_low"] <= table["accuracy"] <= table["accuracy_high"]
    (shown,) = re.findall(r"^final +1 +20 +([\d.]+)", trained, re.MULTILINE)
    assert float(shown) == pytest.approx(table["accuracy"], abs=1e-4)
    answers = pd.read_csv(outputs_dir() / RUN / "folds_answers.csv", index_col="track_id")
    predicted = {int(i): genre for fold in folds for i, genre in fold["predictions"].items()}
    assert {i: pack.genres[g] for i, g in answers["final"].items()} == predicted
    assert not (outputs_dir() / RUN / "ablation.csv").exists()  # folds are no rows of the ablation


def put_row(row: str, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Write a row whose folds are those of the final recipe without the GRU, but for a change."""
    for i, metrics in enumerate(fold_metrics(), 1):
        config = metrics["config"] | {"model": "crnn_no_gru"}
        content = change(i, metrics | {"model": "crnn_no_gru", "config": config})
        path = outputs_dir() / RUN / "ablation" / f"{row}_fold{i}of{N_FOLDS}" / "metrics" / "crnn_no_gru.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def half_right(_fold: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Right on every track with an odd number, and elsewhere as before."""
    seed = metrics["seeds"][0]
    before, labels = seed["val"]["predictions"], metrics["labels"]["val"]
    predictions = {i: labels[i] if int(i) % 2 else genre for i, genre in before.items()}
    return metrics | {"seeds": [seed | {"val": seed["val"] | {"predictions": predictions}}]}


@pytest.mark.usefixtures("copied")
def test_rows_are_compared_on_the_same_clips_over_all_folds() -> None:
    put_row("no_gru", half_right)
    found = finished_rows(RUN, N_FOLDS)
    ours, final = (correct_matrix(found[row], "val") for row in ("no_gru", "final"))
    clips = clip_table(found["final"], "val")
    line = ablation_table(RUN, N_FOLDS).set_index("row").loc["no_gru"]
    for prefix, genres in (("", None), ("balanced_", clips["genre"].tolist())):
        expected = paired_difference(ours, final, clips["artist"].tolist(), genres)
        shown = [line[f"{prefix}difference{end}"] for end in ("", "_low", "_high")]
        assert shown == [expected.value, expected.low, expected.high]
    assert line["difference"] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda i, m: m | {"config": m["config"] | {"lr": float(i)}},
        lambda i, m: m | {"seeds": m["seeds"] + [m["seeds"][0] | {"seed": 4}] * (i == 1)},
    ],
    ids=["another recipe", "more seeds"],
)
@pytest.mark.usefixtures("copied")
def test_folds_that_were_made_differently_are_not_pooled(
    change: Callable[[int, dict[str, Any]], dict[str, Any]],
) -> None:
    put_row("no_gru", change)
    assert list(finished_rows(RUN, N_FOLDS)) == ["final"]
    assert ablation_table(RUN, N_FOLDS)["row"].tolist() == ["final"]


@pytest.mark.usefixtures("copied")
def test_folds_of_other_data_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    put_row("no_gru", lambda i, m: m | {"fingerprint": m["fingerprint"] * i})
    assert ablation_table(RUN, N_FOLDS)["row"].tolist() == ["final"]
    assert "Left out, made from other data or with another recipe: no_gru" in capsys.readouterr().out


def test_pooled_seeds_are_those_of_every_fold() -> None:
    """Seed by seed, as the folds list them."""

    def metrics(fold: int) -> dict[str, Any]:
        clip = str(fold)
        seeds: list[dict[str, Any]] = [{"seed": seed, "last_val_accuracy": fold / 4} for seed in (7, 8)]
        for one in seeds:
            one["val"] = {"predictions": {clip: str(one["seed"])}, "probabilities": {}}
        facts = {"labels": {"val": {clip: "7"}}, "artists": {"val": {clip: fold}}}
        return {"fingerprint": f"f{fold}", "seeds": seeds} | facts

    found = pooled([metrics(1), metrics(2)])
    assert found["fingerprint"] == "f1 f2"
    assert found["labels"] == {"val": {"1": "7", "2": "7"}} and found["artists"] == {"val": {"1": 1, "2": 2}}
    assert [s["val"]["predictions"] for s in found["seeds"]] == [{"1": "7", "2": "7"}, {"1": "8", "2": "8"}]
    assert [s["last_val_accuracy"] for s in found["seeds"]] == [0.375, 0.375]


@pytest.mark.usefixtures("project")
def test_what_the_metadata_lacks_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    write_data(without=4)
    assert main([*COMMAND, *CHANGES, "-p", "epochs", "1", "--rows", "final", "--jobs", "1"]) == 0
    assert capfd.readouterr().out.count("are not in fma_small's metadata: each is its own artist.") == 1
    artists = [artist for metrics in fold_metrics() for artist in metrics["artists"]["val"].values()]
    unknown = [artist for artist in artists if artist < 0]
    assert len(unknown) == len(set(unknown)) == 4


# ----- the same weights, however they are trained -----


def test_two_trainings_side_by_side_give_the_same_bytes(elsewhere: dict[str, Any]) -> None:
    assert ablate("--rows", "final", "--jobs", "2")[0] == 0
    assert results() == elsewhere


def test_a_second_run_trains_nothing_again(trained: str) -> None:
    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in outputs_dir().rglob("*.pt")}

    before = stamps()
    status, printed = ablate("--rows", "final", "--jobs", "1")
    assert (status, printed.splitlines()[-6:]) == (0, trained.splitlines()[-6:])
    assert stamps() == before


def wait_until(reached: Callable[[], bool], still: Callable[[], bool]) -> None:
    while not reached():
        assert still()
        time.sleep(0.005)


def begun(n: int) -> bool:
    return len(list(outputs_dir().rglob("crnn_last.pt"))) >= n


def n_finished() -> int:
    return len(list(outputs_dir().rglob("metrics/*.json")))


def test_killed_in_the_middle_of_a_fold_it_ends_in_the_same_bytes(elsewhere: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "fma_nb", *COMMAND, *CHANGES, "--rows", "final", "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: begun(1), lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert n_finished() == 0, "it was killed too late to prove anything"
    assert ablate("--rows", "final", "--jobs", "1")[0] == 0
    assert results() == elsewhere


# ----- a Dask cluster -----


def warm(address: str) -> None:
    """Let all workers import what trains: then they begin at the same time."""
    from distributed import Client

    with Client(address, timeout=60) as client:
        client.run(importlib.import_module, "fma_nb.runs.ablation")


@contextlib.contextmanager
def killed_meanwhile(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Kill a process when all folds are in the middle of their training; tell how many were finished."""
    finished: list[int] = []
    over = threading.Event()

    def wait_and_kill() -> None:
        wait_until(lambda: begun(N_FOLDS), lambda: not over.is_set())
        kill(process)
        finished.append(n_finished())

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    yield finished
    over.set()
    thread.join()


def test_a_worker_is_killed_in_the_middle_and_the_bytes_are_the_same(
    elsewhere: dict[str, Any],
    scheduler: str,
    two_workers: list[subprocess.Popen[bytes]],
) -> None:
    warm(scheduler)
    with killed_meanwhile(two_workers[0]) as finished:
        assert ablate("--rows", "final", "--scheduler", scheduler)[0] == 0
    assert finished == [0], "the worker was killed too late to prove anything"
    assert results() == elsewhere


@pytest.mark.usefixtures("elsewhere")
def test_a_scheduler_that_goes_away_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process, address = start_scheduler(tmp_path)
    workers = [start_worker(address) for _ in range(N_FOLDS)]
    try:
        wait_for_workers(address, N_FOLDS)
        warm(address)
        with killed_meanwhile(process) as finished:
            assert ablate("--rows", "final", "--scheduler", address)[0] == 2
        assert finished == [0], "the scheduler was killed too late to prove anything"
        assert_one_sentence(refusal(capsys), address, "went away")
    finally:
        for one in (*workers, process):
            kill(one)


@pytest.mark.usefixtures("elsewhere")
def test_a_worker_of_two_threads_is_refused(
    scheduler: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two trainings in one process would draw from the same random generators."""
    worker = start_worker(scheduler, n_threads=2)
    try:
        wait_for_workers(scheduler, 1)
        assert ablate("--rows", "final", "--scheduler", scheduler)[0] == 2
    finally:
        kill(worker)
    assert_one_sentence(refusal(capsys), "--nthreads 1", "thread")
    assert not list(outputs_dir().rglob("*.pt"))
