"""Stage 6, recipe: everything that decides how a model is trained, one field per ingredient.

Notebook 04 says what each ingredient of the CRNN's recipe is for; `fma_nb.runs.ablation` takes each of
them out.
"""

from dataclasses import dataclass
from typing import Any

from fma_nb.model import MODELS, POOLINGS
from fma_nb.project import FmaNbError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained; each ingredient is one field."""

    model: str = "baseline"  # one of `fma_nb.model.MODELS`
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1e-3  # the highest learning rate
    seed: int = 0
    optimizer: str = "adam"  # or adamw, or muon: `Muon` for the convolutions' filters, AdamW for the rest
    filter_lr: float = 0.012  # the learning rate of the filters under Muon
    weight_decay: float = 0.0  # of the other matrices, and without Muon also of the filters
    # Share of the steps over which lr rises from zero before it falls to zero as a cosine; None: constant.
    warmup: float | None = None
    label_smoothing: float = 0.0  # share of the target spread over all genres
    # Random changes of each training clip. Validation and test clips are seen whole and as they are.
    time_shift: bool = False  # shift it in time, circularly, by any number of frames
    crop: float = 1.0  # share of its frames that is seen, from a random start
    stretch: float = 0.0  # stretch it in time, or shorten it, by up to this share; the pitch stays
    mel_shift: int = 0  # move it up or down by up to this number of mel bands
    gain: float = 0.0  # equalize it: standard deviation, in dB, of a random curve over the mel bands
    freq_mask: float = 0.0  # longest SpecAugment mask, as a share of the mel bands
    time_mask: float = 0.0  # the same over time, as a share of the frames
    mixup: float = 0.0  # alpha of mixup's Beta distribution; 0 switches it off
    # Decay of the exponential moving average of the weights, which is evaluated and kept; 0 switches it off.
    ema: float = 0.0
    pooling: str = "mean_max"  # this and the next three: the CRNN's architecture, see `fma_nb.model.CRNN`
    band_norm: bool = True
    width: float = 1.0
    dropout: float = 0.3
    patience: int = 0  # stop after this many epochs without a better validation accuracy; 0 never stops
    # Convolutions and matrix products in bfloat16 where the hardware has it; weights stay in float32.
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


def default_recipe(model: str) -> Recipe:
    """Return a model's own recipe: plain Adam for the baseline, that of notebook 04 for the CRNN."""
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
