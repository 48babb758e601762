"""Stage 6: the same bits every time, also after a kill, and nothing that fails without a sentence."""

from __future__ import annotations

import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_sentence, write_png_tree
from torch.nn import functional as F

from fma_nb.augmentation import augment, colour, warp
from fma_nb.bulk.pack import load_pack
from fma_nb.dataset import Pack, SpectrogramDataset, make_loader, to_input
from fma_nb.evaluation import evaluate
from fma_nb.model import MODELS, build_model
from fma_nb.optimization import MovingAverage, lr_factor, make_optimizer, orthogonal
from fma_nb.project import FmaNbError, project_root, spectrogram_dir
from fma_nb.recipe import Recipe, default_recipe, seeds
from fma_nb.runs.checkpoint import LOG_COLUMNS, RunFiles, load_checkpoint, load_model, read_log, run_files
from fma_nb.runs.fit import fit
from fma_nb.spectrogram import DYNAMIC_RANGE_DB
from fma_nb.training import autocast, predict_logits, resolve_device, score_loader, to_device, train_epoch

CPU = torch.device("cpu")
BASELINE = Recipe(epochs=3, batch_size=20)
CRNN = replace(default_recipe("crnn"), epochs=3, batch_size=20, warmup=0.2, width=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data/`` folder with tiny spectrograms: 48 to train on, 24 to validate."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(folder))
        write_png_tree(spectrogram_dir("fma_small", "compact"), {"train": 6, "val": 3})
    return folder


@pytest.fixture(scope="module")
def pack(data: Path) -> Iterator[Pack]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", str(data))
        yield load_pack("fma_small", "compact")


def files_in(folder: Path) -> RunFiles:
    return RunFiles(folder / "m_best.pt", folder / "m_last.pt", folder / "m.csv")


def train(config: Recipe, pack: Pack, folder: Path) -> RunFiles:
    files = files_in(folder)
    fit(config, pack, files, CPU, progress=False)
    return files


def checkpoints(files: RunFiles) -> tuple[bytes, bytes]:
    return files.best.read_bytes(), files.last.read_bytes()


def epochs_in(files: RunFiles) -> list[int]:
    return read_log(files.log)["epoch"].tolist()


@pytest.fixture(scope="module")
def trained(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFiles]:
    """A baseline and a CRNN, trained without interruption. Copy before changing anything."""
    root = tmp_path_factory.mktemp("trained")
    return {
        config.model: train(config, pack, root / config.model)
        for config in (replace(BASELINE, epochs=8, lr=3e-3), CRNN)
    }


# ----- the loop -----


def test_training_learns(trained: dict[str, RunFiles]) -> None:
    log = read_log(trained["baseline"].log)
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
    log = read_log(files.log).sort_values(["val_accuracy", "val_loss"], ascending=[False, True])
    best = load_checkpoint(files.best)
    assert best["epoch"] == log["epoch"].iloc[0]
    assert best["val_accuracy"] == pytest.approx(log["val_accuracy"].iloc[0])
    network = load_model(files.best, model, pack, CPU)
    assert evaluate(network, pack, "val", CPU)["accuracy"] == pytest.approx(best["val_accuracy"])

    last = load_checkpoint(files.last)
    assert last["epoch"] == log["epoch"].max()
    assert last["genres"] == list(pack.genres)
    assert (last["preset"], last["dataset"], last["fingerprint"]) == (
        "compact",
        "fma_small",
        pack.fingerprint,
    )


def test_the_best_checkpoint_is_chosen_on_validation_alone(pack: Pack, tmp_path: Path) -> None:
    """Validation calls each genre by the name of the next: the more is learned, the worse it gets there."""
    val = pack.split("val")
    turned = replace(pack, splits=pack.splits | {"val": replace(val, labels=(val.labels + 1) % 8)})
    files = train(replace(BASELINE, epochs=8, lr=3e-3), turned, tmp_path)
    log = read_log(files.log).set_index("epoch")
    on_train, on_val = (
        log.sort_values([f"{split}_accuracy", f"{split}_loss"], ascending=[False, True]).index[0]
        for split in ("train", "val")
    )
    assert on_train != on_val  # else this test would show little
    assert load_checkpoint(files.best)["epoch"] == on_val
    judged = evaluate(load_model(files.best, "baseline", turned, CPU), turned, "val", CPU)
    assert judged["accuracy"] == pytest.approx(log["val_accuracy"][on_val])
    assert log["val_accuracy"].iloc[-1] < 0.5 < log["train_accuracy"].iloc[-1]


@pytest.mark.parametrize(
    "recipe", [{}, {"label_smoothing": 0.1}, {"mixup": 0.3}, {"mixup": 0.3, "label_smoothing": 0.2}]
)
def test_an_epoch_is_the_one_made_by_hand(recipe: dict[str, float]) -> None:
    """Two steps of plain gradient descent on cross-entropy against the smoothed and mixed labels."""
    images, labels = batch(8)
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    config = Recipe(bfloat16=False, **recipe)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40 * 50, 8))
    weight, bias = (p.detach().clone().requires_grad_() for p in network[1].parameters())

    random.seed(0)
    total, n_right = 0.0, 0
    for one in batches:
        inputs, partner, share = augment(*one, config)
        logits = inputs.flatten(1) @ weight.T + bias
        wanted = share * torch.eye(8)[one[1]] + (1 - share) * torch.eye(8)[partner]
        wanted = (1 - config.label_smoothing) * wanted + config.label_smoothing / 8
        loss = -(wanted * logits.log_softmax(1)).sum(1).mean()
        for parameter, slope in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            parameter.data -= 0.01 * slope
        total += loss.item() * len(inputs)
        n_right += int((logits.argmax(1) == one[1]).sum())

    random.seed(0)
    descent = torch.optim.SGD(network.parameters(), lr=0.01)
    constant = torch.optim.lr_scheduler.LambdaLR(descent, lambda _: 1.0)
    state: Any = SimpleNamespace(model=network, optimizer=descent, scheduler=constant, average=None)
    loss, accuracy = train_epoch(state, config, 0, batches, CPU)
    assert (loss, accuracy) == pytest.approx((total / 8, n_right / 8), rel=1e-5)
    torch.testing.assert_close(network[1].weight, weight)
    torch.testing.assert_close(network[1].bias, bias)


