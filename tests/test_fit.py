"""A training from its first epoch to its last: the best one kept, the same bits also after a kill."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_sentence
from training_data import (  # noqa: F401
    BASELINE,
    CPU,
    CRNN,
    checkpoints,
    copy_of,
    data_fixture,
    epochs_in,
    files_in,
    pack_fixture,
    train,
    trained_fixture,
)

from fma_nb.dataset import Pack, SpectrogramDataset, make_loader
from fma_nb.evaluation import evaluate_split
from fma_nb.project import FmaNbError, project_root
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import (
    LOG_COLUMNS,
    RunFiles,
    load_checkpoint,
    load_log,
    load_model,
    read_log,
    run_files,
)
from fma_nb.runs.fit import fit
from fma_nb.training import evaluate

# ----- many epochs -----


def test_training_learns(trained: dict[str, RunFiles]) -> None:
    log = load_log(trained["baseline"].log)
    assert list(log.columns) == LOG_COLUMNS
    assert log["epoch"].tolist() == list(range(8))
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["val_accuracy"].max() > 0.5  # chance is 0.125
    assert (log["lr"] == 3e-3).all()
    assert (log["seconds"] > 0).all()


@pytest.mark.parametrize("model", ["baseline", "crnn"])
def test_the_best_checkpoint_is_the_best_row_of_the_log(
    pack: Pack, trained: dict[str, RunFiles], model: str
) -> None:
    files = trained[model]
    log = load_log(files.log).sort_values(["val_accuracy", "val_loss"], ascending=[False, True])
    best = load_checkpoint(files.best)
    assert best["epoch"] == log["epoch"].iloc[0]
    assert best["val_accuracy"] == pytest.approx(log["val_accuracy"].iloc[0])
    network = load_model(files.best, model, pack, CPU)
    assert evaluate_split(network, pack, "val", CPU)["accuracy"] == pytest.approx(best["val_accuracy"])

    last = load_checkpoint(files.last)
    assert last["epoch"] == log["epoch"].max()
    assert last["genres"] == list(pack.genres)
    assert (last["preset"], last["dataset"], last["fingerprint"]) == (
        "compact",
        "fma_small",
        pack.fingerprint,
    )


def with_turned_validation(pack: Pack) -> Pack:
    """Validation calls each genre by the name of the next: the more is learned, the worse it gets there."""
    val = pack.split("val")
    return replace(pack, splits=pack.splits | {"val": replace(val, labels=(val.labels + 1) % 8)})


def test_the_best_checkpoint_is_chosen_on_validation_alone(pack: Pack, tmp_path: Path) -> None:
    turned = with_turned_validation(pack)
    files = train(replace(BASELINE, epochs=8, lr=3e-3), turned, tmp_path)
    log = load_log(files.log).set_index("epoch")
    on_train, on_val = (
        log.sort_values([f"{split}_accuracy", f"{split}_loss"], ascending=[False, True]).index[0]
        for split in ("train", "val")
    )
    assert on_train != on_val  # else this test would show little
    assert load_checkpoint(files.best)["epoch"] == on_val
    judged = evaluate_split(load_model(files.best, "baseline", turned, CPU), turned, "val", CPU)
    assert judged["accuracy"] == pytest.approx(log["val_accuracy"][on_val])
    assert log["val_accuracy"].iloc[-1] < 0.5 < log["train_accuracy"].iloc[-1]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_returned_is_what_the_files_hold(pack: Pack, project: Path, ema: float) -> None:
    """Of two seeds that share a log, and the same again when nothing is left to train."""
    turned = with_turned_validation(pack)
    recipes = [replace(BASELINE, epochs=8, lr=3e-3, ema=ema, seed=seed) for seed in (0, 1)]
    kept = list(zip(recipes, ("baseline_best.pt", "baseline_seed1_best.pt"), strict=True))
    for recipe, name in kept + kept:
        files = run_files("mine", "baseline", recipe.seed, first_seed=0)
        model, best_epoch, returned = fit(recipe, turned, files, CPU, progress=False)
        best = load_checkpoint(project / "outputs" / "mine" / "checkpoints" / name)
        last = load_checkpoint(files.last)
        assert best_epoch == best["epoch"] + 1 < last["epoch"] + 1  # else this test would show little
        assert model.state_dict().keys() == best["model_state"].keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, best["model_state"][key]), key
        log = load_log(project / "outputs" / "mine" / "logs" / "baseline.csv")
        pd.testing.assert_frame_equal(returned, log[log["seed"] == recipe.seed])
        pd.testing.assert_frame_equal(returned, read_log("mine", "baseline", [recipe.seed]))
    assert read_log("mine", "baseline")["seed"].tolist() == [0] * 8 + [1] * 8


def test_early_stopping(pack: Pack, tmp_path: Path) -> None:
    recipe = replace(BASELINE, epochs=9, patience=2, lr=1e-12)  # too small to change an answer
    files = train(recipe, pack, tmp_path)
    assert epochs_in(files) == [0, 1, 2]
    assert load_checkpoint(files.last)["epoch"] == 2
    assert load_checkpoint(files.best)["epoch"] == 0
    before = checkpoints(files), files.log.read_bytes()
    fit(recipe, pack, files, CPU, progress=False)
    assert (checkpoints(files), files.log.read_bytes()) == before
    train(replace(recipe, patience=0, epochs=4), pack, tmp_path)
    assert epochs_in(files) == [0, 1, 2, 3]


@pytest.mark.parametrize(("batch_size", "where"), [(20, "batch 2"), (48, "validation")])
def test_a_loss_that_is_no_number_stops_training(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path, batch_size: int, where: str
) -> None:
    files = copy_of(trained["baseline"], tmp_path / "copy")
    with pytest.raises(FmaNbError) as caught:
        fit(replace(BASELINE, lr=1e12, batch_size=batch_size), pack, files, CPU, progress=False)
    assert_one_sentence(caught.value, "baseline", "epoch 1", where, "lr", "'batch_size'", "saved nothing yet")
    assert checkpoints(files) == checkpoints(trained["baseline"])
    assert files.log.read_bytes() == trained["baseline"].log.read_bytes()


# ----- resume -----


# Kills itself with SIGKILL just before a file that an epoch writes gets its final name.
KILLED_SCRIPT = """
import os, signal, sys
import torch
from fma_nb.dataset import SpectrogramDataset
from fma_nb.bulk.pack import load_pack
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import RunFiles
from fma_nb.runs.fit import fit
from pathlib import Path

