"""The command line: ``fma-nb`` and ``python -m fma_nb``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from fma_nb import __version__
from fma_nb.project import (
    DATASETS,
    SHIPPED_WEIGHTS,
    SPLITS,
    FmaNbError,
    data_dir,
    outputs_dir,
    run_dir,
    spectrogram_dir,
    user_path,
)

if TYPE_CHECKING:
    import pandas as pd

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; print bad input as one sentence and return a non-zero exit status."""
    _write_any_text()
    try:
        options = _parser().parse_args(arguments)
        _fix_folders(options)
        options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except FmaNbError as error:
        print(f"fma-nb: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # its reader, such as head, has seen enough
        _discard_output()
        return 141
    except OSError as error:
        print(f"fma-nb: {error.filename or 'the output'}: {error.strerror}.", file=sys.stderr)
        _discard_output()
        return 2
    except KeyboardInterrupt:
        print("fma-nb: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _discard_output() -> None:
    """Let Python's own last flush succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fix_folders(options: argparse.Namespace) -> None:
    """Make the folders that the user has named mean the same in every process that this one starts.

    A relative path means the folder where the command was typed; a notebook's kernel runs elsewhere.
    """
    os.environ["FMA_NB_DATA"] = str(getattr(options, "data", data_dir()))
    os.environ["FMA_NB_OUTPUTS"] = str(getattr(options, "outputs", outputs_dir()))


def _write_any_text() -> None:
    """Let a stream that lacks a character of a name or of a bar write a substitute for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream.encoding.lower() == "utf-8" else "replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fma-nb",
        description="Music genre classification on FMA-Small: data, spectrograms, notebooks, report.",
    )
    parser.add_argument("--version", action="version", version=f"fma-nb {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_data_commands, _add_run_commands, _add_ablate, _add_weights_commands):
        add(commands)
    for command in (parser, *commands.choices.values()):
        for name in ("data", "outputs"):
            text = f"the {name} folder (default: $FMA_NB_{name.upper()}, else {name}/)"
            command.add_argument(f"--{name}", type=user_path, default=argparse.SUPPRESS, help=text)
    return parser


def _add_data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", default="fma_mini", help=f"one of {', '.join(DATASETS)}")
    command.add_argument("--preset", default="compact", help="full or compact (default: compact)")


def _add_run_options(command: argparse.ArgumentParser) -> None:
    _add_data_options(command)
    command.add_argument("--run", default="", help="name of the run folder (default: the dataset's)")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def _add_parameters(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help=f"{what}, e.g. -p epochs 20; may be repeated",
    )


def _add_data_commands(commands: Commands) -> None:
    from fma_nb.raw.download import ARCHIVES, FMA_URL

    command = commands.add_parser("download", help="download and verify FMA's archives")
    command.add_argument("names", nargs="+", choices=ARCHIVES, metavar="NAME", help=", ".join(ARCHIVES))
    command.add_argument("--url", default=FMA_URL, help="folder to download from (default: %(default)s)")
    command.add_argument("--archive", type=user_path, help="use this zip file instead of downloading")
    command.set_defaults(command=_download)
    command = commands.add_parser("mini", help="make fma_mini, the synthetic dataset")
    command.add_argument("--workers", type=int, help="processes (default: all cores)")
    command.set_defaults(command=_mini)
    command = commands.add_parser("spectrograms", help="make the spectrogram PNGs of a dataset")
    _add_data_options(command)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="processes (default: all cores)")
    where.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="use this Dask scheduler's workers")
    command.add_argument("--partial", action="store_true", help="go on though a split lacks a genre")
    command.set_defaults(command=_spectrograms)