def test_accuracy_counts_clips_not_batches(pack: Pack, tmp_path: Path) -> None:
    """48 clips in batches of 20, 20 and 8: a mean of batch means would weigh the last ones too much."""
    log = read_log(train(replace(BASELINE, epochs=4), pack, tmp_path).log)
    for accuracies, n_clips in ((log["train_accuracy"], 48), (log["val_accuracy"], 24)):
        correct = accuracies * n_clips
        np.testing.assert_allclose(correct, correct.round(), atol=1e-4)

    network = load_model(tmp_path / "m_last.pt", "baseline", pack, CPU)
    scores = [
        score_loader(network, make_loader(SpectrogramDataset(pack.split("val")), size), CPU)
        for size in (24, 7, 1)
    ]
    for loss, accuracy in scores:
        assert loss == pytest.approx(scores[0][0], rel=1e-2)  # bfloat16 rounds differently by batch size
        assert accuracy == pytest.approx(scores[0][1], abs=1 / 24 + 1e-6)
    assert scores[0] == pytest.approx((log["val_loss"].iloc[-1], log["val_accuracy"].iloc[-1]))


def test_evaluation_changes_nothing_and_drops_nothing(pack: Pack, trained: dict[str, RunFiles]) -> None:
    network = load_model(trained["crnn"].last, "crnn", pack, CPU).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, labels = predict_logits(network, make_loader(SpectrogramDataset(pack.split("val")), 10), CPU)
    second, _ = predict_logits(network, make_loader(SpectrogramDataset(pack.split("val")), 10), CPU)
    assert torch.equal(first, second)
    assert labels.tolist() == pack.split("val").labels.tolist()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_clip_is_evaluated_on_its_own(pack: Pack, trained: dict[str, RunFiles]) -> None:
    """Neither what is random in training nor the other clips of a batch have a part in its logits."""
    for model, files in trained.items():
        network, val = load_model(files.best, model, pack, CPU), SpectrogramDataset(pack.split("val"))
        logits, _ = predict_logits(network, make_loader(val, 24), CPU, bfloat16=False)
        with torch.inference_mode():
            alone = torch.cat([network(to_input(image[None])) for image in val.images])
        torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-4)


# ----- the moving average of the weights -----


def test_a_young_average_forgets_faster() -> None:
    network = torch.nn.BatchNorm1d(1)
    average = MovingAverage(network, 0.3)
    expected = 0.0
    for n in range(6):
        with torch.no_grad():
            network.weight.fill_(n * n)
            network.num_batches_tracked.fill_(n)
        average.update(network)
        kept = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        expected = kept * expected + (1 - kept) * n * n
        assert average.module.weight.item() == pytest.approx(expected)
        assert int(average.module.num_batches_tracked) == n
    assert average.n_updates == 6
    assert network.weight.item() == 25


