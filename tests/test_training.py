"""Stage 6d: an epoch is what it says, evaluation changes nothing, and the bits are the same every time."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_sentence
from torch.nn import functional as F
from training_data import (  # noqa: F401
    BASELINE,
    CPU,
    CRNN,
    batch,
    checkpoints,
    data_fixture,
    files_in,
    pack_fixture,
    train,
    trained_fixture,
    weights,
)

from fma_nb.augmentation import augment, mixup
from fma_nb.dataset import Pack, SpectrogramDataset, make_loader, to_input
from fma_nb.evaluation import evaluate_split
from fma_nb.model import build_model
from fma_nb.optimization import MovingAverage, make_optimizer
from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe
from fma_nb.runs.checkpoint import LOG_COLUMNS, RunFiles, load_checkpoint, load_log, load_model
from fma_nb.runs.fit import fit
from fma_nb.training import (
    TrainingState,
    autocast,
    evaluate,
    predict_logits,
    resolve_device,
    to_device,
    train_one_epoch,
)

# ----- an epoch -----


@pytest.mark.parametrize(
    "ingredients", [{}, {"label_smoothing": 0.1}, {"mixup": 0.3}, {"mixup": 0.3, "label_smoothing": 0.2}]
)
def test_an_epoch_is_the_one_made_by_hand(ingredients: dict[str, float]) -> None:
    """Two steps of plain gradient descent on cross-entropy against the smoothed and mixed labels."""
    images, labels = batch(8)
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    recipe = Recipe(bfloat16=False, **ingredients)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40 * 50, 8))
    weight, bias = (p.detach().clone().requires_grad_() for p in network[1].parameters())

    random.seed(0)
    total, n_right = 0.0, 0
    for one in batches:
        inputs, targets = augment(*one, recipe, 8)
        logits = inputs.flatten(1) @ weight.T + bias
        wanted = targets if recipe.mixup else torch.eye(8)[one[1]]
        wanted = (1 - recipe.label_smoothing) * wanted + recipe.label_smoothing / 8
        loss = -(wanted * logits.log_softmax(1)).sum(1).mean()
        for parameter, slope in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            parameter.data -= 0.01 * slope
        total += loss.item() * len(inputs)
        n_right += int((logits.argmax(1) == one[1]).sum())

    random.seed(0)
    descent = torch.optim.SGD(network.parameters(), lr=0.01)
    constant = torch.optim.lr_scheduler.LambdaLR(descent, lambda _: 1.0)
    state = TrainingState(network, descent, constant, average=None, n_classes=8)
    loss, accuracy = train_one_epoch(state, batches, recipe)
    assert (loss, accuracy) == pytest.approx((total / 8, n_right / 8), rel=1e-5)
    torch.testing.assert_close(network[1].weight, weight)
    torch.testing.assert_close(network[1].bias, bias)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets_are_the_loss_of_two_labels(smoothing: float) -> None:
    """Mixup's targets in one cross-entropy: w times that of the clip's label, 1 - w of its partner's."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.tensor([0, 1, 1, 4, 2, 0, 0, 3])
    clips = torch.eye(8)[:, None, None]  # an input says which clips it was mixed of
    inputs, targets = mixup(clips, labels, 1.0, 5)
    shares = inputs[:, 0, 0]
    w, partner = shares[0, 0], labels[(shares * (1 - torch.eye(8))).argmax(1)]
    assert 0.5 <= w < 1 and not torch.equal(partner, labels)

    of_label, of_partner, of_both = (
        F.cross_entropy(logits, wanted, label_smoothing=smoothing) for wanted in (labels, partner, targets)
    )
    torch.testing.assert_close(of_both, w * of_label + (1 - w) * of_partner)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [BASELINE, CRNN], ids=lambda r: r.model)
