"""The main job: execute the five notebooks headless, in order, through papermill.

An executed notebook is kept with a key over everything it depends on: its source, its parameters, the
package's code, the data and the metrics it reads. While the key holds, the notebook is not run again.
"""

import ast
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpecManager
from papermill.exceptions import PapermillExecutionError

from fma_nb import project
from fma_nb.bulk.folders import check_writable
from fma_nb.bulk.pack import load_pack, scan_pngs
from fma_nb.commands.report import write_report
from fma_nb.metadata import load_index
from fma_nb.project import FmaNbError, run_dir
from fma_nb.raw.mini import make_fma_mini
from fma_nb.recipe import Recipe
from fma_nb.runs.experiment import chosen_split, evaluation_splits, metrics_path, versions
from fma_nb.spectrogram import get_preset
from fma_nb.training import device_name, resolve_device

# Each notebook with the metrics that it writes or reads: when they change or vanish, it has to run again.
NOTEBOOKS: dict[str, tuple[str, ...]] = {
    "01_eda": (),
    "02_spectrograms": (),
    "03_baseline": ("baseline",),
    "04_crnn": ("crnn", "crnn_no_gru"),
    "05_comparison": ("baseline", "crnn", "crnn_no_gru"),
}
_NEEDS_AUDIO = ("01_eda", "02_spectrograms")


def run_notebooks(names: Sequence[str], parameters: dict[str, Any], kernel: str = "") -> Path:
    """Run the notebooks that are not up to date; write their HTML and return the report's ``index.html``.

    Each takes those of the parameters that it has; dataset, preset, run and device are among them.
    `FmaNbError` before any work for a wrong parameter or missing data; or with the cell, the error and the
    half-run notebook when a cell fails.
    """
    parameters, run = _checked_parameters(parameters), parameters["run"]
    kernel = _checked_kernel(kernel)
    check_writable(run_dir(run))
    if parameters["dataset"] in project.SYNTHETIC_DATASETS:
        make_fma_mini()
    _check_data(names, parameters)
    for i, name in enumerate(names, 1):
        own = {key: parameters[key] for key in notebook_parameters(name) if key in parameters}
        executed = run_dir(run) / "notebooks" / f"{name}.ipynb"
        is_up_to_date = executed.exists() and (
            nbformat.read(executed, as_version=4).metadata.get("fma_nb") == {"key": _key(name, own, run)}
        )
        print(f"[{i}/{len(names)}] {name}: {'up to date' if is_up_to_date else 'running'}", flush=True)
        if not is_up_to_date:
            _execute(name, own, run, kernel, executed)
    return write_report(run)


def _source(name: str) -> Path:
    return project.project_root() / "notebooks" / f"{name}.ipynb"


def notebook_parameters(name: str) -> dict[str, Any]:
    """Return the parameters a notebook declares, with their default values, which also give the type."""
    found = papermill.inspect_notebook(str(_source(name)))
    return {key: ast.literal_eval(entry["default"]) for key, entry in found.items()}


def chosen_notebooks(only: Sequence[str]) -> list[str]:
    """Return the names of the notebooks with these numbers, of all without any; `FmaNbError` for another."""
    if not _source("01_eda").exists():
        raise FmaNbError(
            "The notebooks are not part of an installed package: clone the project and run the command there."
        )
    numbers = {text.strip().zfill(2)[:2] for text in only}
    if numbers - {name[:2] for name in NOTEBOOKS}:
        raise FmaNbError(f"--only {', '.join(only)}: choose among 01, 02, 03, 04, 05.")
    return [name for name in NOTEBOOKS if not only or name[:2] in numbers]


def _checked_parameters(given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with a path that means the same everywhere, or refuse what cannot work."""
    project.check_dataset(given["dataset"])
    get_preset(given["preset"])
    run_dir(given["run"])
    if given.get("song"):
        given = given | {"song": str(project.user_path(given["song"]))}
        if not Path(given["song"]).is_file():
            raise FmaNbError(f"-p song {given['song']}: there is no such file.")
    replace(Recipe(), **{key: given[key] for key in ("epochs", "batch_size", "lr") if key in given})
    resolve_device(given["device"], given.get("gpu_memory_fraction", 1.0))
    chosen_split(given["dataset"], given.get("evaluation_split", ""))
    if given.get("n_seeds", 1) < 1:
        raise FmaNbError(f"n_seeds={given['n_seeds']} must be at least 1.")
    return given


def _check_data(names: Sequence[str], parameters: dict[str, Any]) -> None:
    if any(name in _NEEDS_AUDIO for name in names):
        load_index(parameters["dataset"])
    if "02_spectrograms" not in names and names[-1] not in _NEEDS_AUDIO:
        pack = load_pack(parameters["dataset"], parameters["preset"])
        evaluation_splits(pack, parameters.get("evaluation_split", ""))


def _checked_kernel(name: str) -> str:
    installed = sorted(KernelSpecManager().find_kernel_specs())
    if name and name not in installed:
        raise FmaNbError(f"--kernel {name} is not installed: choose among {', '.join(installed)}.")
    return name or ("fma-nb" if "fma-nb" in installed else "python3")


def _key(name: str, parameters: dict[str, Any], run: str) -> str:
    """Hash what a notebook's outputs depend on."""
    device = device_name(resolve_device(parameters.get("device", "cpu")))
    digest = hashlib.sha256(json.dumps([parameters, device, versions()], sort_keys=True).encode())
    cells = nbformat.read(_source(name), as_version=4).cells
    digest.update(json.dumps([cell.source for cell in cells]).encode())
    for path in sorted((project.project_root() / "fma_nb").rglob("*")):
        if path.suffix in (".py", ".toml"):
            digest.update(path.read_bytes())
    tracks_csv = project.metadata_dir(parameters["dataset"]) / "tracks.csv"
    digest.update(str(tracks_csv.stat().st_size if tracks_csv.exists() else 0).encode())
    if "preset" in parameters:
        folder = project.spectrogram_dir(parameters["dataset"], parameters["preset"])
        digest.update(scan_pngs(folder).to_csv().encode())
    for path in _files_read(name, parameters, run):
        digest.update(f"{path.name}".encode() + (path.read_bytes() if path.is_file() else b"missing"))
    return digest.hexdigest()


def _files_read(name: str, parameters: dict[str, Any], run: str) -> list[Path]:
    """List what a notebook reads beside its dataset: metrics, and for the comparison whatever it shows."""
    paths = [metrics_path(run, model) for model in NOTEBOOKS[name]]
    if name == "05_comparison":
        paths += [*sorted(run_dir(run).glob("ablation/*/metrics/*.json")), project.SHIPPED_WEIGHTS]
    if parameters.get("song"):
        paths.append(Path(parameters["song"]))
    return paths


def _execute(name: str, parameters: dict[str, Any], run: str, kernel: str, path: Path) -> None:
    """Execute a notebook under a provisional name; rename it when its last cell has finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.ipynb")
    try:
        notebook = papermill.execute_notebook(
            str(_source(name)),
            str(partial),
            parameters=parameters,
            kernel_name=kernel,
            cwd=str(_source(name).parent),
            progress_bar={"desc": name, "disable": None, "leave": False},
            extra_arguments=["--IPKernelApp.log_level=50"],
        )
    except PapermillExecutionError as error:
        raise FmaNbError(
            f"{name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"The half-run notebook is {partial}"
        ) from error
    notebook.metadata["fma_nb"] = {"key": _key(name, parameters, run)}
    nbformat.write(notebook, partial)
    partial.replace(path)