@pytest.mark.parametrize("decay", [0.2, 0.995])
@pytest.mark.parametrize("config", [BASELINE, CRNN], ids=lambda c: c.model)
def test_the_average_is_the_one_made_by_hand(
    pack: Pack, tmp_path: Path, config: Recipe, decay: float
) -> None:
    """One step an epoch and a constant learning rate: the weights after n epochs are those of step n."""
    plain = replace(config, batch_size=48, warmup=None, ema=0.0)
    steps = [
        load_checkpoint(train(replace(plain, epochs=n), pack, tmp_path / str(n)).last)["model_state"]
        for n in (1, 2, 3, 4)
    ]
    averaged = {name: value.double() for name, value in steps[0].items()}
    for n, state in enumerate(steps[1:], start=1):
        kept = min(decay, (1 + n) / (10 + n))
        for name, value in state.items():
            if value.is_floating_point():
                averaged[name] = kept * averaged[name] + (1 - kept) * value.double()
            else:
                averaged[name] = value.double()

    last = load_checkpoint(train(replace(plain, epochs=4, ema=decay), pack, tmp_path / "ema").last)
    assert last["n_averaged"] == 4
    assert last["model_state"].keys() == averaged.keys()
    for name, value in last["model_state"].items():
        torch.testing.assert_close(value.double(), averaged[name], rtol=1e-5, atol=1e-7)
    for name, value in last["raw_state"].items():  # the average does not reach into the training
        assert torch.equal(value, steps[-1][name]), name


def test_the_average_is_what_is_judged_and_kept(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path
) -> None:
    files = train(replace(BASELINE, epochs=6, lr=3e-3, ema=0.99), pack, tmp_path / "ema")
    loader = make_loader(SpectrogramDataset(pack.split("val")), 256)
    log = read_log(files.log).set_index("epoch")
    for path in (files.best, files.last):
        row = log.loc[load_checkpoint(path)["epoch"], ["val_loss", "val_accuracy"]]
        judged = score_loader(load_model(path, "baseline", pack, CPU), loader, CPU)
        assert judged == pytest.approx(tuple(row), rel=1e-6)

    last = load_checkpoint(files.last)
    torch.save(last | {"model_state": last["raw_state"]}, tmp_path / "raw.pt")
    raw_loss, _ = score_loader(load_model(tmp_path / "raw.pt", "baseline", pack, CPU), loader, CPU)
    assert abs(raw_loss - log["val_loss"].iloc[-1]) > 0.01
    # Only `last` carries the raw weights too; without an average they are the same.
    assert "raw_state" not in load_checkpoint(files.best)
    baseline = load_checkpoint(trained["baseline"].last)
    assert baseline["n_averaged"] == 0
    for name, value in baseline["raw_state"].items():
        assert torch.equal(value, baseline["model_state"][name])


# ----- the same bits -----


@pytest.mark.parametrize("config", [BASELINE, CRNN], ids=lambda c: c.model)
def test_a_second_run_gives_the_same_files(pack: Pack, tmp_path: Path, config: Recipe) -> None:
    first = train(config, pack, tmp_path / "one")
    torch.rand(7)  # what happened before does not matter
    np.random.rand(7)
    second = train(config, pack, tmp_path / "two")
    assert checkpoints(first) == checkpoints(second)
    columns = [c for c in LOG_COLUMNS if c != "seconds"]
    pd.testing.assert_frame_equal(read_log(first.log)[columns], read_log(second.log)[columns])

    other = train(replace(config, seed=1), pack, tmp_path / "three")
    for mine, theirs in zip(weights(first), weights(other), strict=True):
        assert not torch.equal(mine, theirs)


def test_every_epoch_draws_anew(pack: Pack, tmp_path: Path) -> None:
    """Nothing is learned: only what is drawn (order, warps, masks, dropout) can change the loss."""
    log = read_log(train(replace(CRNN, lr=1e-12, epochs=4), pack, tmp_path).log)
    assert np.diff(np.sort(log["train_loss"])).min() > 1e-5


def weights(files: RunFiles) -> list[torch.Tensor]:
    state = load_checkpoint(files.last)["model_state"]
    return [value for name, value in state.items() if name.endswith("weight")]


