"""From any audio file to eight probabilities, with the weights that come with the package.

The shipped CRNN was trained on FMA-Small; ``fma_nb/weights/README.md`` is its model card. A file of any
length is cut into windows of 30 s, as long as the clips it was trained on, and their answers are averaged.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fma_nb.audio import UnreadableClipError, load_windows
from fma_nb.calibration import fit_temperature, probabilities_and_labels
from fma_nb.dataset import to_input
from fma_nb.project import SHIPPED_WEIGHTS, FmaNbError
from fma_nb.runs.checkpoint import load_checkpoint, network_of, run_files, save_checkpoint
from fma_nb.runs.experiment import read_metrics
from fma_nb.spectrogram import get_preset, log_mel, to_grey

SHIPPED_KEYS = ("model_state", "config", "genres", "preset", "image_shape", "epoch", "val_accuracy")
USUAL_RATE = 44_100  # Hz; nearly all of FMA's clips have it, so their mel bands mean these frequencies
WINDOWS_AT_ONCE = 16
AUDIO_ENDINGS = {".mp3", ".ogg", ".oga", ".opus", ".flac", ".wav", ".aif", ".aiff", ".au", ".caf", ".w64"}


@dataclass(frozen=True)
class Classifier:
    """A trained network with all that it needs to classify a file."""

    network: nn.Module  # takes spectrograms, gives logits; in evaluation mode
    genres: tuple[str, ...]  # what the logits stand for, in order
    preset: str  # how spectrograms are made
    temperature: float  # logits are divided by it, so that a probability of 0.6 is right in 6 of 10 cases


def load_classifier(path: Path = SHIPPED_WEIGHTS) -> Classifier:
    """Load weights made by `export_weights`; nothing in the file is executed."""
    saved = load_checkpoint(path)
    temperature = saved.get("temperature", 1.0)
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise FmaNbError(f"{path} has temperature {temperature!r}, which must be a number above 0.")
    return Classifier(network_of(saved, path), tuple(saved["genres"]), saved["preset"], temperature)


def predict(path: str | Path, classifier: Classifier | None = None) -> dict[str, float]:
    """Return the probability of each genre for an audio file of any length, by default with our weights.

    The file is anything that libsndfile decodes (MP3, OGG, FLAC, WAV) of 1 s at least that is not silent.
    """
    classifier = classifier or load_classifier()
    try:
        windows = list(_window_probabilities(Path(path), classifier))
    except UnreadableClipError as error:
        raise FmaNbError(f"{path}: {error}.") from error
    return dict(zip(classifier.genres, torch.cat(windows).mean(0).tolist(), strict=True))


def _window_probabilities(path: Path, classifier: Classifier) -> Iterator[Tensor]:
    """Yield those of a file's windows, a few at a time, so that memory does not grow with its length."""
    preset = get_preset(classifier.preset)
    windows = load_windows(path, preset.sample_rate or USUAL_RATE)
    images = (to_grey(log_mel(samples, rate, preset)) for samples, rate in windows)
    while batch := list(itertools.islice(images, WINDOWS_AT_ONCE)):
        with torch.inference_mode():
            logits = classifier.network(to_input(torch.from_numpy(np.stack(batch))))
        yield (logits / classifier.temperature).softmax(1)


def audio_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and instead of a folder the audio files below it, by name, if it has any."""
    for path in paths:
        below = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in AUDIO_ENDINGS)
        yield from below or [path]


def print_predictions(paths: Iterable[Path], classifier: Classifier, *, as_json: bool) -> None:
    """Print the answer for every file as soon as it is known, or the reason why it has none."""
    n_failed = 0
    for path in audio_files(paths):
        answer: dict[str, Any] = {"file": str(path)}
        try:
            answer["probabilities"] = predict(path, classifier)
            text = f"{path}\n{bar_chart(answer['probabilities'])}"
        except FmaNbError as error:
            n_failed += 1
            answer["error"] = text = str(error)
        print(json.dumps(answer) if as_json else text, flush=True)
    if n_failed:
        raise FmaNbError(f"{n_failed} file(s) have no answer: see the reasons above.")


def bar_chart(probabilities: dict[str, float], width: int = 30) -> str:
    """Return the probabilities as a small bar chart of text, the most likely genre first."""
    ordered = sorted(probabilities.items(), key=lambda item: -item[1])
    return "\n".join(f"  {genre:<14}{p:5.2f}  {'█' * round(width * p)}".rstrip() for genre, p in ordered)


def export_weights(run: str, model: str, path: Path) -> float:
    """Write the first seed's best weights of a run; return their temperature, fitted on validation."""
    metrics = read_metrics(run, [model])[model]
    seed = metrics["config"]["seed"]
    saved = load_checkpoint(run_files(run, model, seed, seed).best)
    temperature = fit_temperature(*probabilities_and_labels(metrics, "val"))
    save_checkpoint(path, {key: saved[key] for key in SHIPPED_KEYS} | {"temperature": temperature})
    return temperature
