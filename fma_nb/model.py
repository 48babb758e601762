"""Stage 5, model: the baseline CNN, and the CRNN with its variants, one without recurrence.

All take spectrograms float [shape=(batch, 1, n_mels, n_frames)] in the range 0 to 1 and return logits
[shape=(batch, n_classes)]: no softmax inside, cross-entropy wants it so. Notebooks 03 and 04 build the
same networks in view; a test holds the two against each other.

References
----------
K. Choi, G. Fazekas, M. Sandler, K. Cho: "Convolutional Recurrent Neural Networks for Music
Classification", ICASSP 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fma_nb.project import FmaNbError

BASELINE_FRAMES = 256  # at most, so that the linear layer stays small

# The CRNN's convolutions: feature maps, and the pooling over (mel bands, frames) after each. The first two
# have a stride of 2 instead: large pictures cost most, so none are computed that pooling would throw away.
CHANNELS = (16, 32, 64, 96, 128)
POOLS = (None, None, (2, 1), (2, 1), (2, 1))
RECURRENCES = ("gru", "lstm", "one_way", "none")
POOLINGS = ("mean_max", "mean")
HIDDEN = 96


def time_average(x: Tensor, n_bins: int) -> Tensor:
    """Average the last axis into ``n_bins`` equal stretches of time; shorter input is left as it is.

    A frame on a border counts in part to either side; adaptive pooling would count it in full on both.
    """
    n_frames = x.shape[-1]
    if n_frames <= n_bins:
        return x
    edges = torch.linspace(0, n_frames, n_bins + 1, device=x.device)
    frames = torch.arange(n_frames, device=x.device)[:, None]
    overlap = torch.minimum(edges[1:], frames + 1) - torch.maximum(edges[:-1], frames)
    return x @ (overlap.clamp(min=0) * (n_bins / n_frames)).to(x.dtype)


class BaselineCNN(nn.Module):
    """Three convolution blocks and one linear layer: the course's baseline.

    It is built for spectrograms of one size, of which it keeps at most 256 frames, by averaging in time.
    ``channels`` are the blocks' feature maps; ``dropout`` is the share of activations dropped after each.
    """

    def __init__(
        self,
        n_classes: int,
        n_mels: int = 128,
        n_frames: int = 128,
        channels: Sequence[int] = (16, 32, 64),
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.n_frames = min(n_frames, BASELINE_FRAMES)
        blocks: list[nn.Module] = []
        for n_in, n_out in zip((1, *channels), channels, strict=False):
            blocks += [
                nn.Conv2d(n_in, n_out, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Dropout(dropout),
            ]
        self.features = nn.Sequential(*blocks)
        shrink = 2 ** len(channels)
        n_features = channels[-1] * (n_mels // shrink) * (self.n_frames // shrink)
        self.classifier = nn.Linear(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [shape=(batch, n_classes)] of ``x`` [shape=(batch, 1, n_mels, n_frames)]."""
        x = self.features(self._to_length(x))  # (batch, 64, n_mels / 8, frames / 8)
        return self.classifier(x.flatten(1))

    def _to_length(self, x: Tensor) -> Tensor:
        """Average to the frames the linear layer was made for; repeat a clip that has fewer."""
        if x.shape[-1] < self.n_frames:
            x = x.repeat(1, 1, 1, -(-self.n_frames // x.shape[-1]))[..., : self.n_frames]
        return time_average(x, self.n_frames)


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU, and max pooling over (mel bands, frames) or a stride of 2."""

    def __init__(self, n_in: int, n_out: int, pool: tuple[int, int] | None, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, kernel, stride=1 if pool else 2, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.MaxPool2d(pool) if pool else nn.Identity(),
        )


class ShuffleFrames(nn.Module):
    """Put the frames of every clip into random order: what is left is a bag of spectra.

    In training the order is drawn anew for each clip; in evaluation it is always the same one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle the last axis of ``x`` [shape=(batch, 1, n_mels, n_frames)], each clip on its own."""
        if not self.training:
            fixed = torch.Generator().manual_seed(0)  # on the CPU: the same order on every device
            return x[..., torch.randperm(x.shape[-1], generator=fixed).to(x.device)]
        order = torch.rand(len(x), x.shape[-1], device=x.device).argsort(1)
        return x.gather(3, order[:, None, None].expand(x.shape))


class CRNN(nn.Module):
    """A CNN turns the spectrogram into a sequence of feature vectors; a bidirectional GRU reads it.

    The GRU's outputs are pooled over time by mean and by maximum. Reading only the last step would
    throw half of a bidirectional network away: its backward half has seen a single step there.

    ``recurrence`` is ``gru``, ``lstm``, ``one_way`` (a GRU that reads forwards only) or ``none``, which pools
    the features directly. ``shuffle`` shuffles the frames of every clip first: the counter-experiment.
    ``pooling`` over time is ``mean_max`` or ``mean``. With ``band_norm`` every mel band is standardised on
    its own before the first convolution. ``width`` is a factor on the feature maps of the convolutions and
    the units of the GRU, ``dropout`` the share of the pooled features dropped before the linear layer.
    """

    def __init__(
        self,
        n_classes: int,
        n_mels: int = 128,
        *,
        recurrence: str = "gru",
        shuffle: bool = False,
        pooling: str = "mean_max",
        band_norm: bool = True,
        width: float = 1.0,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        if recurrence not in RECURRENCES or pooling not in POOLINGS:
            choices = f"{', '.join(RECURRENCES)}; and {' or '.join(POOLINGS)}"
            raise FmaNbError(f"recurrence={recurrence!r}, pooling={pooling!r}: choose among {choices}.")
        self.shuffle = ShuffleFrames() if shuffle else nn.Identity()
        # Nothing to learn before the first convolution: the backward pass leaves out its input's gradient.
        self.band_norm = nn.BatchNorm1d(n_mels, affine=False) if band_norm else nn.Identity()
        channels = [round(width * n) for n in CHANNELS]
        blocks = [ConvBlock(1, channels[0], POOLS[0], kernel=5)]
        blocks += [ConvBlock(*sizes) for sizes in zip(channels, channels[1:], POOLS[1:], strict=False)]
        self.features = nn.Sequential(*blocks)
        n_hidden = round(width * HIDDEN)
        self.rnn = _recurrent_layer(recurrence, channels[-1], n_hidden)
        n_features = {"none": channels[-1], "one_way": n_hidden}.get(recurrence, 2 * n_hidden)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(n_features * (2 if pooling == "mean_max" else 1), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [shape=(batch, n_classes)] of ``x`` [shape=(batch, 1, n_mels, n_frames)]."""
        return self.classify(self.sequence(x))

    def sequence(self, x: Tensor) -> Tensor:
        """Return the feature vectors over time [shape=(batch, n_steps, channels)]."""
        x = self.shuffle(x)
        x = self.band_norm(x.squeeze(1)).unsqueeze(1)  # every mel band standardised on its own
        x = self.features(x)  # (batch, channels, n_mels / 32, n_frames / 4)
        return x.mean(dim=2).transpose(1, 2)

    def classify(self, sequence: Tensor) -> Tensor:
        """Return logits of a sequence of feature vectors [shape=(batch, n_steps, channels)]."""
        return self.classifier(self.dropout(self.embed(sequence)))

    def embed(self, sequence: Tensor) -> Tensor:
        """Run the recurrent layer, where there is one, and pool over time [shape=(batch, n_features)]."""
        if self.rnn is not None:
            sequence, _ = self.rnn(sequence)  # (batch, n_steps, 2 * n_hidden)
        mean = sequence.mean(dim=1)
        return torch.cat([mean, sequence.amax(dim=1)], dim=1) if self.pooling == "mean_max" else mean


def _recurrent_layer(recurrence: str, n_in: int, n_hidden: int) -> nn.RNNBase | None:
    if recurrence == "none":
        return None
    kind = nn.LSTM if recurrence == "lstm" else nn.GRU
    return kind(n_in, n_hidden, batch_first=True, bidirectional=recurrence != "one_way")


CRNN_VARIANTS: dict[str, dict[str, Any]] = {
    "crnn": {},
    "crnn_no_gru": {"recurrence": "none"},
    "crnn_lstm": {"recurrence": "lstm"},
    "crnn_one_way": {"recurrence": "one_way"},
    "crnn_shuffled": {"shuffle": True},
}
MODELS = ("baseline", *CRNN_VARIANTS)


def build_model(name: str, n_classes: int, n_mels: int, n_frames: int, **options: Any) -> nn.Module:
    """Build one of `MODELS` for spectrograms of ``n_mels`` bands and ``n_frames`` frames.

    Options are ``pooling``, ``band_norm``, ``width`` and ``dropout`` of a `CRNN`; the baseline has none.
    Raises `FmaNbError` when the name is not one of `MODELS`, or the baseline is given options.
    """
    if name == "baseline" and not options:
        return BaselineCNN(n_classes, n_mels, n_frames)
    if name == "baseline":
        raise FmaNbError(f"The baseline's architecture has no options: {', '.join(options)}.")
    if name not in MODELS:
        raise FmaNbError(f"model={name!r} is unknown: choose one of {', '.join(MODELS)}.")
    return CRNN(n_classes, n_mels, **CRNN_VARIANTS[name], **options)


@dataclass(frozen=True)
class LayerTrace:
    """What one layer gives, and how much of the spectrogram a single number of it has seen."""

    name: str  # in words
    shape: tuple[int, ...]  # of one clip: (channels, mel bands, frames), (steps, features) or (classes,)
    field: tuple[int, int] | None  # receptive field, (mel bands, frames); None once all has been seen


def trace_layers(model: nn.Module, n_mels: int, n_frames: int) -> list[LayerTrace]:
    """Send a clip through a model; return its convolutions (with their pooling), GRU and linear layer.

    The receptive field r and the distance j of neighbours in the input grow with every kernel k and
    stride s as r + (k - 1) j and j s (A. Araujo et al.: "Computing Receptive Fields of Convolutional Neural
    Networks", Distill 2019).
    """
    traces: list[LayerTrace] = []
    field, jump = np.array([1, 1]), np.array([1, 1])

    def trace(layer: nn.Module, _: Any, output: Any) -> None:
        shape = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            traces.append(LayerTrace(type(layer).__name__, shape, None))
            return
        kernel, stride = np.broadcast_to(layer.kernel_size, 2), np.broadcast_to(layer.stride, 2)
        field[:] += (kernel - 1) * jump
        jump[:] *= stride
        name = f"{kernel[0]} × {kernel[1]}"
        if isinstance(layer, nn.MaxPool2d):
            name = f"{traces.pop().name}, pool {name}"
        elif stride.max() > 1:
            name += f", stride {stride[0]}"
        traces.append(LayerTrace(name, shape, (int(field[0]), int(field[1]))))

    kinds = nn.Conv2d | nn.MaxPool2d | nn.RNNBase | nn.Linear
    hooks = [layer.register_forward_hook(trace) for layer in model.modules() if isinstance(layer, kinds)]
    training = model.training
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 1, n_mels, n_frames, device=next(model.parameters()).device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return traces


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
