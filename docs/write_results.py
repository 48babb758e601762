"""Write the tables of README.md, docs/results.md and the model card from the CSV files, and draw the figures.

    python docs/write_results.py            # write them
    python docs/write_results.py --check    # say which table differs from its CSV file

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; NAME is a function below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import scipy.stats

from fma_nb import plots
from fma_nb.evaluation import Estimate
from fma_nb.metadata import GENRES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "assets" / "results"
PAGES = ("README.md", "docs/results.md", "fma_nb/weights/README.md")
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NAMES = {
    "baseline": "baseline CNN, plain recipe",
    "baseline_with_recipe": "baseline CNN, the CRNN's recipe",
    "no_gru": "CRNN without its GRU",
    "final": "CRNN",
    "shuffled": "CRNN trained on shuffled frames",
    "final_mean": "CRNN, three seeds averaged into one answer",
    "shipped": "CRNN, the weights of the package",
    "shorter": "12 epochs",
    "wider": "1.5 times as wide",
    "more_dropout": "dropout 0.5",
    "mixup": "mixup 0.3",
    "one_way": "CRNN, its GRU reading one way",
    "lstm": "CRNN with an LSTM",
    "fma_small": "30 s, a frame every 0.23 s",
    "first3s": "first 3 s, a frame every 0.023 s",
    "both": "both together",
}
MAIN_ROWS = ("baseline", "baseline_with_recipe", "no_gru", "final")
# What each of these is worth is the difference between two rows.
GRU, ORDER = "the GRU", "the order of the frames"


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"{name}.csv")


def table_of(name: str) -> pd.DataFrame:
    return read(f"{name}_table").set_index("row")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def plus_minus(value: float, spread: float) -> str:
    return f"{value:.3f}" if pd.isna(spread) else f"{value:.3f} ± {spread:.3f}"


def interval(line: pd.Series[float], name: str) -> str:
    return f"{line[name]:.3f} [{line[f'{name}_low']:.3f}, {line[f'{name}_high']:.3f}]"


def ahead(line: pd.Series[float], prefix: str = "") -> Estimate | None:
    """Return by how much the CRNN is ahead of a row, in points."""
    value, low, high = (line[f"{prefix}difference{end}"] for end in ("", "_low", "_high"))
    return None if pd.isna(value) else Estimate(-100 * value, -100 * high, -100 * low)


def points(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:+.1f} [{estimate.low:+.1f}, {estimate.high:+.1f}]".replace("-", "−")


def over_folds(name: str, row: str) -> Estimate | None:
    """Return by how much the CRNN is ahead of a row, with Student's t interval over the folds, in points."""
    by_fold = read(name).pivot(index="fold", columns="row", values="accuracy")
    gaps = 100 * (by_fold["final"] - by_fold[row])
    half_width = scipy.stats.t.ppf(0.975, len(gaps) - 1) * gaps.sem()
    return (
        None if row == "final" else Estimate(gaps.mean(), gaps.mean() - half_width, gaps.mean() + half_width)
    )


def summary() -> str:
    folds, val, test = table_of("folds_compact"), table_of("evaluation_val"), table_of("evaluation_test")
    parameters = read("val_compact").groupby("row")["parameters"].first()
    lines = [
        [
            NAMES[row],
            *(
                plus_minus(t["accuracy"][row], t["spread"][row]) if row in t.index else ""
                for t in (folds, val, test)
            ),
            f"{parameters[row if row in parameters else 'final']:,}",
        ]
        for row in (*MAIN_ROWS, "final_mean")
    ]
    return markdown(["model", "folds by artist", "val", "test", "parameters"], lines)


def folds(name: str = "folds_compact", rows: Sequence[str] = (*MAIN_ROWS, "shuffled")) -> str:
    table = table_of(name)
    lines = [
        [
            NAMES[row],
            plus_minus(line["accuracy"], line["spread"]),
            plus_minus(line["balanced_accuracy"], line["balanced_spread"]),
            points(ahead(line)),
            points(over_folds(name, str(row))),
            points(ahead(line, "balanced_")),
        ]
        for row, line in table.loc[[row for row in rows if row in table.index]].iterrows()
    ]
    head = [
        "model",
        "accuracy",
        "artist-balanced",
        "CRNN ahead, over artists",
        "the same, over folds",
        "artist-balanced, over artists",
    ]
    return markdown(head, lines)


def folds_first3s() -> str:
    return folds("folds_first3s")


def candidates() -> str:
    lines = []
    for source, rows in (
        ("folds_compact_epochs", ["final", "shorter"]),
        ("folds_compact", ["wider", "more_dropout", "mixup"]),
    ):
        for row, line in table_of(source).loc[rows].iterrows():
            gap = ahead(line)
            change = gap and Estimate(-gap.value, -gap.high, -gap.low)
            name = "CRNN, 24 epochs" if row == "final" else NAMES[str(row)]
            lines.append([name, plus_minus(line["accuracy"], line["spread"]), points(change)])
    return markdown(["recipe", "accuracy over folds", "change, points"], lines)


