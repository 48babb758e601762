"""Stage 5: the networks' shapes, sizes and inner workings, checked against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fma_nb.model import CRNN, MODELS, BaselineCNN, build_model, count_parameters, time_average
from fma_nb.project import FmaNbError


def spectrograms(batch: int, n_mels: int, n_frames: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, n_mels, n_frames, generator=torch.Generator().manual_seed(seed))


def build(name: str, n_classes: int = 8, n_mels: int = 128, n_frames: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, n_classes, n_mels, n_frames)


@pytest.mark.parametrize(("n_frames", "n_classes"), [(40, 8), (128, 16), (300, 2), (1292, 8)])
@pytest.mark.parametrize("name", MODELS)
def test_any_length_and_number_of_genres(name: str, n_frames: int, n_classes: int) -> None:
    model = build(name, n_classes, n_mels=32, n_frames=n_frames).eval()
    logits = model(spectrograms(2, 32, n_frames))
    assert logits.shape == (2, n_classes)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_other_lengths_than_it_was_made_for(name: str) -> None:
    model = build(name, n_mels=64, n_frames=128).eval()
    for n_frames in (40, 129, 300):
        assert model(spectrograms(2, 64, n_frames)).shape == (2, 8)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_logits(name: str) -> None:
    logits = build(name, n_mels=64, n_frames=64).eval()(spectrograms(16, 64, 64))
    assert (logits < 0).any()
    assert (logits.sum(dim=1) - 1).abs().min() > 1e-3
    assert logits.exp().sum(dim=1).sub(1).abs().min() > 1e-3  # no log-softmax either


@pytest.mark.parametrize("n_classes", [8, 3])
@pytest.mark.parametrize(("n_frames", "pooled_frames"), [(128, 16), (256, 32), (1292, 32), (40, 5)])
def test_the_baselines_size_by_hand(n_classes: int, n_frames: int, pooled_frames: int) -> None:
    convolutions = (1 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 9 + 1) * 64
    linear = 64 * 16 * pooled_frames * n_classes + n_classes
    assert count_parameters(build("baseline", n_classes, n_frames=n_frames)) == convolutions + linear


@pytest.mark.parametrize("channels", [(16, 32, 64, 128), (8, 8, 24)])
def test_the_crnns_size_by_hand(channels: tuple[int, ...]) -> None:
    cnn = 2 * 128  # scale and offset of each mel band
    for n_in, n_out in zip((1, *channels), channels, strict=False):
        cnn += 9 * n_in * n_out + 2 * n_out
    one_direction = 3 * 96 * (channels[-1] + 96) + 2 * 3 * 96
    with_gru, without = (CRNN(8, 128, channels, n_hidden) for n_hidden in (96, 0))
    assert count_parameters(with_gru) == cnn + 2 * one_direction + (4 * 96 + 1) * 8
    assert count_parameters(without) == cnn + (2 * channels[-1] + 1) * 8


def test_frozen_parameters_are_not_counted() -> None:
    model = build("baseline")
    whole = count_parameters(model)
    model.classifier.bias.requires_grad_(False)
    assert count_parameters(model) == whole - 8


def test_unknown_model_is_named() -> None:
    with pytest.raises(FmaNbError, match="model='resnet' is unknown: choose one of baseline, crnn"):
        build_model("resnet", 8, 128, 128)


def averages_by_integration(x: np.ndarray, n_bins: int) -> np.ndarray:
    """Mean of a step function over equal stretches, from its integral."""
    integral = np.concatenate([[0], np.cumsum(x)])
    edges = np.linspace(0, len(x), n_bins + 1)
    return np.diff(np.interp(edges, np.arange(len(x) + 1), integral)) / (len(x) / n_bins)


@pytest.mark.parametrize(("n_frames", "n_bins"), [(1292, 256), (300, 256), (257, 256), (10, 3), (512, 256)])
def test_time_average_is_an_average(n_frames: int, n_bins: int) -> None:
    x = spectrograms(2, 5, n_frames)
    averaged = time_average(x, n_bins)
    assert averaged.shape == (2, 1, 5, n_bins)
    for i in range(2):
        for band in range(5):
            expected = averages_by_integration(x[i, 0, band].double().numpy(), n_bins)
            np.testing.assert_allclose(averaged[i, 0, band].numpy(), expected, atol=2e-4)
    torch.testing.assert_close(averaged.mean(-1), x.mean(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(time_average(torch.ones(1, 4, n_frames), n_bins), torch.ones(1, 4, n_bins))


def test_time_average_of_whole_groups_is_their_mean() -> None:
    x = spectrograms(2, 3, 1024)
    torch.testing.assert_close(time_average(x, 256), x.unflatten(-1, (256, 4)).mean(-1))


def test_time_average_leaves_short_input_alone() -> None:
    x = spectrograms(2, 3, 40)
    assert torch.equal(time_average(x, 256), x)
    assert torch.equal(time_average(x, 40), x)


def test_the_baseline_repeats_a_short_clip() -> None:
    model = BaselineCNN(8, n_mels=32, n_frames=48).eval()
    clip = spectrograms(2, 32, 20)
    repeated = torch.cat([clip, clip, clip[..., :8]], dim=-1)
    torch.testing.assert_close(model(clip), model(repeated))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = build(name, n_mels=32, n_frames=64).train()
    loss = nn.functional.cross_entropy(model(spectrograms(16, 32, 64)), torch.arange(16) % 8)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def crnn(*, n_hidden: int) -> CRNN:
    torch.manual_seed(0)
    return CRNN(8, n_mels=32, channels=(8, 16, 24), n_hidden=n_hidden).eval()


def embeddings(model: CRNN, sequence: Tensor) -> Tensor:
    with torch.no_grad():
        return model.embed(sequence)


def sequences() -> Tensor:
    """Three sequences of twelve feature vectors."""
    return torch.randn(3, 12, 24, generator=torch.Generator().manual_seed(0))


def test_without_a_gru_order_does_not_matter() -> None:
    sequence = sequences()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    without, with_gru = crnn(n_hidden=0), crnn(n_hidden=20)

    torch.testing.assert_close(embeddings(without, sequence), embeddings(without, sequence[:, order]))
    changed = embeddings(with_gru, sequence) - embeddings(with_gru, sequence[:, order])
    assert changed.abs().mean() > 1e-3
    torch.testing.assert_close(
        embeddings(without, sequence), torch.cat([sequence.mean(1), sequence.max(1).values], dim=1)
    )


def test_the_gru_is_read_at_every_step() -> None:
    """The backward half must know the first frame, the forward half the last: no single step has both."""
    n_hidden = 20
    model = crnn(n_hidden=n_hidden)
    before = embeddings(model, sequences())
    halves = {"forward": slice(0, n_hidden), "backward": slice(n_hidden, 2 * n_hidden)}
    for step in range(12):
        sequence = sequences()
        sequence[:, step] += 1
        changed = (embeddings(model, sequence) - before)[:, : 2 * n_hidden].abs()
        for name, half in halves.items():
            assert changed[:, half].max() > 1e-3, f"the {name} half does not see step {step}"
    # Mean and maximum: the second half of the embedding is nowhere below the first.
    assert (before[:, 2 * n_hidden :] >= before[:, : 2 * n_hidden]).all()


def test_only_the_crnn_has_a_gru() -> None:
    with_gru, without = (build(name) for name in ("crnn", "crnn_no_gru"))
    assert isinstance(with_gru, CRNN) and isinstance(without, CRNN)
    assert with_gru.gru is not None and with_gru.gru.bidirectional
    assert without.gru is None
    shapes = {name: p.shape for name, p in without.named_parameters() if not name.startswith("classifier")}
    assert shapes == {
        name: p.shape for name, p in with_gru.named_parameters() if not name.startswith(("classifier", "gru"))
    }


def test_the_sequence_keeps_a_quarter_of_the_frames() -> None:
    assert crnn(n_hidden=0).sequence(spectrograms(2, 32, 1292)).shape == (2, 323, 24)