def _add_run_commands(commands: Commands) -> None:
    command = commands.add_parser("run", help="execute the notebooks and write the report")
    _add_run_options(command)
    command.add_argument("--only", default="", help="numbers of the notebooks to run, e.g. 03,04")
    command.add_argument("--kernel", default="", help="Jupyter kernel (default: fma-nb, else python3)")
    _add_parameters(command, "a parameter of the notebooks")
    command.set_defaults(command=_run)
    command = commands.add_parser("report", help="write a run's report again")
    command.add_argument("--run", default="fma_mini", help="name of the run folder")
    command.set_defaults(command=_report)
    command = commands.add_parser("evaluate", help="evaluate a trained model on a split")
    _add_run_options(command)
    names = "baseline, crnn, crnn_no_gru, crnn_lstm, crnn_one_way or crnn_shuffled"
    command.add_argument("--model", default="crnn", help=f"{names} (default: crnn)")
    command.add_argument("--split", default="val", choices=SPLITS)
    command.add_argument("--rows", default="", help="rows of an ablation and the package's weights, as CSV")
    command.set_defaults(command=_evaluate)


def _add_weights_commands(commands: Commands) -> None:
    command = commands.add_parser("export", help="write a trained model's weights for 'predict'")
    command.add_argument("--run", default="fma_small", help="name of the run folder")
    command.add_argument("--model", default="crnn", help="the model of that run (default: crnn)")
    command.add_argument("--out", type=user_path, help="file to write (default: outputs/<run>/<model>.pt)")
    command.set_defaults(command=_export)
    command = commands.add_parser("predict", help="tell the genre of any audio file")
    files = "MP3, OGG, FLAC, WAV, AIFF; or a folder of them"
    command.add_argument("songs", nargs="+", type=Path, metavar="SONG", help=files)
    command.add_argument("--weights", type=user_path, help="weights of 'export' (default: the package's)")
    command.add_argument("--json", action="store_true", help="print a JSON object a line")
    command.set_defaults(command=_predict)


def _download(options: argparse.Namespace) -> None:
    from fma_nb.raw.download import ARCHIVES, download

    if options.archive and len(options.names) > 1:
        raise FmaNbError("--archive names one file: give one NAME with it.")
    for name in options.names:
        folder = download(ARCHIVES[name], base_url=options.url, archive_path=options.archive)
        print(f"fma_{name} is in {_shown(folder)}")


def _mini(options: argparse.Namespace) -> None:
    from fma_nb.raw.mini import make_fma_mini

    print(f"fma_mini (synthetic) is in {_shown(make_fma_mini(workers=options.workers))}")


def _spectrograms(options: argparse.Namespace) -> None:
    from fma_nb.bulk.spectrograms import make_spectrograms

    places = {"workers": options.workers, "scheduler": options.scheduler}
    skipped = make_spectrograms(options.dataset, options.preset, partial=options.partial, **places)
    print(f"The spectrograms are in {_shown(spectrogram_dir(options.dataset, options.preset))}")
    print(f"{len(skipped)} clips were skipped" + (":" if len(skipped) else "."))
    for row in skipped.head(20).itertuples():
        print(f"  {_shown(Path(row.path))}: {row.reason}")
    if len(skipped):
        print("A file that has changed is tried again by itself; delete skipped.csv to try all of them.")


def _run(options: argparse.Namespace) -> None:
    from fma_nb.commands.notebooks import RunRequest, run_notebooks

    options.only = tuple(filter(None, options.only.split(",")))
    request = RunRequest(**{field.name: getattr(options, field.name) for field in fields(RunRequest)})
    print(f"Done. Open {_shown(run_notebooks(request))} in a browser.")


def _report(options: argparse.Namespace) -> None:
    from fma_nb.commands.report import write_report

    print(f"Open {_shown(write_report(options.run))} in a browser.")


def _evaluate(options: argparse.Namespace) -> None:
    from fma_nb.commands.evaluate import evaluate_rows, evaluate_run

    run, data = options.run or options.dataset, (options.dataset, options.preset, options.split)
    if rows := list(filter(None, options.rows.split(","))):
        print("Written:", *map(_shown, evaluate_rows(run, rows, *data, options.device)), sep="\n  ")
    else:
        print(evaluate_run(run, options.model, *data, options.device))