def test_several_threads_give_the_same_files_too(pack: Pack, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    config = replace(CRNN, model="crnn_no_gru", epochs=1, batch_size=48)
    try:
        first, second = (train(config, pack, tmp_path / name) for name in ("one", "two"))
    finally:
        torch.set_num_threads(threads)
    assert checkpoints(first) == checkpoints(second)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [BASELINE, CRNN], ids=lambda c: c.model)
def test_no_step_waits_for_the_gpu(pack: Pack, config: Recipe) -> None:
    """PyTorch raises an error where a step would ask the GPU for a number."""
    device = resolve_device("cuda")
    clips = SpectrogramDataset(pack.split("train"), device)
    network = to_device(build_model(config.model, 8, *clips.images.shape[1:]), device).train()
    optimizer = make_optimizer(network, config)
    average = MovingAverage(network, 0.9)
    for step, (images, labels) in enumerate(make_loader(clips, config.batch_size, shuffle=True)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one sets up libraries
        try:
            inputs, _, _ = augment(images, labels, config)
            with autocast(device, config.bfloat16):
                logits = network(inputs).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            average.update(network)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("config", [BASELINE, CRNN], ids=lambda c: c.model)
def test_a_gpu_gives_the_same_files_too(pack: Pack, tmp_path: Path, config: Recipe) -> None:
    files = [files_in(tmp_path / name) for name in ("one", "two")]
    for one in files:
        fit(config, pack, one, resolve_device("cuda"), progress=False)
    assert checkpoints(files[0]) == checkpoints(files[1])
    accuracy = load_checkpoint(files[0].best)["val_accuracy"]
    network = load_model(files[0].best, config.model, pack, CPU)
    assert evaluate(network, pack, "val", CPU)["accuracy"] == pytest.approx(accuracy, abs=2 / 24)


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

name, nth, threads, config = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
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
fit(Recipe(**config), load_pack("fma_small", "compact"), files, torch.device("cpu"), progress=False)
"""


def train_and_be_killed(config: Recipe, data: Path, folder: Path, name: str, nth: int) -> RunFiles:
    folder.mkdir()
    arguments = [name, str(nth), str(torch.get_num_threads()), repr(asdict(config))]
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
    config = replace(CRNN, epochs=4, ema=ema)
    straight = train(config, pack, tmp_path / "straight")

    killed = train_and_be_killed(config, data, tmp_path / "killed", name, 3)
    assert load_checkpoint(killed.last)["epoch"] == 1
    assert epochs_in(killed) == epochs_logged
    fit(config, pack, killed, CPU, progress=False)

    assert checkpoints(killed) == checkpoints(straight)
    assert epochs_in(killed) == [0, 1, 2, 3]
    columns = [c for c in LOG_COLUMNS if c != "seconds"]
    pd.testing.assert_frame_equal(read_log(killed.log)[columns], read_log(straight.log)[columns])


TRAINING_SCRIPT = KILLED_SCRIPT.replace("sys.addaudithook(kill)", 'print("started", flush=True)')


def start_training(config: Recipe, data: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a training in a process of its own; return when it is about to begin."""
    folder.mkdir(exist_ok=True)
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING_SCRIPT, "", "0", str(torch.get_num_threads()), repr(asdict(config))],
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
    config = replace(CRNN, epochs=4 * times)
    undisturbed = start_training(config, data, tmp_path / "undisturbed")
    begun = time.perf_counter()
    assert undisturbed.wait(600) == 0
    epoch_seconds = (time.perf_counter() - begun) / config.epochs

    moments, n_killed, last = random.Random(0), 0, files_in(tmp_path / "killed").last
    while n_killed < times:
        before = last.stat().st_mtime_ns if last.exists() else 0
        child = start_training(config, data, tmp_path / "killed")
        # Every other one may be killed before it has finished an epoch.
        while n_killed % 2 == 0 and (not last.exists() or last.stat().st_mtime_ns == before):
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, epoch_seconds))
        child.kill()
        n_killed += child.wait() == -signal.SIGKILL
    assert 0 <= load_checkpoint(last)["epoch"] < config.epochs - 1  # there is something to go on from
    assert start_training(config, data, tmp_path / "killed").wait(600) == 0

    assert checkpoints(files_in(tmp_path / "killed")) == checkpoints(files_in(tmp_path / "undisturbed"))