name, nth, threads, fields = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
torch.set_num_threads(threads)
folder, seen = Path.cwd(), 0

def kill(event, args):
    global seen
    if event == "os.rename" and Path(args[1]).name == name:
        seen += 1
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
files = RunFiles(folder / "m_best.pt", folder / "m_last.pt", folder / "m.csv")
fit(Recipe(**fields), load_pack("fma_small", "compact"), files, torch.device("cpu"), progress=False)
"""


def train_and_be_killed(recipe: Recipe, data: Path, folder: Path, name: str, nth: int) -> RunFiles:
    folder.mkdir()
    arguments = [name, str(nth), str(torch.get_num_threads()), repr(asdict(recipe))]
    result = subprocess.run(
        [sys.executable, "-c", KILLED_SCRIPT, *arguments],
        cwd=folder,
        env=os.environ | {"FMA_NB_DATA": str(data), "PYTHONPATH": str(project_root())},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    return files_in(folder)


@pytest.mark.parametrize(
    ("name", "epochs_logged", "ema"),
    [("m.csv", [0, 1], 0.3), ("m_last.pt", [0, 1, 2], 0.995), ("m_last.pt", [0, 1, 2], 0.0)],
)
def test_a_killed_run_goes_on_to_the_same_files(
    pack: Pack, data: Path, tmp_path: Path, name: str, epochs_logged: list[int], ema: float
) -> None:
    """Killed in its third epoch: before the log's row is there, or with all written but ``last``."""
    recipe = replace(CRNN, epochs=4, ema=ema)
    straight = train(recipe, pack, tmp_path / "straight")

    killed = train_and_be_killed(recipe, data, tmp_path / "killed", name, 3)
    assert load_checkpoint(killed.last)["epoch"] == 1
    assert epochs_in(killed) == epochs_logged
    fit(recipe, pack, killed, CPU, progress=False)

    assert checkpoints(killed) == checkpoints(straight)
    assert epochs_in(killed) == [0, 1, 2, 3]
    columns = [c for c in LOG_COLUMNS if c != "seconds"]
    pd.testing.assert_frame_equal(load_log(killed.log)[columns], load_log(straight.log)[columns])


TRAINING_SCRIPT = KILLED_SCRIPT.replace("sys.addaudithook(kill)", 'print("started", flush=True)')


