"""Stage 5: the networks' shapes, sizes and inner workings, checked against independent computations."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fma_nb.model import (
    CHANNELS,
    CRNN,
    HIDDEN,
    MODELS,
    POOLINGS,
    BaselineCNN,
    ShuffleFrames,
    build_model,
    count_parameters,
    time_average,
    trace_layers,
)
from fma_nb.project import FmaNbError

RECURRENCES = ("gru", "lstm", "one_way", "none")


def spectrograms(batch: int, n_mels: int, n_frames: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 1, n_mels, n_frames, generator=torch.Generator().manual_seed(seed))


def build(name: str, n_classes: int = 8, n_mels: int = 128, n_frames: int = 128) -> nn.Module:
    torch.manual_seed(0)
    options = {} if name == "baseline" else {"width": 0.25}
    return build_model(name, n_classes, n_mels, n_frames, **options)


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
def test_clips_of_a_batch_do_not_know_of_each_other(name: str) -> None:
    model, x = build(name, n_mels=64, n_frames=64).eval(), spectrograms(5, 64, 64)
    with torch.inference_mode():
        alone = torch.cat([model(clip[None]) for clip in x])
        torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("n_mels", [128, 48])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_the_crnns_size_by_hand(recurrence: str, width: float, pooling: str, n_mels: int) -> None:
    channels, hidden = [int(width * n) for n in CHANNELS], int(width * HIDDEN)
    cnn = 25 * channels[0] + 2 * channels[0]
    for n_in, n_out in pairwise(channels):
        cnn += 9 * n_in * n_out + 2 * n_out
    gates = {"gru": 3, "one_way": 3, "lstm": 4, "none": 0}[recurrence]
    directions = 1 if recurrence == "one_way" else 2
    rnn = directions * gates * hidden * (channels[-1] + hidden + 2)
    features = (directions * hidden if gates else channels[-1]) * {"mean_max": 2, "mean": 1}[pooling]
    expected = cnn + rnn + (features + 1) * 8

    options: dict[str, Any] = {"recurrence": recurrence, "width": width, "pooling": pooling}
    assert count_parameters(CRNN(8, n_mels, band_norm=False, **options)) == expected
    # Standardising the mel bands has nothing to learn.
    assert count_parameters(CRNN(8, n_mels, band_norm=True, **options)) == expected


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


def crnn(recurrence: str = "gru", **options: Any) -> CRNN:
    torch.manual_seed(0)
    return CRNN(8, n_mels=32, width=0.25, recurrence=recurrence, **options).eval()


def embeddings(model: CRNN, sequence: Tensor) -> Tensor:
    with torch.no_grad():
        return model.embed(sequence)


def steps(model: CRNN, sequence: Tensor) -> Tensor:
    """What the recurrent layer gives at every step."""
    assert model.rnn is not None
    with torch.no_grad():
        return model.rnn(sequence)[0]


def sequences() -> Tensor:
    """Three sequences of twelve feature vectors."""
    return torch.randn(3, 12, CHANNELS[-1] // 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_a_gru_order_does_not_matter(pooling: str) -> None:
    sequence = sequences()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    without = crnn("none", pooling=pooling)

    torch.testing.assert_close(embeddings(without, sequence), embeddings(without, sequence[:, order]))
    pooled = [sequence.mean(1), sequence.max(1).values][: 2 if pooling == "mean_max" else 1]
    torch.testing.assert_close(embeddings(without, sequence), torch.cat(pooled, dim=1))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("recurrence", ["gru", "lstm", "one_way"])
def test_with_a_recurrence_order_matters(recurrence: str, pooling: str) -> None:
    sequence = sequences()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    model = crnn(recurrence, pooling=pooling)
    changed = embeddings(model, sequence) - embeddings(model, sequence[:, order])
    assert changed.abs().mean() > 1e-3


@pytest.mark.parametrize("recurrence", ["gru", "lstm"])
def test_the_gru_is_read_at_every_step(recurrence: str) -> None:
    """The backward half must know the first frame, the forward half the last: no single step has both."""
    n_hidden = HIDDEN // 4
    model = crnn(recurrence)
    before = embeddings(model, sequences())
    assert before.shape == (3, 4 * n_hidden)
    halves = {"forward": slice(0, n_hidden), "backward": slice(n_hidden, 2 * n_hidden)}
    for step in range(12):
        sequence = sequences()
        sequence[:, step] += 1
        changed = (embeddings(model, sequence) - before)[:, : 2 * n_hidden].abs()
        for name, half in halves.items():
            assert changed[:, half].max() > 1e-3, f"the {name} half does not see step {step}"
    # Mean and maximum: the second half of the embedding is nowhere below the first.
    assert (before[:, 2 * n_hidden :] >= before[:, : 2 * n_hidden]).all()


def test_one_way_reads_forwards_only() -> None:
    """A step is known from there on and not before; in both directions the first step knows the last."""
    model = crnn("one_way", pooling="mean")
    before, pooled = steps(model, sequences()), embeddings(model, sequences())
    assert before.shape == (3, 12, HIDDEN // 4)
    torch.testing.assert_close(pooled, before.mean(1))
    for step in range(12):
        sequence = sequences()
        sequence[:, step] += 1
        changed = (steps(model, sequence) - before).abs().amax(dim=(0, 2))
        assert (changed[:step] == 0).all()
        assert changed[step] > 1e-2
        assert (embeddings(model, sequence) - pooled).abs().max() > 1e-3

    both_ways, sequence = crnn("gru"), sequences()
    sequence[:, -1] += 1
    assert not torch.equal(steps(both_ways, sequence)[:, 0], steps(both_ways, sequences())[:, 0])


@pytest.mark.parametrize(
    ("name", "kind", "both_ways", "shuffled"),
    [
        ("crnn", nn.GRU, True, False),
        ("crnn_no_gru", None, False, False),
        ("crnn_lstm", nn.LSTM, True, False),
        ("crnn_one_way", nn.GRU, False, False),
        ("crnn_shuffled", nn.GRU, True, True),
    ],
)
def test_a_variant_differs_in_one_thing(
    name: str, kind: type[nn.RNNBase] | None, both_ways: bool, shuffled: bool
) -> None:
    whole, variant = build("crnn"), build(name)
    assert isinstance(variant, CRNN)
    assert isinstance(variant.shuffle, ShuffleFrames) == shuffled
    if kind is None:
        assert variant.rnn is None
    else:
        assert type(variant.rnn) is kind
        assert variant.rnn.bidirectional == both_ways

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        named = model.named_parameters()
        return {name: p.shape for name, p in named if not name.startswith(("classifier", "rnn"))}

    assert shapes(variant) == shapes(whole)


def test_options_reach_every_variant() -> None:
    for name in MODELS[1:]:
        model = build_model(name, 8, 32, 64, width=0.5, pooling="mean", band_norm=False)
        assert isinstance(model, CRNN)
        assert (model.features[0][0].out_channels, model.pooling) == (CHANNELS[0] // 2, "mean")
        assert not any(isinstance(part, nn.BatchNorm1d) for part in model.modules())


def test_the_sequence_keeps_a_quarter_of_the_frames() -> None:
    assert crnn("none").sequence(spectrograms(2, 32, 1292)).shape == (2, 323, CHANNELS[-1] // 4)


def test_band_norm_takes_the_level_and_the_spread_out_of_every_mel_band() -> None:
    x = spectrograms(8, 32, 40)
    generator = torch.Generator().manual_seed(1)
    level, spread = torch.rand(2, 32, 1, generator=generator)
    with torch.no_grad():
        for band_norm in (True, False):
            model = crnn("none", band_norm=band_norm).train()  # statistics of the batch
            changed = (model.sequence(x * (0.5 + spread) + level) - model.sequence(x)).abs().max()
            assert (changed < 0.01) == band_norm


def test_batch_normalisation_remembers_a_tenth_of_every_batch() -> None:
    model = crnn("none").train()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    means: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
    for norm in norms:
        norm.register_forward_hook(
            lambda norm, inputs, _: means[norm].append(inputs[0].transpose(0, 1).flatten(1).mean(1))
        )
    for seed in range(2):
        model(spectrograms(8, 32, 40, seed))
    assert len(norms) == 1 + len(CHANNELS)
    for norm, (first, second) in means.items():
        torch.testing.assert_close(norm.running_mean, 0.09 * first + 0.1 * second, rtol=1e-4, atol=1e-6)


def numbered_frames(n_clips: int = 3, n_mels: int = 4, n_frames: int = 40) -> Tensor:
    """Clips whose every value is the number of its frame."""
    return torch.arange(float(n_frames)).expand(n_clips, 1, n_mels, n_frames)


def orders(shuffled: Tensor) -> list[tuple[float, ...]]:
    """Which frame of each clip went where; it must be the same in all mel bands."""
    assert torch.equal(shuffled, shuffled[:, :, :1].expand(shuffled.shape))
    return [tuple(clip[0, 0].tolist()) for clip in shuffled]


@pytest.mark.parametrize("training", [False, True])
def test_shuffling_gives_every_clip_an_order_of_its_own_in_training_only(training: bool) -> None:
    torch.manual_seed(0)
    found = orders(ShuffleFrames().train(training)(numbered_frames()))
    assert [sorted(order) for order in found] == [list(range(40))] * 3
    assert len({*found, tuple(range(40))}) == (4 if training else 2)
    for order in found:  # far from where they were, not just neighbours swapped
        assert np.abs(np.array(order) - np.arange(40)).mean() > 8


def test_shuffling_keeps_frames_whole_and_clips_apart() -> None:
    x = spectrograms(3, 5, 40)
    shuffled = ShuffleFrames().eval()(x)
    for before, after in zip(x[:, 0], shuffled[:, 0], strict=True):
        assert sorted(before.T.tolist()) == sorted(after.T.tolist())


def test_shuffling_is_drawn_anew_in_training_and_fixed_in_evaluation() -> None:
    shuffle, x = ShuffleFrames(), numbered_frames()
    shuffle.train()
    torch.manual_seed(0)
    first, second = orders(shuffle(x)), orders(shuffle(x))
    assert all(one != two for one, two in zip(first, second, strict=True))
    torch.manual_seed(0)
    assert orders(shuffle(x)) == first  # training is reproducible

    shuffle.eval()
    state = torch.get_rng_state()
    fixed = orders(shuffle(x))
    assert torch.equal(torch.get_rng_state(), state)  # evaluation takes nothing from training's draws
    torch.manual_seed(1)
    assert orders(shuffle(x)) == fixed


def test_the_shuffled_crnn_is_the_crnn_on_shuffled_frames() -> None:
    x = spectrograms(4, 32, 64)
    plain, shuffled = crnn(), crnn(shuffle=True)
    with torch.no_grad():
        assert torch.equal(shuffled(x), plain(ShuffleFrames().eval()(x)))
        assert (shuffled(x) - plain(x)).abs().max() > 1e-4
        assert torch.equal(shuffled(x), shuffled(x))


@pytest.mark.parametrize("options", [{"recurrence": "rnn"}, {"pooling": "median"}])
def test_crnn_refuses_what_it_does_not_know(options: dict[str, str]) -> None:
    with pytest.raises(FmaNbError, match="choose among gru, lstm, one_way, none; and mean_max or mean"):
        CRNN(8, **options)


def test_the_baseline_has_no_options() -> None:
    with pytest.raises(FmaNbError, match="no options: width"):
        build_model("baseline", 8, 128, 128, width=2.0)


@pytest.mark.parametrize("name", ["baseline", "crnn"])
def test_the_receptive_field_is_what_reaches_a_number(name: str) -> None:
    """A pixel that is not a number spoils exactly those numbers that have seen it."""
    network = build_model(name, 8, 128, 128).eval()
    field = [trace.field for trace in trace_layers(network, 128, 128) if trace.field][-1]
    for axis, size in enumerate(field):
        x = torch.zeros(128, 1, 128, 128)
        middle = torch.full((128,), 64)
        place = [torch.arange(128), middle] if axis == 0 else [middle, torch.arange(128)]
        x[torch.arange(128), 0, place[0], place[1]] = torch.nan
        with torch.inference_mode():
            features = network.features(x)
        centre = features[:, 0, features.shape[2] // 2, features.shape[3] // 2]
        assert int(centre.isnan().sum()) == size


def test_the_trace_names_every_layer_and_leaves_the_model_as_it_was() -> None:
    network = build_model("crnn", 8, 128, 64)
    traces = trace_layers(network, 128, 64)
    assert [trace.name for trace in traces] == [
        "5 × 5, stride 2",
        "3 × 3, stride 2",
        *["3 × 3, pool 2 × 1"] * 3,
        "GRU",
        "Linear",
    ]
    assert [trace.shape for trace in traces[-3:]] == [(128, 4, 16), (16, 192), (8,)]
    assert [trace.field for trace in traces[-2:]] == [None, None]
    assert network.training
    assert not any(layer._forward_hooks for layer in network.modules())
