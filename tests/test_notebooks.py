"""The notebooks' form, and that the networks they build in view are the package's."""

import statistics
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from fma_nb import dataset, model, recipe, training

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("0*.ipynb"))
SOLUTIONS = sorted(NOTEBOOKS[0].parent.glob("solutions/0*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tagged_source(number, tag):
    path = next(p for p in NOTEBOOKS if p.name.startswith(number))
    return next(c.source for c in code_cells(path) if tag in c.metadata.get("tags", []))


def test_there_are_five():
    names = ["01_eda", "02_spectrograms", "03_baseline", "04_crnn", "05_comparison"]
    assert [path.stem for path in NOTEBOOKS] == names
    assert [path.stem for path in SOLUTIONS] == [f"{name}_solutions" for name in names]


@pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: p.stem)
class TestForm:
    def test_one_parameters_cell_with_typed_and_explained_scalars(self, path):
        cells = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
        assert len(cells) == 1
        for line in cells[0].source.splitlines():
            assert ": " in line and " = " in line and "  # " in line, line

    def test_plain_kernel_and_small_file(self, path):
        assert read(path).metadata.kernelspec.name == "python3"
        assert path.stat().st_size < 1_000_000

    def test_short_cells(self, path):
        own = [cell for cell in code_cells(path) if "lesson" not in cell.metadata.get("tags", [])]
        lengths = [len(cell.source.splitlines()) for cell in own]
        assert statistics.median(lengths) <= 8 and max(lengths) <= 40

    def test_executed_in_order_without_errors_or_warnings(self, path):
        cells = code_cells(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for output in (output for cell in cells for output in cell.outputs):
            assert output.output_type != "error" and output.get("name") != "stderr"

    def test_no_output_tells_of_the_machine_it_ran_on(self, path):
        root = str(Path(__file__).resolve().parent.parent)
        assert root not in path.read_text()

    def test_a_text_cell_stands_before_and_after_most_code_cells(self, path):
        kinds = [cell.cell_type for cell in read(path).cells]
        runs = "".join(kind[0] for kind in kinds)
        assert "ccc" not in runs, "three code cells without a word between them"


def network_of_notebook(number, class_name, namespace):
    exec(tagged_source(number, "model"), namespace)
    return namespace[class_name]


def same_network(ours, theirs, inputs):
    theirs.load_state_dict(ours.state_dict())
    same_names = list(ours.state_dict()) == list(theirs.state_dict())
    return same_names and torch.equal(ours.eval()(inputs), theirs.eval()(inputs))


@pytest.mark.parametrize("n_frames", [128, 300])
def test_the_baseline_of_notebook_03_is_the_packages(n_frames):
    kind = network_of_notebook("03", "BaselineCNN", {"nn": nn, "model": model})
    training.seed_everything(1)
    ours = kind(5, 128, n_frames)
    theirs = model.build_model("baseline", 5, 128, n_frames)
    assert same_network(ours, theirs, torch.rand(2, 1, 128, n_frames))


@pytest.mark.parametrize(("name", "n_hidden"), [("crnn", 96), ("crnn_no_gru", 0)])
def test_the_crnn_of_notebook_04_is_the_packages(name, n_hidden):
    namespace = {"nn": nn, "torch": torch}
    path = next(p for p in NOTEBOOKS if p.name.startswith("04"))
    exec(next(c.source for c in code_cells(path) if "def conv_block" in c.source), namespace)
    kind = network_of_notebook("04", "CRNN", namespace)
    ours = kind(5, 128, n_hidden)
    theirs = model.build_model(name, 5, 128, 64)
    assert same_network(ours, theirs, torch.rand(2, 1, 128, 64))


def seeded_baseline():
    training.seed_everything(1)
    network = model.build_model("baseline", 3, 32, 32)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    constant = LambdaLR(optimizer, lambda _: 1.0)
    return training.TrainingState(network, optimizer, constant, average=None, n_classes=3)


def test_the_loop_of_notebook_03_is_the_packages():
    namespace = {"torch": torch, "F": F, "ds": dataset}
    path = next(p for p in NOTEBOOKS if p.name.startswith("03"))
    for function in ("def train_one_epoch(", "def evaluate("):
        exec(next(c.source for c in code_cells(path) if function in c.source), namespace)
    images = torch.randint(0, 256, (10, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(10) % 3
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]

    ours = seeded_baseline()
    trained = namespace["train_one_epoch"](ours.model, batches, ours.optimizer)
    judged = namespace["evaluate"](ours.model.train(), batches)
    theirs = seeded_baseline()
    plain = recipe.Recipe(bfloat16=False)
    assert trained == pytest.approx(training.train_one_epoch(theirs, batches, plain))
    assert judged == pytest.approx(training.evaluate(theirs.model.train(), batches, False))
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[name]), name


def planted_clips():
    """Plant notebook 05's calls into 200 grey clips, each in both orders."""
    pack = dataset.Pack("fma_mini", "compact", (), "", {"train": grey_clips(1)})
    names = {"np": np, "ds": dataset, "pack": pack}
    for cell in code_cells(NOTEBOOKS[-1]):
        if "planted" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return names["plant"](grey_clips(200).images, (1, 1), np.random.default_rng(0))


def grey_clips(n):
    places = np.arange(n)
    return dataset.Split(np.full((n, 32, 128), 100, dtype=np.uint8), 0 * places, places, places)


def call_starts(image):
    """Return the first frame of each call in a grey clip, in a circle of 128 frames."""
    top, bottom = image[0], image[-1]
    found = {"silence": bottom == 0, "burst": top == 255, "bass": (top == 0) & (bottom == 255)}
    return {name: int(np.flatnonzero(here & ~np.roll(here, 1))[0]) for name, here in found.items()}


def test_the_planted_label_is_the_order_and_each_clip_has_both():
    planted = planted_clips()
    assert planted.labels.tolist() == [0] * 200 + [1] * 200
    for image, label in zip(planted.images, planted.labels, strict=True):
        starts = call_starts(image)
        after_silence = [(starts[name] - starts["silence"]) % 128 for name in ("burst", "bass")]
        assert (after_silence[0] < after_silence[1]) == (label == 0)
        assert (image != 100).any(axis=0).sum() == 15


def test_no_convolution_sees_two_planted_calls():
    crnn = model.build_model("crnn", 2, 128, 128)
    field = max(trace.field[1] for trace in model.trace_layers(crnn, 128, 128) if trace.field)
    for image in planted_clips().images:
        starts = sorted(call_starts(image).values())
        last_frame_to_first = np.diff([*starts, starts[0] + 128]) - 4
        assert last_frame_to_first.min() + 1 > field


def test_the_place_in_the_stride_tells_nothing_about_the_planted_order():
    planted = planted_clips()
    for label in (0, 1):
        starts = [call_starts(image) for image in planted.images[planted.labels == label]]
        for name in ("burst", "bass"):
            apart = np.bincount([(s[name] - s["silence"]) % 4 for s in starts], minlength=4)
            assert apart.min() > 25  # of 200; 50 if all four are as likely