def test_no_step_waits_for_the_gpu(pack: Pack, recipe: Recipe) -> None:
    """PyTorch raises an error where a step would ask the GPU for a number."""
    device = resolve_device("cuda")
    clips = SpectrogramDataset(pack.split("train"), device)
    network = to_device(build_model(recipe.model, 8, *clips.images.shape[1:]), device).train()
    optimizer = make_optimizer(network, recipe)
    average = MovingAverage(network, 0.9)
    for step, (images, labels) in enumerate(make_loader(clips, recipe.batch_size, shuffle=True)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one sets up libraries
        try:
            inputs, targets = augment(images, labels, recipe, 8)
            with autocast(device, recipe.bfloat16):
                logits = network(inputs).float()
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            average.update(network)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ----- evaluation -----


def test_accuracy_counts_clips_not_batches(pack: Pack, tmp_path: Path) -> None:
    """48 clips in batches of 20, 20 and 8: a mean of batch means would weigh the last ones too much."""
    log = load_log(train(replace(BASELINE, epochs=4), pack, tmp_path).log)
    for accuracies, n_clips in ((log["train_accuracy"], 48), (log["val_accuracy"], 24)):
        correct = accuracies * n_clips
        np.testing.assert_allclose(correct, correct.round(), atol=1e-4)

    network = load_model(tmp_path / "m_last.pt", "baseline", pack, CPU)
    scores = [
        evaluate(network, make_loader(SpectrogramDataset(pack.split("val")), size), True)
        for size in (24, 7, 1)
    ]
    for loss, accuracy in scores:
        assert loss == pytest.approx(scores[0][0], rel=1e-2)  # bfloat16 rounds differently by batch size
        assert accuracy == pytest.approx(scores[0][1], abs=1 / 24 + 1e-6)
    assert scores[0] == pytest.approx((log["val_loss"].iloc[-1], log["val_accuracy"].iloc[-1]))


def test_evaluation_changes_nothing_and_drops_nothing(pack: Pack, trained: dict[str, RunFiles]) -> None:
    network = load_model(trained["crnn"].last, "crnn", pack, CPU).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, labels = predict_logits(network, make_loader(SpectrogramDataset(pack.split("val")), 10), True)
    second, _ = predict_logits(network, make_loader(SpectrogramDataset(pack.split("val")), 10), True)
    assert torch.equal(first, second)
    assert labels.tolist() == pack.split("val").labels.tolist()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_clip_is_evaluated_on_its_own(pack: Pack, trained: dict[str, RunFiles]) -> None:
    """Neither what is random in training nor the other clips of a batch have a part in its logits."""
    for model, files in trained.items():
        network, val = load_model(files.best, model, pack, CPU), SpectrogramDataset(pack.split("val"))
        logits, _ = predict_logits(network, make_loader(val, 24), False)
        with torch.inference_mode():
            alone = torch.cat([network(to_input(image[None])) for image in val.images])
        torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-4)


# ----- the same bits -----


@pytest.mark.parametrize("recipe", [BASELINE, CRNN], ids=lambda r: r.model)
def test_a_second_run_gives_the_same_files(pack: Pack, tmp_path: Path, recipe: Recipe) -> None:
    first = train(recipe, pack, tmp_path / "one")
    torch.rand(7)  # what happened before does not matter
    np.random.rand(7)
    second = train(recipe, pack, tmp_path / "two")
    assert checkpoints(first) == checkpoints(second)
    columns = [c for c in LOG_COLUMNS if c != "seconds"]
    pd.testing.assert_frame_equal(load_log(first.log)[columns], load_log(second.log)[columns])

    other = train(replace(recipe, seed=1), pack, tmp_path / "three")
    for mine, theirs in zip(weights(first), weights(other), strict=True):
        assert not torch.equal(mine, theirs)


def test_every_epoch_draws_anew(pack: Pack, tmp_path: Path) -> None:
    """Nothing is learned: only what is drawn (order, shifts, masks, dropout) can change the loss."""
    log = load_log(train(replace(CRNN, lr=1e-12, filter_lr=1e-12, epochs=4), pack, tmp_path).log)
    assert np.diff(np.sort(log["train_loss"])).min() > 1e-5


def test_several_threads_give_the_same_files_too(pack: Pack, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    recipe = replace(CRNN, model="crnn_no_gru", epochs=1, batch_size=48)
    try:
        first, second = (train(recipe, pack, tmp_path / name) for name in ("one", "two"))
    finally:
        torch.set_num_threads(threads)
    assert checkpoints(first) == checkpoints(second)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [BASELINE, CRNN], ids=lambda r: r.model)
def test_a_gpu_gives_the_same_files_too(pack: Pack, tmp_path: Path, recipe: Recipe) -> None:
    files = [files_in(tmp_path / name) for name in ("one", "two")]
    for one in files:
        fit(recipe, pack, one, resolve_device("cuda"), progress=False)
    assert checkpoints(files[0]) == checkpoints(files[1])
    accuracy = load_checkpoint(files[0].best)["val_accuracy"]
    network = load_model(files[0].best, recipe.model, pack, CPU)
    assert evaluate_split(network, pack, "val", CPU)["accuracy"] == pytest.approx(accuracy, abs=2 / 24)


# ----- devices -----


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
