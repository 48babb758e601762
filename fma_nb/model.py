"""Stage 5, model: the baseline CNN, the CRNN, and the CRNN without its recurrence.

All take spectrograms float [shape=(batch, 1, n_mels, n_frames)] in the range 0 to 1 and return logits
[shape=(batch, n_classes)]: no softmax inside, cross-entropy wants it so. Notebooks 03 and 04 build the
same networks in view; a test holds the two against each other.

References
----------
K. Choi, G. Fazekas, M. Sandler, K. Cho: "Convolutional Recurrent Neural Networks for Music
Classification", ICASSP 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fma_nb.project import FmaNbError

MODELS = ("baseline", "crnn", "crnn_no_gru")
BASELINE_FRAMES = 256


def time_average(x: Tensor, n_bins: int) -> Tensor:
    """Average the last axis into ``n_bins`` equal stretches of time; shorter input is left as it is.

    A product with a constant matrix: unlike adaptive pooling, its gradient is deterministic on CUDA.
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

    Parameters
    ----------
    n_classes
        Number of genres.
    n_mels, n_frames
        Size of the spectrograms it will see; at most 256 frames are kept, by averaging in time.
    channels
        Feature maps of the three blocks.
    dropout
        Share of activations dropped after each block.
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
        x = self._fit(x)
        x = self.features(x)  # (batch, 64, n_mels / 8, frames / 8)
        return self.classifier(x.flatten(1))

    def _fit(self, x: Tensor) -> Tensor:
        """Average to the frames the linear layer was made for; repeat a clip that has fewer."""
        if x.shape[-1] < self.n_frames:
            x = x.repeat(1, 1, 1, -(-self.n_frames // x.shape[-1]))[..., : self.n_frames]
        return time_average(x, self.n_frames)


class ConvBlock(nn.Sequential):
    """3×3 convolution, batch normalisation, ReLU, max pooling over (mel bands, frames)."""

    def __init__(self, n_in: int, n_out: int, pool: tuple[int, int]) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.MaxPool2d(pool),
        )


class CRNN(nn.Module):
    """A CNN turns the spectrogram into a sequence of feature vectors; a bidirectional GRU reads it.

    The GRU's outputs are pooled over time by mean and by maximum. Reading only the last step would
    throw half of a bidirectional network away: its backward half has seen a single step there.

    Parameters
    ----------
    n_classes
        Number of genres.
    n_mels
        Number of mel bands.
    channels
        Feature maps of the convolution blocks. Each halves the mel bands; the first two also halve
        the frames.
    n_hidden
        Units of the GRU in each direction; 0 leaves the GRU out and pools the features directly.
    dropout
        Share of the pooled features dropped before the linear layer.
    """

    def __init__(
        self,
        n_classes: int,
        n_mels: int = 128,
        channels: Sequence[int] = (16, 32, 64, 128),
        n_hidden: int = 96,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.band_norm = nn.BatchNorm1d(n_mels)
        pools = [(2, 2), (2, 2)] + [(2, 1)] * (len(channels) - 2)
        self.features = nn.Sequential(
            *(
                ConvBlock(n_in, n_out, pool)
                for n_in, n_out, pool in zip((1, *channels), channels, pools, strict=False)
            )
        )
        self.gru = nn.GRU(channels[-1], n_hidden, batch_first=True, bidirectional=True) if n_hidden else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * (2 * n_hidden or channels[-1]), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [shape=(batch, n_classes)] of ``x`` [shape=(batch, 1, n_mels, n_frames)]."""
        return self.classify(self.sequence(x))

    def sequence(self, x: Tensor) -> Tensor:
        """Return the feature vectors over time [shape=(batch, n_steps, channels)]."""
        x = self.band_norm(x.squeeze(1)).unsqueeze(1)  # every mel band standardised on its own
        x = self.features(x)  # (batch, channels, n_mels / 16, n_frames / 4)
        return x.mean(dim=2).transpose(1, 2)

    def classify(self, sequence: Tensor) -> Tensor:
        """Return logits of a sequence of feature vectors [shape=(batch, n_steps, channels)]."""
        return self.classifier(self.dropout(self.embed(sequence)))

    def embed(self, sequence: Tensor) -> Tensor:
        """Read the sequence with the GRU and pool it over time by mean and maximum."""
        if self.gru is not None:
            sequence, _ = self.gru(sequence)  # (batch, n_steps, 2 * n_hidden)
        return torch.cat([sequence.mean(dim=1), sequence.amax(dim=1)], dim=1)


def build_model(name: str, n_classes: int, n_mels: int, n_frames: int) -> nn.Module:
    """Build one of `MODELS` for spectrograms of ``n_mels`` bands and ``n_frames`` frames.

    Raises
    ------
    FmaNbError
        When the name is not one of `MODELS`.
    """
    if name == "baseline":
        return BaselineCNN(n_classes, n_mels, n_frames)
    if name == "crnn":
        return CRNN(n_classes, n_mels)
    if name == "crnn_no_gru":
        return CRNN(n_classes, n_mels, n_hidden=0)
    raise FmaNbError(f"model={name!r} is unknown: choose one of {', '.join(MODELS)}.")


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