def split_table(split: str) -> str:
    table, seeds = table_of(f"evaluation_{split}"), read(f"evaluation_{split}").groupby("row")
    lines = [
        [
            NAMES[row],
            interval(table.loc[row], "accuracy"),
            interval(table.loc[row], "balanced_accuracy"),
            f"{seeds.get_group(row)['macro_f1'].mean():.3f}",
            points(ahead(table.loc[row])),
            points(ahead(table.loc[row], "balanced_")),
        ]
        for row in (*MAIN_ROWS, "final_mean", "shipped")
    ]
    head = [
        "model",
        "accuracy",
        "artist-balanced",
        "macro-F1",
        "CRNN ahead, points",
        "the same, artist-balanced",
    ]
    return markdown(head, lines)


def validation() -> str:
    return split_table("val")


def test() -> str:
    return split_table("test")


def recall() -> str:
    """Recall of the CRNN and of the baseline by genre: validation and test."""
    means = {
        split: read(f"evaluation_{split}").groupby("row").mean(numeric_only=True) for split in ("val", "test")
    }
    lines = [
        [
            genre,
            *(
                f"{means[split][f'recall_{genre}'][row]:.2f}"
                for row in ("baseline", "final")
                for split in means
            ),
        ]
        for genre in GENRES
    ]
    return markdown(
        ["genre", "plain baseline, val", "plain baseline, test", "CRNN, val", "CRNN, test"], lines
    )


def difference_of(source: str, row: str, minus: str, accuracy: str = "accuracy") -> Estimate:
    lines = read("differences").set_index(["source", "row", "minus", "accuracy"])
    return Estimate(*(100 * lines.loc[(source, row, minus, accuracy), ["difference", "low", "high"]]))


def steps() -> str:
    """What each step from the plain baseline to the CRNN is worth."""
    names = {
        ("baseline_with_recipe", "baseline"): "the CRNN's recipe, 24 epochs in the place of 10 included",
        (
            "no_gru",
            "baseline_with_recipe",
        ): "the rest of the CRNN's network: convolutions, normalised bands, mean and maximum over time",
        ("final", "no_gru"): "the GRU, with its 131,200 parameters",
    }
    lines = [
        [
            name,
            *(
                points(difference_of("folds_compact", *rows, accuracy))
                for accuracy in ("accuracy", "artist-balanced")
            ),
        ]
        for rows, name in names.items()
    ]
    return markdown(["step", "accuracy, points", "artist-balanced, points"], lines)


def band() -> str:
    """What the largest artist of the test split does to Folk."""
    lines = [
        [
            NAMES[line.row],
            *(f"{value:.2f}" for value in (line.recall_of_band, line.recall_of_other_folk)),
            f"{line.accuracy:.3f}",
            f"{line.accuracy_without_band:.3f}",
        ]
        for line in read("band").itertuples()
    ]
    head = ["model", "Folk found in its 91 clips", "in the nine others", "accuracy", "accuracy without it"]
    return markdown(head, lines)


def planted_columns(dataset: str) -> pd.DataFrame:
    """Return the accuracies by strength of the calls: a column a network, mean of the seeds."""
    lines = read("planted_effect").set_index("dataset").loc[dataset]
    wanted = {
        "CRNN": ("crnn", 360, "accuracy"),
        "CRNN, 900 steps": ("crnn", 900, "accuracy"),
        "without GRU": ("crnn_no_gru", 900, "accuracy"),
        "steps shuffled": ("crnn_steps_shuffled", 360, "accuracy"),
    }
    columns = {
        name: lines[(lines["model"] == model) & (lines["steps"] == steps)].groupby("strength")[column].mean()
        for name, (model, steps, column) in wanted.items()
    }
    genres = lines[lines["model"] == "genres"].set_index("strength")
    columns["genres, with calls"] = genres["genre_accuracy_planted"]
    return pd.DataFrame(columns)


def planted(dataset: str = "fma_small") -> str:
    """The planted effect on a dataset's clips, and what the calls do to genre accuracy there."""
    table = planted_columns(dataset)
    lines = [[f"{row.Index:g}", *(f"{value:.3f}" for value in row[1:])] for row in table.itertuples()]
    return markdown(["strength", *table], lines)


def planted_mini() -> str:
    return planted("fma_mini")


def ruler() -> str:
    """What the interval of one difference becomes with more artists; seeds averaged, artists drawn."""
    lines = []
    for source, what, tracks in (
        ("evaluation_val", "official validation, 3 seeds", "val"),
        ("evaluation_test", "official test, 3 seeds", "test"),
        ("folds_compact", "five folds by artist, 1 seed", "train and val"),
    ):
        gap = difference_of(source, "final", "no_gru")
        counted = read("artists").set_index(["split", "genre"]).loc[tracks, "all"]
        n_artists = f"{counted['artists']:,.0f} → {counted['effective_artists']:.0f}"
        width = f"{(gap.high - gap.low) / 2:.1f}"
        lines.append([what, f"{counted['clips']:,.0f}", n_artists, points(gap), width])
    head = ["measured on", "clips", "artists → effective", "what the GRU adds, points", "half the interval"]
    return markdown(head, lines)


