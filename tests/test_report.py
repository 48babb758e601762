"""The report's pages as files; `test_browser` looks at them in a browser."""

import html
import json
import re

import matplotlib.pyplot as plt
import nbformat
import pytest
from conftest import assert_one_sentence
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fma_nb.commands.report import write_report
from fma_nb.plots import save_figure
from fma_nb.project import FmaNbError

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
TRACKS = [str(track_id) for track_id in range(40)]


def picture():
    return new_code_cell("plot()", outputs=[new_output("display_data", {"image/png": PIXEL})])


def write_notebook(project, *cells, name="01_eda"):
    path = project / "outputs" / "a_run" / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · A <first> look"), *cells]), path)


def write_metrics(project, model, n_right, labels=None, artist_of=int):
    """Two seeds of a model that is right on the first tracks."""
    labels = labels or dict.fromkeys(TRACKS, "Folk")
    predictions = {t: "Folk" if i < n_right else "Rock" for i, t in enumerate(labels)}
    result = {
        "accuracy": n_right / len(labels),
        "artist_balanced_accuracy": 0.25,
        "macro_f1": 0.5,
        "predictions": predictions,
        "probabilities": {track_id: [0.4, 0.6] for track_id in labels},
    }
    metrics = {
        "model": model,
        "dataset": "fma_small",
        "synthetic": False,
        "preset": "compact",
        "genres": ["Folk", "Rock"],
        "fingerprint": "f00d",
        "n_parameters": 1234,
        "config": {"model": model, "epochs": 3} | ({"lr": 0.1} if model == "crnn" else {}),
        "device": "CPU",
        "versions": {"torch": "2.11"},
        "date": "2026-11-24",
        "labels": {"val": labels},
        "artists": {"val": {track_id: artist_of(track_id) for track_id in labels}},
        "seeds": [
            {"seed": seed, "seconds": 1.0, "last_val_accuracy": 0.5, "val": result} for seed in range(2)
        ],
    }
    path = project / "outputs" / "a_run" / "metrics" / f"{model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics))


def test_a_run_without_notebooks_has_no_report(project):
    with pytest.raises(FmaNbError) as caught:
        write_report("a_run")
    assert_one_sentence(caught.value, "a_run", "fma-nb run")
    assert not (project / "outputs" / "a_run" / "report").exists()


def test_pictures_are_described_by_their_caption_or_by_what_announces_them(project):
    caption = new_markdown_cell("*Loss in `dB`\nby epoch.* Read **this** off it.")
    announced = new_markdown_cell("## More\n\nThe *same* for Rock:")
    write_notebook(project, picture(), caption, announced, picture())
    page = write_report("a_run").with_name("01_eda.html").read_text()
    assert re.findall(r'alt="([^"]*)"', page) == ["Loss in dB by epoch.", "The same for Rock:"]


def test_a_table_scrolls_in_a_box_of_its_own(project):
    table = new_code_cell(
        "t", outputs=[new_output("display_data", {"text/html": "<table><tr></tr></table>"})]
    )
    write_notebook(project, new_markdown_cell("|a|b|\n|-|-|\n|1|2|"), table)
    page = write_report("a_run").with_name("01_eda.html").read_text()
    assert page.count('<div class="scroll"><table') == page.count("</table></div>") == 2


def test_links_between_notebooks_lead_to_their_pages(project):
    write_notebook(project, new_markdown_cell("On to [02](02_spectrograms.ipynb)."))
    page = write_report("a_run").with_name("01_eda.html").read_text()
    assert 'href="02_spectrograms.html"' in page and "<script" not in page
    assert "<title>01 · A &lt;first&gt; look</title>" in page


def test_a_figure_keeps_its_caption(project):
    write_notebook(project)
    figure, _ = plt.subplots()
    save_figure(figure, "a_run", "01_curve", "Accuracy < chance")
    plt.close(figure)
    page = write_report("a_run").read_text()
    assert page.count("Accuracy &lt; chance") == 2  # what is seen, and what is read out


def words(page):
    """What a reader sees of the page, in one line."""
    return " ".join(html.unescape(re.sub("<[^>]+>", "", page.split("</style>")[1])).split())


@pytest.mark.parametrize(
    ("n_right", "verdict"),
    [(36, "is ahead of"), (20, "cannot be told apart from"), (4, "is behind")],
)
def test_the_question_is_answered_first_in_a_sentence_with_its_interval(n_right, verdict, project):
    write_notebook(project)
    write_metrics(project, "baseline", 20)
    write_metrics(project, "crnn", n_right)
    shown = words(write_report("a_run").read_text())
    difference = f"{n_right / 40 - 0.5:+.3f}".replace("-", "−")
    sentence = f"On the same 40 val clips the CRNN {verdict} the baseline CNN, {difference} ["
    assert 0 < shown.index(sentence) < shown.index("Results")
    assert "Synthetic data" not in shown and "FMA's official split" in shown


def test_the_control_stands_in_the_same_sentence(project):
    write_notebook(project)
    for model, n_right in (("baseline", 4), ("crnn", 36), ("crnn_no_gru", 36)):
        write_metrics(project, model, n_right)
    shown = words(write_report("a_run").read_text())
    assert re.search(
        r"is ahead of the baseline CNN, \+0\.800 \[.*?\], and "
        r"cannot be told apart from the CRNN without GRU, \+0\.000 \[.*?\]\.",
        shown,
    )


def test_the_interval_says_how_many_artists_it_rests_on(project):
    """Artist 1 has 31 of 40 clips, nine more one each: 40² / (31² + 9) = 1.65."""
    write_notebook(project)
    for model, n_right in (("baseline", 20), ("crnn", 36)):
        write_metrics(project, model, n_right, artist_of=lambda track_id: -1 - int(track_id))
    assert "Who made each clip is not known" in words(write_report("a_run").read_text())
    for model, n_right in (("baseline", 20), ("crnn", 36)):
        write_metrics(project, model, n_right, artist_of=lambda track_id: max(1, int(track_id) - 29))
    shown = words(write_report("a_run").read_text())
    assert "by 10 artists" in shown and "count as 2 artists with equally many" in shown


def test_both_accuracies_stand_in_the_table(project):
    write_notebook(project)
    write_metrics(project, "crnn", 36)
    page = write_report("a_run").read_text()
    assert re.search(r"val accuracy</th>\s*<td>0\.900", page)
    assert re.search(r"val artist-balanced</th>\s*<td>0\.250", page)


def test_models_that_met_other_clips_are_not_compared(project):
    write_notebook(project)
    write_metrics(project, "baseline", 20)
    write_metrics(project, "crnn", 20, dict.fromkeys(TRACKS[:30], "Folk"))
    page = write_report("a_run").read_text()
    assert "On the same" not in page and "baseline CNN" in page


def test_the_settings_of_all_models_stand_side_by_side(project):
    write_notebook(project)
    write_metrics(project, "baseline", 20)
    write_metrics(project, "crnn", 20)
    page = write_report("a_run").read_text()
    assert '<th scope="row">epochs</th><td>3</td><td>3</td>' in page
    assert '<th scope="row">lr</th><td></td><td>0.1</td>' in page


def test_a_damaged_metrics_file_is_named(project):
    write_notebook(project)
    write_metrics(project, "baseline", 20)
    path = project / "outputs" / "a_run" / "metrics" / "baseline.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(FmaNbError, match=r"baseline\.json is damaged"):
        write_report("a_run")