def copy_of(files: RunFiles, folder: Path) -> RunFiles:
    shutil.copytree(files.best.parent, folder)
    return files_in(folder)


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
def test_another_configuration_starts_over(
    pack: Pack, trained: dict[str, RunFiles], tmp_path: Path, change: dict[str, Any]
) -> None:
    config = replace(CRNN, **change)
    files = copy_of(trained["crnn"], tmp_path / "copy")
    fit(config, pack, files, CPU, progress=False)
    fresh = train(config, pack, tmp_path / "fresh")
    assert checkpoints(files) == checkpoints(fresh)
    assert load_checkpoint(files.last)["config"] == asdict(config)
    log = read_log(files.log)
    assert log[log["seed"] == config.seed]["epoch"].tolist() == list(range(config.epochs))


def test_the_best_of_another_configuration_is_not_taken_over(
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
    log = read_log(files.log)
    log.assign(seed=9).to_csv(files.log, index=False)
    fit(CRNN, pack, files, CPU, progress=False)
    assert read_log(files.log).groupby("seed")["epoch"].apply(list).to_dict() == {0: [0, 1, 2], 9: [0, 1, 2]}


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


def test_early_stopping(pack: Pack, tmp_path: Path) -> None:
    config = replace(BASELINE, epochs=9, patience=2, lr=1e-12)  # too small to change an answer
    files = train(config, pack, tmp_path)
    assert epochs_in(files) == [0, 1, 2]
    assert load_checkpoint(files.last)["epoch"] == 2
    assert load_checkpoint(files.best)["epoch"] == 0
    before = checkpoints(files), files.log.read_bytes()
    fit(config, pack, files, CPU, progress=False)
    assert (checkpoints(files), files.log.read_bytes()) == before
    train(replace(config, patience=0, epochs=4), pack, tmp_path)
    assert epochs_in(files) == [0, 1, 2, 3]


# ----- what is refused -----


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
def test_an_impossible_configuration_is_named(name: str, value: Any) -> None:
    with pytest.raises(FmaNbError) as caught:
        Recipe(**{name: value})
    assert_one_sentence(caught.value, f"{name}={value!r}")


def test_only_a_crnn_has_an_architecture_to_choose() -> None:
    options = {"pooling": "mean", "band_norm": False, "width": 0.5, "dropout": 0.1}
    assert Recipe("baseline", **options).architecture() == {}
    for model in MODELS[1:]:
        assert Recipe(model, **options).architecture() == options


def test_number_of_seeds() -> None:
    assert [c.seed for c in seeds(replace(BASELINE, seed=4), 3)] == [4, 5, 6]
    with pytest.raises(FmaNbError, match="n_seeds=0"):
        list(seeds(BASELINE, 0))


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


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FmaNbError, match="device='gpu' is unknown: choose auto, cpu or cuda"):
        resolve_device("gpu")
    for fraction in (0, -1, 1.5, math.nan):
        with pytest.raises(FmaNbError, match="gpu_memory_fraction="):
            resolve_device("cpu", fraction)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(FmaNbError) as caught:
        resolve_device("cuda")
    assert_one_sentence(caught.value, "device='cuda'", "device='auto'")


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
    config = replace(CRNN, epochs=1, pooling="mean", band_norm=False, width=0.125)
    files = train(config, pack, tmp_path)
    network = load_model(files.best, "crnn", pack, CPU)
    assert (network.pooling, network.classifier.in_features) == ("mean", 24)  # two directions of 12
    loader = make_loader(SpectrogramDataset(pack.split("val")), 256)
    assert score_loader(network, loader, CPU)[0] == pytest.approx(read_log(files.log)["val_loss"][0])


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
        read_log(path)
    assert_one_sentence(caught.value, path)


# ----- the ingredients -----


@pytest.mark.parametrize("n_steps", [10, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5])
def test_the_learning_rate_rises_and_falls_as_a_cosine(warmup: float, n_steps: int) -> None:
    factor = lr_factor(warmup, n_steps)
    values = np.array([factor(step) for step in range(n_steps)])
    peak = int(values.argmax())
    assert values[peak] == pytest.approx(1)
    assert abs(peak - warmup * n_steps) <= 1
    assert (values > 0).all()
    assert np.diff(values[: peak + 1]) == pytest.approx(1 / max(1, round(warmup * n_steps)))
    assert (np.diff(values[peak + 1 :]) < 0).all()
    fall = n_steps - max(1, round(warmup * n_steps))
    for part, expected in ((0.25, 0.854), (0.5, 0.5), (0.75, 0.146)):
        if (part * fall).is_integer():
            assert factor(n_steps - fall + int(part * fall)) == pytest.approx(expected, abs=1e-3)
    assert factor(n_steps) == pytest.approx(0, abs=1e-9)


