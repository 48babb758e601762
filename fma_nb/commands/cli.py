"""The command line: ``fma-nb`` and ``python -m fma_nb``."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from fma_nb import __version__, project
from fma_nb.project import FmaNbError, run_dir, user_path

Parser = argparse.ArgumentParser
Command = Callable[[argparse.Namespace], None]
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
ADDRESS = "tcp://HOST:PORT"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; print bad input as one sentence and return a non-zero exit status."""
    _write_any_text()
    try:
        options = _parser().parse_args(arguments)
        # A relative folder means the one where the command was typed; a notebook's kernel runs elsewhere.
        os.environ["FMA_NB_DATA"] = str(getattr(options, "data", project.data_dir()))
        os.environ["FMA_NB_OUTPUTS"] = str(getattr(options, "outputs", project.outputs_dir()))
        options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except FmaNbError as error:
        print(f"fma-nb: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        seen_enough = isinstance(error, BrokenPipeError)  # the reader of the output, such as head, has
        if not seen_enough:
            print(f"fma-nb: {error.filename or 'the output'}: {error.strerror}.", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # lets the last flush succeed
        return 141 if seen_enough else 2
    except KeyboardInterrupt:
        print("fma-nb: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _write_any_text() -> None:
    """Let a stream that lacks a character of a name or of a bar write a substitute for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if stream.encoding.lower() == "utf-8" else "replace")


def _parser() -> Parser:
    about = "Music genre classification on FMA-Small: data, spectrograms, notebooks, report."
    parser = argparse.ArgumentParser(prog="fma-nb", description=about)
    parser.add_argument("--version", action="version", version=f"fma-nb {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--dataset", default="fma_mini", help=f"one of {', '.join(project.DATASETS)}")
    data.add_argument("--preset", default="compact", help="full or compact (default: compact)")
    _add_data_commands(commands, data)
    run = argparse.ArgumentParser(add_help=False, parents=[data])
    run.add_argument("--run", default="", help="name of the run folder (default: the dataset's)")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    _add_run_commands(commands, run)
    _add_weights_commands(commands)
    for command in (parser, *commands.choices.values()):
        for name in ("data", "outputs"):
            text = f"the {name} folder (default: $FMA_NB_{name.upper()}, else {name}/)"
            command.add_argument(f"--{name}", type=user_path, default=argparse.SUPPRESS, help=text)
    return parser


def _add(commands: Commands, function: Command, about: str, *shared: Parser) -> Parser:
    """Add a command with the name of its function."""
    command = commands.add_parser(function.__name__.strip("_"), help=about, parents=shared)
    command.set_defaults(command=function)
    return command


def _add_data_commands(commands: Commands, shared: Parser) -> None:
    from fma_nb.raw.download import ARCHIVES, FMA_URL

    command = _add(commands, _download, "download and verify FMA's archives")
    command.add_argument("names", nargs="+", choices=ARCHIVES, metavar="NAME", help=", ".join(ARCHIVES))
    command.add_argument("--url", default=FMA_URL, help="folder to download from (default: %(default)s)")
    command.add_argument("--archive", type=user_path, help="use this zip file instead of downloading")
    command = _add(commands, _mini, "make fma_mini, the synthetic dataset")
    command.add_argument("--workers", type=int, help="processes (default: all cores)")
    command = _add(commands, _spectrograms, "make the spectrogram PNGs of a dataset", shared)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="processes (default: all cores)")
    where.add_argument("--scheduler", metavar=ADDRESS, help="use this Dask scheduler's workers")
    command.add_argument("--partial", action="store_true", help="go on though a split lacks a genre")


def _add_run_commands(commands: Commands, shared: Parser) -> None:
    run = _add(commands, _run, "execute the notebooks and write the report", shared)
    text = "numbers of the notebooks to run, e.g. 03,04"
    run.add_argument("--only", type=_names, default=[], help=text)
    run.add_argument("--kernel", default="", help="Jupyter kernel (default: fma-nb, else python3)")
    report = _add(commands, _report, "write a run's report again")
    report.add_argument("--run", default="fma_mini", help="name of the run folder")
    evaluate = _add(commands, _evaluate, "evaluate a trained model on a split", shared)
    text = "baseline, crnn, crnn_no_gru, crnn_lstm, crnn_one_way or crnn_shuffled (default: crnn)"
    evaluate.add_argument("--model", default="crnn", help=text)
    evaluate.add_argument("--split", default="val", choices=project.SPLITS)
    text = "rows of an ablation and the package's weights, as CSV"
    evaluate.add_argument("--rows", type=_names, default=[], help=text)
    ablate = _add(commands, _ablate, "train the final recipe without each of its ingredients", shared)
    text = "rows of the table, e.g. final,no_gru (default: all)"
    ablate.add_argument("--rows", type=_names, default=[], help=text)
    ablate.add_argument("--seeds", type=int, help="seeds a row (default: 3; 1 with --folds)")
    ablate.add_argument("--folds", type=int, default=0, help="folds by artist over train and val (e.g. 5)")
    where = ablate.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="trainings side by side (default: all cores; 1 on a GPU)")
    where.add_argument("--scheduler", default="", metavar=ADDRESS, help="train on this Dask cluster")
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("NAME", "VALUE"), "action": "append", "default": []}
    for command, what in ((run, "a parameter of the notebooks"), (ablate, "change the final recipe")):
        text = f"{what}, e.g. -p epochs 20; may be repeated"
        command.add_argument("-p", dest="parameters", help=text, **pair)


def _add_weights_commands(commands: Commands) -> None:
    command = _add(commands, _export, "write a trained model's weights for 'predict'")
    command.add_argument("--run", default="fma_small", help="name of the run folder")
    command.add_argument("--model", default="crnn", help="the model of that run (default: crnn)")
    command.add_argument("--out", type=user_path, help="file to write (default: outputs/<run>/<model>.pt)")
    command = _add(commands, _predict, "tell the genre of any audio file")
    text = "MP3, OGG, FLAC, WAV, AIFF; or a folder of them"
    command.add_argument("songs", nargs="+", type=Path, metavar="SONG", help=text)
    command.add_argument("--weights", type=user_path, help="weights of 'export' (default: the package's)")
    command.add_argument("--json", action="store_true", help="print a JSON object per line")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


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
    print(f"The spectrograms are in {_shown(project.spectrogram_dir(options.dataset, options.preset))}")
    print(f"{len(skipped)} clips were skipped" + (":" if len(skipped) else "."))
    for row in skipped.head(20).itertuples():
        print(f"  {_shown(Path(row.path))}: {row.reason}")
    if len(skipped):
        print("A file that has changed is tried again by itself; delete skipped.csv to try all of them.")


def _run(options: argparse.Namespace) -> None:
    from fma_nb.commands.notebooks import chosen_notebooks, notebook_parameters, run_notebooks

    names = chosen_notebooks(options.only)
    types = {key: type(value) for name in names for key, value in notebook_parameters(name).items()}
    given = {key: getattr(options, key) for key in ("dataset", "preset", "device")}
    given["run"] = options.run or options.dataset
    given |= typed(options.parameters, types, "none of the chosen notebooks has it; they have")
    print(f"Done. Open {_shown(run_notebooks(names, given, options.kernel))} in a browser.")


def _report(options: argparse.Namespace) -> None:
    from fma_nb.commands.report import write_report

    print(f"Open {_shown(write_report(options.run))} in a browser.")


def _evaluate(options: argparse.Namespace) -> None:
    from fma_nb.bulk.pack import load_pack
    from fma_nb.commands.evaluate import evaluate_rows, evaluate_run
    from fma_nb.training import resolve_device

    run, split, device = options.run or options.dataset, options.split, resolve_device(options.device)
    pack = load_pack(options.dataset, options.preset, needed=[split])
    if options.rows:
        print("Written:", *map(_shown, evaluate_rows(run, options.rows, pack, split, device)), sep="\n  ")
    else:
        print(evaluate_run(run, options.model, pack, split, device))


def _ablate(options: argparse.Namespace) -> None:
    from fma_nb.bulk.pack import load_pack
    from fma_nb.recipe import Recipe, default_recipe
    from fma_nb.runs.ablation import ALL_ROWS, ablation_table, run_ablation, write_tables
    from fma_nb.training import resolve_device

    run, device = options.run or options.dataset, resolve_device(options.device)
    seeds = 1 if options.folds else 3
    jobs = 1 if device.type == "cuda" else os.cpu_count() or 1
    types = {field.name: type(field.default) for field in fields(Recipe)} | {"warmup": float}
    changes = typed(options.parameters, types, "the recipe has no such field; it has")
    run_ablation(
        load_pack(options.dataset, options.preset),
        run,
        options.rows or ALL_ROWS,
        replace(default_recipe("crnn"), **changes),
        device,
        n_seeds=seeds if options.seeds is None else options.seeds,
        n_folds=options.folds,
        jobs=jobs if options.jobs is None else options.jobs,
        scheduler=options.scheduler,
    )
    table = ablation_table(run, options.folds)
    shown = [name for name in table if not name.endswith(("_low", "_high"))]
    print(table[shown].round(4).to_string(index=False))
    if len(table) > 1:
        _draw_ablation(run, table, options.folds)
    print("Written:", *map(_shown, write_tables(run, table, options.folds)), sep="\n  ")


def _draw_ablation(run: str, table: Any, n_folds: int) -> None:
    import matplotlib.pyplot as plt

    from fma_nb.plots import ablation_plot, save_figure, use_style

    use_style()
    figure, ax = plt.subplots(figsize=(8, 1 + 0.36 * len(table)))
    ablation_plot(ax, table).set_title("One thing changed (seeds)")
    name, clips = ("12_folds", f"{n_folds} folds by artist") if n_folds else ("11_ablation", "validation")
    caption = f"Ablation on {clips}: change in accuracy with 95 % intervals when one thing is changed."
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

    classifier = load_classifier(options.weights or project.SHIPPED_WEIGHTS)
    print_predictions(options.songs, classifier, as_json=options.json)


def typed(texts: Iterable[tuple[str, str]], types: Mapping[str, type], unknown: str) -> dict[str, Any]:
    """Turn the texts of ``-p NAME VALUE`` into values; ``unknown`` tells of names without a type."""
    values: dict[str, Any] = {}
    for name, text in texts:
        if name not in types:
            raise FmaNbError(f"-p {name}: {unknown} {', '.join(sorted(types))}.")
        kind = types[name]
        try:
            values[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise FmaNbError(f"-p {name} {text}: not a value of type {kind.__name__}.") from error
    return values


def _shown(path: Path) -> str:
    """Return a path relative to the current folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
