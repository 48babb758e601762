"""One run of pytest in a copy of the project, for `test_mutations`; imports nothing of the project itself."""

from __future__ import annotations

import importlib
import os
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

NOT_THE_COPY = 99
TIMEOUT_S = 900.0
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg")
# Imported once, by the server that all runs are forked from: they would take most of the time of a run.
PRELOADED = [
    "librosa",
    "matplotlib.pyplot",
    "pandas",
    "scipy.stats",
    "sklearn.metrics",
    "torch",
    "torchaudio",
]


def run_tests(copy: Path, *selection: str) -> tuple[int | None, str]:
    """Run tests, or the cells of one notebook, of a copy; return pytest's exit status and what it printed.

    The status is None when the tests hang.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    options = NBVAL if selection[0].endswith(".ipynb") else ()
    printed = copy / "printed.txt"
    process = context.Process(target=_run, args=(copy, printed, [*options, *selection]))
    process.start()
    process.join(TIMEOUT_S)
    status = process.exitcode
    process.kill()
    return status, printed.read_text()


def _run(copy: Path, printed: Path, arguments: list[str]) -> None:
    output = os.open(printed, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))  # before the installed package
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    for moved in ("FMA_NB_DATA", "FMA_NB_OUTPUTS", "FMA_NB_REAL"):
        os.environ.pop(moved, None)
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "--basetemp", str(copy / "tmp")]
    status = pytest.main([*options, *arguments])
    imported = importlib.import_module("fma_nb").__file__
    sys.exit(status if Path(str(imported)).is_relative_to(copy) else NOT_THE_COPY)