def _add_ablate(commands: Commands) -> None:
    command = commands.add_parser("ablate", help="train the final recipe without each of its ingredients")
    _add_run_options(command)
    command.add_argument("--rows", default="", help="rows of the table, e.g. final,no_gru (default: all)")
    command.add_argument("--seeds", type=int, help="seeds a row (default: 3; 1 with --folds)")
    command.add_argument("--folds", type=int, default=0, help="folds by artist over train and val (e.g. 5)")
    where = command.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="trainings side by side (default: all cores; 1 on a GPU)")
    where.add_argument(
        "--scheduler", default="", metavar="tcp://HOST:PORT", help="train on this Dask cluster"
    )
    _add_parameters(command, "change the final recipe")
    command.set_defaults(command=_ablate)


def _ablate(options: argparse.Namespace) -> None:
    from fma_nb.bulk.pack import load_pack
    from fma_nb.commands.parameters import changed_recipe
    from fma_nb.recipe import default_recipe
    from fma_nb.runs.ablation import ALL_ROWS, ablation_table, run_ablation, write_tables
    from fma_nb.training import resolve_device

    run, device = options.run or options.dataset, resolve_device(options.device)
    run_ablation(
        load_pack(options.dataset, options.preset),
        run,
        list(filter(None, options.rows.split(","))) or ALL_ROWS,
        changed_recipe(default_recipe("crnn"), options.parameters),
        device,
        n_seeds=options.seeds if options.seeds is not None else 1 if options.folds else 3,
        n_folds=options.folds,
        jobs=options.jobs
        if options.jobs is not None
        else 1
        if device.type == "cuda"
        else os.cpu_count() or 1,
        scheduler=options.scheduler,
    )
    table = ablation_table(run, options.folds)
    shown = [name for name in table if not name.endswith(("_low", "_high"))]
    print(table[shown].round(4).to_string(index=False))
    if len(table) > 1:
        _draw_ablation(run, table, options.folds)
    print("Written:", *(_shown(path) for path in write_tables(run, table, options.folds)), sep="\n  ")


def _draw_ablation(run: str, table: pd.DataFrame, n_folds: int) -> None:
    import matplotlib.pyplot as plt

    from fma_nb.plots import ablation_plot, save_figure, use_style

    use_style()
    figure, ax = plt.subplots(figsize=(8, 1 + 0.36 * len(table)))
    ablation_plot(ax, table).set_title("One thing changed (seeds)")
    clips = f"{n_folds} folds by artist" if n_folds else "validation"
    caption = f"Ablation on {clips}: change in accuracy with 95 % intervals when one thing is changed."
    name = "12_folds" if n_folds else "11_ablation"
    save_figure(figure, run, name, caption)
    print(f"The table is drawn in {_shown(run_dir(run) / 'figures' / f'{name}.png')}")


def _export(options: argparse.Namespace) -> None:
    from fma_nb.commands.predict import export_weights

    path = options.out or run_dir(options.run) / f"{options.model}.pt"
    temperature = export_weights(options.run, options.model, path)
    size = path.stat().st_size / 1e6
    print(f"{_shown(path)}: {size:.1f} MB, temperature {temperature:.3f} fitted on validation")
    print(f"fma-nb predict --weights {_shown(path)} SONG.mp3")


def _predict(options: argparse.Namespace) -> None:
    from fma_nb.commands.predict import load_classifier, print_predictions

    classifier = load_classifier(options.weights or SHIPPED_WEIGHTS)
    n_failed = print_predictions(options.songs, classifier, as_json=options.json)
    if n_failed:
        raise FmaNbError(f"{n_failed} file(s) have no answer: see the reasons above.")


def _shown(path: Path) -> str:
    """Return a path relative to the current folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