def start_process(recipe: Recipe, data: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a training in a process of its own; return when it is about to begin."""
    folder.mkdir(exist_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING_SCRIPT, "", "0", str(torch.get_num_threads()), repr(asdict(recipe))],
        cwd=folder,
        env=os.environ | {"FMA_NB_DATA": str(data), "PYTHONPATH": str(project_root())},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "started\n"
    return child


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_weights(
    data: Path, tmp_path: Path, times: int
) -> None:
    recipe = replace(CRNN, epochs=4 * times)
    undisturbed = start_process(recipe, data, tmp_path / "undisturbed")
    begun = time.perf_counter()
    assert undisturbed.wait(600) == 0
    epoch_seconds = (time.perf_counter() - begun) / recipe.epochs

    moments, n_killed, last = random.Random(0), 0, files_in(tmp_path / "killed").last
    while n_killed < times:
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = start_process(recipe, data, tmp_path / "killed")
        # Every other one may be killed before it has finished an epoch.
        while n_killed % 2 == 0 and (not last.exists() or last.stat().st_mtime_ns == before):
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, epoch_seconds))
        child.kill()
        n_killed += child.wait() == -signal.SIGKILL
    assert 0 <= load_checkpoint(last)["epoch"] < recipe.epochs - 1  # there is something to go on from
    assert start_process(recipe, data, tmp_path / "killed").wait(600) == 0

    assert checkpoints(files_in(tmp_path / "killed")) == checkpoints(files_in(tmp_path / "undisturbed"))


def test_a_completed_run_is_not_trained_again(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    files = copy_of(trained["crnn"], tmp_path / "copy")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "copy").iterdir()}
    fit(CRNN, pack, files, CPU, progress=False)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "copy").iterdir()}
    assert after == before


@pytest.mark.parametrize("lost", ["best", "last", "log"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut"])
def test_a_lost_or_damaged_file_is_made_again(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path, lost: str, content: bytes | None
) -> None:
    files = copy_of(trained["crnn"], tmp_path / "copy")
    path: Path = getattr(files, lost)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    fit(CRNN, pack, files, CPU, progress=False)
    assert checkpoints(files) == checkpoints(trained["crnn"])
    assert epochs_in(files) == [0, 1, 2]


@pytest.mark.parametrize(
    "change", [{"lr": 1e-3}, {"epochs": 2}, {"seed": 3}, {"ema": 0.0}, {"pooling": "mean"}, {"width": 0.125}]
)
def test_another_recipe_starts_over(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path, change: dict[str, Any]
) -> None:
    recipe = replace(CRNN, **change)
    files = copy_of(trained["crnn"], tmp_path / "copy")
    fit(recipe, pack, files, CPU, progress=False)
    fresh = train(recipe, pack, tmp_path / "fresh")
    assert checkpoints(files) == checkpoints(fresh)
    assert load_checkpoint(files.last)["config"] == asdict(recipe)
    log = load_log(files.log)
    assert log[log["seed"] == recipe.seed]["epoch"].tolist() == list(range(recipe.epochs))


def test_the_best_of_another_recipe_is_not_taken_over(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    """What is there when another training was killed after its first epoch's best checkpoint."""
    files = copy_of(trained["crnn"], tmp_path / "copy")
    other = train(replace(CRNN, seed=5, epochs=1), pack, tmp_path / "other")
    shutil.copy(other.best, files.best)
    fit(CRNN, pack, files, CPU, progress=False)
    assert checkpoints(files) == checkpoints(trained["crnn"])


def test_a_log_without_this_seed_is_not_taken_for_complete(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    """Seeds share one log: when it is lost, the first seed makes a new one without the others' rows."""
    files = copy_of(trained["crnn"], tmp_path / "copy")
    log = load_log(files.log)
    log.assign(seed=9).to_csv(files.log, index=False)
    fit(CRNN, pack, files, CPU, progress=False)
    assert load_log(files.log).groupby("seed")["epoch"].apply(list).to_dict() == {0: [0, 1, 2], 9: [0, 1, 2]}


@pytest.mark.parametrize("lost", ["raw_state", "config"])
def test_a_checkpoint_of_an_earlier_version_starts_over(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path, lost: str
) -> None:
    """Before there was an average, ``last`` had no raw weights and its configuration no such field."""
    files = copy_of(trained["crnn"], tmp_path / "copy")
    content = load_checkpoint(files.last)
    if lost == "config":
        del content["config"]["ema"]
    else:
        del content[lost]
    torch.save(content, files.last)
    fit(CRNN, pack, files, CPU, progress=False)
    assert checkpoints(files) == checkpoints(trained["crnn"])


def test_other_data_starts_over(pack: Pack, trained: dict[str, RunFiles], tmp_path: Path) -> None:
    files = copy_of(trained["crnn"], tmp_path / "copy")
    fit(CRNN, replace(pack, fingerprint="other"), files, CPU, progress=False)
    assert load_checkpoint(files.last)["fingerprint"] == "other"


# ----- checkpoints and logs -----


def test_the_first_seed_has_the_plain_names(project: Path) -> None:
    first, second = (run_files("mine", "crnn", seed, first_seed=3) for seed in (3, 4))
    folder = project / "outputs" / "mine"
    assert first.best == folder / "checkpoints" / "crnn_best.pt"
    assert first.last == folder / "checkpoints" / "crnn_last.pt"
    assert first.log == second.log == folder / "logs" / "crnn.csv"
    assert len({first.best, first.last, second.best, second.last}) == 4
    for bad in ("", "..", "a/b", "/tmp/x"):
        with pytest.raises(FmaNbError, match="run="):
            run_files(bad, "crnn", 0, 0)


def test_a_checkpoint_of_something_else_is_refused(pack: Pack, trained: dict[str, RunFiles]) -> None:
    path = trained["crnn"].best
    genres = pack.genres
    for model, wrong, names in (
        ("baseline", pack, ("model", "'crnn'", "'baseline'")),
        ("crnn_no_gru", pack, ("model", "'crnn'", "'crnn_no_gru'")),
        ("crnn", replace(pack, preset="full"), ("preset", "'compact'", "'full'")),
        ("crnn", replace(pack, genres=genres[::-1]), ("genres", "Electronic")),
        ("crnn", replace(pack, genres=genres[:-1]), ("genres", "Electronic")),
    ):
        with pytest.raises(FmaNbError) as caught:
            load_model(path, model, wrong, CPU)
        assert_one_sentence(caught.value, path, *names)


def test_a_checkpoint_of_another_architecture_is_refused(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    content = load_checkpoint(trained["crnn"].best)
    content["model_state"]["classifier.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FmaNbError) as caught:
        load_model(tmp_path / "x.pt", "crnn", pack, CPU)
    assert_one_sentence(caught.value, tmp_path / "x.pt")


def test_a_checkpoint_of_another_version_is_refused(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    content = load_checkpoint(trained["crnn"].best)
    torch.save(content | {"config": content["config"] | {"n_gru": 96}}, path)
    with pytest.raises(FmaNbError) as caught:
        load_model(path, "crnn", pack, CPU)
    assert_one_sentence(caught.value, path, "version")
    # One from before ``width`` was a field counts as of width 1, which its weights do not fit.
    del content["config"]["width"]
    torch.save(content, path)
    with pytest.raises(FmaNbError) as caught:
        load_model(path, "crnn", pack, CPU)
    assert_one_sentence(caught.value, path, "architecture")


def test_a_checkpoint_brings_its_architecture(pack: Pack, tmp_path: Path) -> None:
    recipe = replace(CRNN, epochs=1, pooling="mean", band_norm=False, width=0.125)
    files = train(recipe, pack, tmp_path)
    network = load_model(files.best, "crnn", pack, CPU)
    assert (network.pooling, network.classifier.in_features) == ("mean", 24)  # two directions of 12
    loader = make_loader(SpectrogramDataset(pack.split("val")), 256)
    assert evaluate(network, loader, True)[0] == pytest.approx(load_log(files.log)["val_loss"][0])


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"\x00" * 64, b"PK\x03\x04 cut", b'{"model_state": 1}', b"\x80\x02garbage"],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(FmaNbError) as caught:
        load_checkpoint(path)
    assert_one_sentence(caught.value, path)


def test_a_missing_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FmaNbError) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert_one_sentence(caught.value, tmp_path / "x.pt", "train")


@pytest.mark.parametrize("missing", ["model_state", "config", "genres", "preset", "image_shape", "epoch"])
def test_an_incomplete_checkpoint_is_refused(
    trained: dict[str, RunFiles], tmp_path: Path, missing: str
) -> None:
    content = load_checkpoint(trained["crnn"].best)
    del content[missing]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(FmaNbError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_cut_or_flipped_checkpoint_is_refused(trained: dict[str, RunFiles], tmp_path: Path) -> None:
    """Whatever byte it is cut at: a sentence, or (flipped within a number) a checkpoint; never a crash."""
    whole = trained["baseline"].best.read_bytes()
    path = tmp_path / "x.pt"
    rng = np.random.default_rng(0)
    for end in rng.integers(1, len(whole) - 1, 150):
        path.write_bytes(whole[:end])
        with pytest.raises(FmaNbError):
            load_checkpoint(path)
    for _ in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, 3000, 20)] = rng.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        try:
            load_checkpoint(path)
        except FmaNbError as error:
            assert_one_sentence(error, path)


class Bomb:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str, int], int], tuple[str, int]]:
        return os.open, (str(self.marker), os.O_CREAT)


@pytest.mark.parametrize("as_checkpoint", [True, False])
def test_nothing_in_a_checkpoint_is_executed(
    trained: dict[str, RunFiles], tmp_path: Path, as_checkpoint: bool
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "x.pt"
    content = load_checkpoint(trained["crnn"].best) | {"config": Bomb(marker)}
    if as_checkpoint:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(FmaNbError):
        load_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if as_checkpoint else pickle.loads(path.read_bytes())
    assert marker.exists()  # the bomb is live


@pytest.mark.parametrize("content", [None, b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b'"open'])
def test_a_log_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "crnn.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FmaNbError) as caught:
        load_log(path)
    assert_one_sentence(caught.value, path)