def test_without_warmup_the_learning_rate_is_constant() -> None:
    assert {lr_factor(None, 100)(step) for step in range(100)} == {1.0}


def test_the_log_tells_the_learning_rate(trained: dict[str, RunFiles]) -> None:
    # 3 epochs of 3 steps, 2 of the 9 steps rising: steps 0, 3 and 6 begin an epoch.
    factor = lr_factor(CRNN.warmup, 9)
    expected = [CRNN.lr * factor(step) for step in (0, 3, 6)]
    assert read_log(trained["crnn"].log)["lr"].tolist() == pytest.approx(expected)


def batch(n_clips: int = 8, n_mels: int = 40, n_frames: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (n_clips, n_mels, n_frames), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n_clips)


def test_without_ingredients_a_batch_stays_as_it_is() -> None:
    images, labels = batch()
    inputs, partner, share = augment(images, labels, Recipe())
    assert torch.equal(inputs, to_input(images))
    assert torch.equal(partner, labels)
    assert share == 1.0


def numbered(n_clips: int = 64, n_mels: int = 40, n_frames: int = 50) -> torch.Tensor:
    """Clips in which every pixel has a number of its own, which `origins` reads."""
    numbers = torch.arange(n_clips * 100 * 100).reshape(n_clips, 100, 100)
    return numbers[:, :n_mels, :n_frames]