def artists() -> str:
    table = read("artists").set_index(["split", "genre"])
    lines = []
    for genre in ("all", *GENRES):
        cells = [table.loc[split, genre] for split in ("train", "val", "test")]
        lines.append(
            [f"**{genre}**" if genre == "all" else genre]
            + [f"{c['artists']:.0f} → {c['effective_artists']:.{0 if genre == 'all' else 1}f}" for c in cells]
            + [f"{cells[2]['clips_of_the_largest']:.0f} of {cells[2]['clips']:.0f}"]
        )
    return markdown(["genre", "training", "validation", "test", "largest artist in test"], lines)


def two_views() -> str:
    table = read("two_views").set_index("row")
    lines = []
    for row, line in table.iterrows():
        gap = ahead(line)
        change = gap and Estimate(-gap.value, -gap.high, -gap.low)
        lines.append(
            [NAMES[str(row)], interval(line, "accuracy"), interval(line, "balanced_accuracy"), points(change)]
        )
    return markdown(["the CRNN sees", "accuracy", "artist-balanced", "change, points"], lines)


def validation_first3s() -> str:
    rows = read("val_first3s").groupby("row", sort=False)
    lines = [
        [
            NAMES[str(row)],
            str(len(group)),
            f"{group['val_accuracy'].mean():.3f}",
            f"{group['last_val_accuracy'].mean():.3f}",
        ]
        for row, group in rows
    ]
    return markdown(["model", "seeds", "val, best epoch", "val, last epoch"], lines)


def mini() -> str:
    """The models of the notebooks on fma_mini, which is synthetic."""
    table = read("fma_mini")
    scores = [f"{split} {score}" for split in ("val", "test") for score in ("accuracy", "artist-balanced")]
    lines = [[NAMES[line["row"]], *(line[score] for score in scores)] for _, line in table.iterrows()]
    return markdown(["model", *scores], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(summary, folds, folds_first3s, candidates, validation, test, recall, ruler, artists, two_views),
        validation_first3s,
        steps,
        band,
        planted,
        planted_mini,
        mini,
    )
}


def written(text: str) -> str:
    """Return a page with every table written anew from its CSV file."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def draw() -> None:
    plots.use_style()
    figure, axes = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, layout="constrained")
    scales = (
        ("folds_compact", "30 s, a frame every 0.23 s"),
        ("folds_first3s", "the first 3 s, a frame every 0.023 s"),
    )
    names = {"no_gru": GRU, "shuffled": ORDER, "baseline_with_recipe": "the CRNN's network"}
    for ax, (source, title) in zip(axes, scales, strict=True):
        table = table_of(source)
        gains = {name: gap for row, name in names.items() if (gap := ahead(table.loc[row]))}
        plots.interval_plot(ax, gains, texts=[points(gap) for gap in gains.values()])
        ax.set_title(title)
    axes[1].set_xlabel("accuracy it is worth, points (95 % interval over artists)")
    save(figure, "time_at_two_scales")
    figure, ax = plt.subplots(figsize=(8, 2.2), layout="constrained")
    sources = {"validation": "evaluation_val", "test": "evaluation_test", "five folds": "folds_compact"}
    gaps = {name: difference_of(source, "final", "no_gru") for name, source in sources.items()}
    plots.interval_plot(ax, gaps, texts=[points(gap) for gap in gaps.values()])
    ax.set_xlabel("what the GRU adds, points of accuracy (95 % interval over artists)")
    save(figure, "ruler")


def draw_planted() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, (dataset, title) in zip(
        axes, {"fma_small": "FMA-Small", "fma_mini": "fma_mini (synthetic)"}.items(), strict=True
    ):
        table = planted_columns(dataset)
        colors = (plots.BLUE, plots.BLUE, plots.ORANGE, plots.DARK_GREY)
        for name, color in zip(list(table)[:4], colors, strict=True):
            style = "--" if "900" in name else "-"
            ax.plot(table.index, table[name], style, marker="o", color=color, label=name)
        ax.axhline(0.5, color=plots.GREY, linewidth=1, linestyle=":")
        ax.set(title=title, xlabel="strength of the calls", xscale="log", xticks=list(table.index))
        ax.set_xticks(list(table.index), [f"{strength:g}" for strength in table.index], rotation=45)
        ax.minorticks_off()
    axes[0].set_ylabel("share of orders told right")
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "planted_effect")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(ROOT / "assets" / f"{name}.png", dpi=144, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        stale += [page] if written(text) != text else []
        if not check:
            (ROOT / page).write_text(written(text))
    if check:
        print(
            *(
                f"{page}: a table differs from its CSV file: run python docs/write_results.py"
                for page in stale
            ),
            sep="\n",
        )
        return len(stale)
    draw()
    draw_planted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
