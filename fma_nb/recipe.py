"""Stage 6, recipe: everything that decides how a model is trained, one field an ingredient.

Notebook 04 says what each ingredient of the CRNN's recipe is for; `fma_nb.runs.ablation` takes each of
them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fma_nb.model import MODELS, POOLINGS
from fma_nb.project import FmaNbError

CHOICES: tuple[tuple[str, tuple[str | bool, ...]], ...] = (
    ("model", MODELS),
    ("optimizer", ("adam", "adamw", "muon")),
    ("pooling", POOLINGS),
    ("time_shift", (True, False)),
    ("band_norm", (True, False)),
    ("bfloat16", (True, False)),
)
RANGES = (
    ("epochs", 1, 100_000),
    ("batch_size", 1, 100_000),
    ("lr", 1e-12, 1e12),
    ("filter_lr", 1e-12, 1e12),
    ("seed", 0, 2**31),
    ("weight_decay", 0, 1e6),
    ("label_smoothing", 0, 1),
    ("freq_mask", 0, 1),
    ("time_mask", 0, 1),
    ("crop", 0.05, 1),
    ("stretch", 0, 0.9),
    ("mel_shift", 0, 64),
    ("gain", 0, 40),
    ("mixup", 0, 1e6),
    ("ema", 0, 0.99999),
    ("dropout", 0, 0.95),
    ("width", 0.1, 8),
    ("patience", 0, 100_000),
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained; each ingredient is one field.

    Attributes
    ----------
    model
        One of `fma_nb.model.MODELS`.
    epochs, batch_size, lr, seed
        As usual; ``lr`` is the highest learning rate.
    optimizer
        ``adam``; ``adamw`` with ``weight_decay``; or ``muon``, which is `Muon` with ``filter_lr`` for the
        convolutions' filters and AdamW for the rest.
    warmup
        Share of the steps over which ``lr`` rises from zero before it falls to zero as a cosine;
        ``None`` keeps it constant.
    label_smoothing
        Share of the target spread over all genres.
    time_shift
        Shift each training clip in time, circularly, by a random number of frames.
    crop
        Share of each training clip's frames that is seen, from a random start; the whole clip is evaluated.
    stretch
        Stretch each training clip in time, or shorten it, by up to this share; the pitch stays.
    mel_shift
        Move each training clip up or down by up to this number of mel bands.
    gain
        Equalize each training clip at random: the standard deviation, in dB, of a curve over the mel bands.
    freq_mask, time_mask
        Longest SpecAugment mask, as a share of the mel bands and of the frames.
    mixup
        Alpha of mixup's Beta distribution; 0 switches it off.
    ema
        Decay of the exponential moving average of the weights. The averaged weights are evaluated and kept;
        0 switches it off.
    pooling, band_norm, width, dropout
        Of the CRNN's architecture, see `fma_nb.model.CRNN`.
    patience
        Stop after this many epochs without a better validation accuracy; 0 never stops early.
    bfloat16
        Compute convolutions, recurrent and linear layers in bfloat16 where the processor has it in hardware;
        the loss stays in float32.
    """

    model: str = "baseline"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3
    seed: int = 0
    optimizer: str = "adam"
    filter_lr: float = 0.012
    weight_decay: float = 0.0
    warmup: float | None = None
    label_smoothing: float = 0.0
    time_shift: bool = False
    crop: float = 1.0
    stretch: float = 0.0
    mel_shift: int = 0
    gain: float = 0.0
    freq_mask: float = 0.0
    time_mask: float = 0.0
    mixup: float = 0.0
    ema: float = 0.0
    pooling: str = "mean_max"
    band_norm: bool = True
    width: float = 1.0
    dropout: float = 0.3
    patience: int = 0
    bfloat16: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        for name, choices in CHOICES:
            if getattr(self, name) not in choices:
                wanted = ", ".join(map(str, choices))
                raise FmaNbError(f"{name}={getattr(self, name)!r} is unknown: choose one of {wanted}.")
        for name, low, high in RANGES:
            value = getattr(self, name)
            whole = isinstance(getattr(type(self), name), int)
            if not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                yaml = " YAML reads 5e-4 as a text: write 5.0e-4." if isinstance(value, str) else ""
                raise FmaNbError(f"{name}={value!r} must be {kind} from {low:g} to {high:g}.{yaml}")
        if self.warmup is not None and not (isinstance(self.warmup, (int, float)) and 0 <= self.warmup <= 1):
            raise FmaNbError(f"warmup={self.warmup!r} must be None or a share from 0 to 1.")

    def architecture(self) -> dict[str, Any]:
        """Return the options of `fma_nb.model.build_model`."""
        if self.model == "baseline":
            return {}
        names = ("pooling", "band_norm", "width", "dropout")
        return {name: getattr(self, name) for name in names}


def default_recipe(model: str) -> Recipe:
    """Return a model's own recipe: plain Adam for the baseline, the modern one for the CRNN."""
    if model == "baseline":
        return Recipe(model)
    return Recipe(
        model,
        epochs=24,
        lr=2e-3,
        optimizer="muon",
        weight_decay=0.05,
        warmup=0.15,
        label_smoothing=0.1,
        time_shift=True,
        stretch=0.2,
        mel_shift=3,
        gain=5.0,
        freq_mask=0.15,
        time_mask=0.15,
        ema=0.995,
    )
