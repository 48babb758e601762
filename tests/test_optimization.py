"""Stage 6c: the optimizers' steps, the learning rate and the moving average, checked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import BASELINE, CPU, CRNN, data_fixture, pack_fixture, train, trained_fixture  # noqa: F401

from fma_nb.dataset import Pack, SpectrogramDataset, make_loader
from fma_nb.model import build_model
from fma_nb.optimization import MovingAverage, lr_factor, make_optimizer, orthogonalize
from fma_nb.recipe import Recipe, default_recipe
from fma_nb.runs.checkpoint import RunFiles, load_checkpoint, load_log, load_model
from fma_nb.training import evaluate

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
@pytest.mark.parametrize("recipe", [BASELINE, CRNN], ids=lambda r: r.model)
def test_the_average_is_the_one_made_by_hand(
    pack: Pack, tmp_path: Path, recipe: Recipe, decay: float
) -> None:
    """One step an epoch and a constant learning rate: the weights after n epochs are those of step n."""
    plain = replace(recipe, batch_size=48, warmup=None, ema=0.0)
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
    log = load_log(files.log).set_index("epoch")
    for path in (files.best, files.last):
        row = log.loc[load_checkpoint(path)["epoch"], ["val_loss", "val_accuracy"]]
        judged = evaluate(load_model(path, "baseline", pack, CPU), loader, True)
        assert judged == pytest.approx(tuple(row), rel=1e-6)

    last = load_checkpoint(files.last)
    torch.save(last | {"model_state": last["raw_state"]}, tmp_path / "raw.pt")
    raw_loss, _ = evaluate(load_model(tmp_path / "raw.pt", "baseline", pack, CPU), loader, True)
    assert abs(raw_loss - log["val_loss"].iloc[-1]) > 1e-4
    # Only `last` carries the raw weights too; without an average they are the same.
    assert "raw_state" not in load_checkpoint(files.best)
    baseline = load_checkpoint(trained["baseline"].last)
    assert baseline["n_averaged"] == 0
    for name, value in baseline["raw_state"].items():
        assert torch.equal(value, baseline["model_state"][name])


# ----- the learning rate -----


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
    assert load_log(trained["crnn"].log)["lr"].tolist() == pytest.approx(expected)


# ----- optimizers -----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_shrinks_weights_and_spares_biases_and_gains(optimizer: str) -> None:
    model = build_model("crnn", 8, 32, 32, width=0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = Recipe("crnn", optimizer=optimizer, weight_decay=0.5, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, recipe).step()
    for name, parameter in model.named_parameters():
        shrunk = 0.95 if name.startswith("rnn.weight") or name == "classifier.weight" else 1
        if parameter.ndim == 4:  # Muon keeps the filters' length instead
            shrunk = len(parameter) ** 0.5 / float(before[name].norm()) if optimizer == "muon" else 0.95
        torch.testing.assert_close(parameter.detach(), shrunk * before[name])


@pytest.mark.parametrize("shape", [(8, 27), (16, 16), (40, 9)])
def test_orthogonal_keeps_the_directions_of_a_matrix_and_levels_their_sizes(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    seen = left.T @ orthogonalize(matrix) @ right.T
    sizes = seen.diagonal()
    assert 0.6 < sizes.min() < sizes.max() < 1.25
    torch.testing.assert_close(seen, sizes.diag(), atol=1e-4, rtol=0)


def test_muon_steps_equally_far_in_all_directions_and_leaves_the_rest_to_adamw() -> None:
    recipe = replace(default_recipe("crnn"), width=0.25)
    networks = [build_model("crnn", 8, 32, 32, **recipe.architecture()) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [
        make_optimizer(network, replace(recipe, optimizer=kind))
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
        step = (old * len(old) ** 0.5 / old.norm() - ours) / recipe.filter_lr
        sizes = torch.linalg.svdvals(step.detach().flatten(1))
        assert 0.6 < sizes.min() < sizes.max() < 1.25