def origins(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the source frame of every frame and the source band of every band of each clip.

    Whole frames and bands have moved, and no clip has got anything from another one.
    """
    clips, bands, frames = images // 10_000, images // 100 % 100, images % 100
    assert torch.equal(clips, torch.arange(len(images))[:, None, None].expand(images.shape))
    assert torch.equal(frames, frames[:, :1].expand(images.shape))
    assert torch.equal(bands, bands[:, :, :1].expand(images.shape))
    return frames[:, 0], bands[:, :, 0]


def warped(seed: int = 0, **ingredients: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return origins(warp(numbered(), Recipe(**ingredients)))


def test_nothing_is_warped_without_being_asked_for() -> None:
    images = numbered()
    others = Recipe(gain=5.0, freq_mask=0.3, time_mask=0.3, mixup=0.3)
    for config in (Recipe(), others):
        assert torch.equal(warp(images, config), images)


@pytest.mark.parametrize("time_shift", [True, False])
def test_a_crop_is_a_stretch_of_each_clip_from_a_random_start(time_shift: bool) -> None:
    frames, _ = warped(crop=0.4, time_shift=time_shift)
    assert frames.shape == (64, 20)
    torch.testing.assert_close(frames, (frames[:, :1] + torch.arange(20)) % 50)
    wraps = (frames.diff(dim=1) < 0).any(dim=1)
    assert wraps.any() if time_shift else not wraps.any()
    starts = set(frames[:, 0].tolist())
    for seed in range(1, 9):
        starts |= set(warped(seed, crop=0.4, time_shift=time_shift)[0][:, 0].tolist())
    assert starts == set(range(50 if time_shift else 31))  # every start occurs, the last one too


def test_shifting_rotates_every_clip_on_its_own() -> None:
    images, labels = batch(32)
    torch.manual_seed(0)
    shifted = warp(images, Recipe(time_shift=True))
    assert shifted.dtype == images.dtype
    shifts = []
    for before, after in zip(images, shifted, strict=True):
        fitting = [k for k in range(50) if torch.equal(before.roll(k, dims=1), after)]
        assert len(fitting) == 1
        shifts += fitting
    assert len(set(shifts)) > 10

    torch.manual_seed(0)
    inputs, _, _ = augment(images, labels, Recipe(time_shift=True))
    assert torch.equal(inputs, to_input(shifted))


def test_every_shift_occurs() -> None:
    frames, bands = warped(time_shift=True)
    more, _ = warped(seed=1, time_shift=True)
    starts = torch.cat([frames[:, 0], more[:, 0]])
    assert starts.min() < 5 and starts.max() >= 45
    assert torch.equal(bands, torch.arange(40).expand(bands.shape))


@pytest.mark.parametrize("stretch", [0.1, 0.5, 0.9])
def test_stretching_plays_every_clip_at_its_own_speed(stretch: float) -> None:
    frames, bands = warped(stretch=stretch)
    assert torch.equal(bands, torch.arange(40).expand(bands.shape))
    assert (frames[:, 0] == 0).all()
    advance = frames.diff(dim=1) % 50  # it begins again where the clip ends
    speeds = advance.sum(dim=1) / 49
    assert (speeds > 1 - stretch - 1 / 49).all() and (speeds <= 1 + stretch).all()
    assert speeds.min() < 1 - 0.8 * stretch and speeds.max() > 1 + 0.8 * stretch
    assert len({tuple(clip) for clip in frames.tolist()}) > 20
    # A speed that is steady: each step is one of two neighbouring whole numbers.
    assert (advance.amax(dim=1) - advance.amin(dim=1) <= 1).all()
    for clip, speed in zip(frames, speeds.tolist(), strict=True):
        ideal = speed * np.arange(50)
        away = np.abs((clip.numpy() - ideal + 25) % 50 - 25)
        assert away.max() <= 2


@pytest.mark.parametrize("furthest", [1, 3])
def test_mel_shift_moves_every_clip_by_whole_bands(furthest: int) -> None:
    frames, bands = warped(mel_shift=furthest)
    assert torch.equal(frames, torch.arange(50).expand(frames.shape))
    shifts = (bands[:, 20] - 20).tolist()
    for clip, shift in zip(bands, shifts, strict=True):
        assert torch.equal(clip, (torch.arange(40) + shift).clamp(0, 39))  # the edge is repeated
    assert set(shifts) == set(range(-furthest, furthest + 1))
    assert max(shifts.count(shift) for shift in shifts) < 64 * 2 / (2 * furthest + 1)


def test_a_mel_shift_beyond_the_image_leaves_the_edge() -> None:
    torch.manual_seed(0)
    _, bands = origins(warp(numbered(n_mels=4), Recipe(mel_shift=64)))
    assert {tuple(clip) for clip in bands.tolist()} >= {(0, 0, 0, 0), (3, 3, 3, 3)}


def test_warps_are_drawn_apart() -> None:
    """All at once: frames stay frames of their clip, and no draw can be told from another one."""
    frames, bands = warped(time_shift=True, stretch=0.2, mel_shift=3)
    assert len({tuple(clip) for clip in frames.tolist()}) > 60
    speeds = (frames.diff(dim=1) % 50).sum(dim=1) / 49
    draws = torch.stack([frames[:, 0].float(), speeds, (bands[:, 20] - 20).float()])
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.4
    again, _ = warped(time_shift=True, stretch=0.2, mel_shift=3)
    other, _ = warped(seed=1, time_shift=True, stretch=0.2, mel_shift=3)
    assert torch.equal(frames, again)
    assert not torch.equal(frames, other)


def levels(n_clips: int = 400, n_mels: int = 41, n_frames: int = 6) -> torch.Tensor:
    """Inputs in the middle of their range."""
    generator = torch.Generator().manual_seed(0)
    return 0.4 + 0.2 * torch.rand(n_clips, 1, n_mels, n_frames, generator=generator)


def curves(coloured: torch.Tensor, inputs: torch.Tensor) -> np.ndarray:
    """Return what was added to each clip's mel bands; it must be the same in all frames."""
    added = coloured - inputs
    torch.testing.assert_close(added, added[..., :1].expand(added.shape), atol=1e-6, rtol=0)
    return added[:, 0, :, 0].numpy()


def test_colour_is_a_smooth_curve_of_each_clip() -> None:
    torch.manual_seed(0)
    added = curves(colour(levels(), 0.02), levels())
    knots = added[:, ::8]  # 41 bands: 6 knots with 8 steps between them
    for curve, at_knots in zip(added, knots, strict=True):
        straight = np.interp(np.arange(41), np.arange(0, 41, 8), at_knots)
        np.testing.assert_allclose(curve, straight, atol=1e-6)
    assert knots.std(axis=0) == pytest.approx(0.02, rel=0.15)  # between clips
    assert knots.std(axis=1).mean() == pytest.approx(0.02, rel=0.15)  # and within one: not one loudness
    assert np.abs(knots.mean(axis=0)).max() < 0.004
    assert len(np.unique(added.round(6), axis=0)) == 400

    torch.manual_seed(0)
    np.testing.assert_allclose(curves(colour(levels(), 0.04), levels()), 2 * added, atol=1e-6)


def test_colour_leaves_silence_silent() -> None:
    torch.manual_seed(0)
    inputs = levels()
    inputs[:, :, 5:30, 2:4] = 0
    coloured = colour(inputs, 0.5)
    assert (coloured[inputs == 0] == 0).all()
    assert coloured.min() == 0  # what falls below the floor is at the floor
    assert (coloured[inputs > 0] > 0.6).any()
    assert torch.equal(inputs[:, :, 0], levels()[:, :, 0])  # and the batch itself is left alone


def test_gain_is_in_decibels() -> None:
    images = torch.full((400, 41, 6), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    inputs, _, _ = augment(images, torch.zeros(400), Recipe(gain=5.0))
    added = curves(inputs, to_input(images)) * DYNAMIC_RANGE_DB
    assert added[:, ::8].std() == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize(("name", "axis", "longest"), [("freq_mask", 2, 12), ("time_mask", 3, 15)])
def test_masks_blank_one_stretch_of_each_clip(name: str, axis: int, longest: int) -> None:
    images, labels = batch(64)
    torch.manual_seed(0)
    inputs, _, share = augment(images, labels, Recipe(**{name: 0.3}))
    original = to_input(images)
    assert share == 1.0
    masked = inputs == 0  # no grey level of the batch is 0
    assert torch.equal(inputs[~masked], original[~masked])
    widths = []
    for clip in masked:
        lines = clip.unsqueeze(0).all(dim=5 - axis)[0, 0]  # which whole bands or frames are blank
        assert clip.sum() == lines.sum() * clip.shape[4 - axis]  # and nothing else is
        where = lines.nonzero().flatten()
        widths.append(len(where))
        assert len(where) == 0 or where[-1] - where[0] + 1 == len(where)
    assert longest * 0.6 < max(widths) <= longest
    assert len(set(widths)) > 5


def test_mixup_blends_pairs_by_their_share() -> None:
    images, labels = batch()
    original = to_input(images)
    shares = []
    for _ in range(50):
        inputs, partner, share = augment(images, labels, Recipe(mixup=0.3))
        blended = share * original + (1 - share) * original[partner]
        torch.testing.assert_close(inputs, blended)
        assert sorted(partner.tolist()) == labels.tolist()
        assert not torch.equal(partner, labels)
        shares.append(share)
    assert 0.5 <= min(shares) < max(shares) <= 1
    assert len(set(shares)) > 40


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_weights_and_spares_biases_and_gains(optimizer: str) -> None:
    model = build_model("crnn", 8, 32, 32, width=0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = Recipe("crnn", optimizer=optimizer, weight_decay=0.5, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        shrunk = 0.95 if name.startswith("rnn.weight") or name == "classifier.weight" else 1
        if parameter.ndim == 4:  # Muon keeps the filters' length instead
            shrunk = len(parameter) ** 0.5 / float(before[name].norm()) if optimizer == "muon" else 0.95
        torch.testing.assert_close(parameter.detach(), shrunk * before[name])


@pytest.mark.parametrize("shape", [(8, 27), (16, 16), (40, 9)])
def test_orthogonal_keeps_the_directions_of_a_matrix_and_levels_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    seen = left.T @ orthogonal(matrix) @ right.T
    sizes = seen.diagonal()
    assert 0.6 < sizes.min() < sizes.max() < 1.25
    torch.testing.assert_close(seen, sizes.diag(), atol=1e-4, rtol=0)


def test_muon_steps_equally_far_in_all_directions_and_leaves_the_rest_to_adamw() -> None:
    config = replace(default_recipe("crnn"), width=0.25)
    networks = [build_model("crnn", 8, 32, 32, **config.architecture()) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [
        make_optimizer(network, replace(config, optimizer=kind))
        for network, kind in zip(networks, ("muon", "adamw"), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        before = [p.detach().clone() for p in networks[0].parameters()]
        gradients = [torch.randn(p.shape, generator=generator) for p in before]
        for network, optimizer in zip(networks, optimizers, strict=True):
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for old, ours, theirs in zip(before, *(network.parameters() for network in networks), strict=True):
        if ours.ndim < 4:
            torch.testing.assert_close(ours, theirs)
            continue
        step = (old * len(old) ** 0.5 / old.norm() - ours) / config.filter_lr
        sizes = torch.linalg.svdvals(step.detach().flatten(1))
        assert 0.6 < sizes.min() < sizes.max() < 1.25


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
