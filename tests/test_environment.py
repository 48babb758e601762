"""What has to be installed, what a wheel holds, what a process loads, and the release."""

from __future__ import annotations

import ast
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from conftest import music, write_mp3

from fma_nb import __version__
from fma_nb.metadata import GENRES
from fma_nb.project import project_root
from fma_nb.spectrogram import get_preset, make_spectrogram

# What is slow to load or large, and of no use to a process that makes spectrograms.
HEAVY = {"pandas", "IPython", "matplotlib", "torch"}
FIRST_SETUPTOOLS = 77  # that reads our licence field


def dependencies() -> list[str]:
    return tomllib.loads((project_root() / "pyproject.toml").read_text())["project"]["dependencies"]


def test_environment_yml_names_the_packages_of_pyproject() -> None:
    text = (project_root() / "environment.yml").read_text()
    listed = re.findall(r"^ {6}- (\S+)$", text.split("- pip:")[1], flags=re.MULTILINE)
    assert set(listed) == set(dependencies())


def test_environment_yml_installs_the_project_itself() -> None:
    assert "- -e ." in (project_root() / "environment.yml").read_text()


def imported_modules() -> Iterator[str]:
    """Yield what the package imports anywhere, also inside functions: the first part of each name."""
    for path in (project_root() / "fma_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield str(node.module).partition(".")[0]


def test_every_third_party_import_of_the_package_is_a_named_dependency() -> None:
    named = {re.split(r"[=<>]", line)[0].lower() for line in dependencies()}
    third_party = set(imported_modules()) - sys.stdlib_module_names - {"fma_nb"}
    optional = {"distributed"}
    # mpl_toolkits and others stand in more than one distribution: one of them must be named.
    distributions = packages_distributions()
    missing = {
        name
        for name in third_party - optional
        if not named & {distribution.lower() for distribution in distributions[name]}
    }
    assert third_party >= {"torch", "librosa", "papermill", "jinja2"}  # flat, in a room, and in a function
    assert not missing


# ----- a wheel -----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the project: setuptools leaves its folders where it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        project_root() / "fma_nb", source / "fma_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project_root() / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(source)]
    if setuptools_is_recent():
        command.append("--no-build-isolation")
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and not setuptools_is_recent():
        pytest.skip(f"setuptools>={FIRST_SETUPTOOLS} is neither installed nor to be had")
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def setuptools_is_recent() -> bool:
    try:
        return int(version("setuptools").split(".")[0]) >= FIRST_SETUPTOOLS
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def its_python(wheel: Path) -> Path:
    """The Python of an environment that has the wheel, and takes all else from the running one."""
    home = wheel.parent / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # Behind its own packages, and without what .pth files do there: one of them is the editable project.
    folders = [path for path in sys.path if path.endswith("-packages")]
    (next(home.glob("lib/*/site-packages")) / "others.pth").write_text("\n".join(folders) + "\n")
    return python


def test_a_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.startswith(f"fma_nb-{__version__}-")


def test_a_wheel_holds_every_module_the_music_the_weights_and_the_templates(wheel: Path) -> None:
    package = project_root() / "fma_nb"
    endings = (".py", ".toml", ".j2")
    wanted = [path for path in package.rglob("*") if path.suffix in endings]
    wanted += (package / "weights").iterdir()
    names = {path.relative_to(project_root()).as_posix() for path in wanted}
    assert {
        "fma_nb/weights/crnn.pt",
        "fma_nb/commands/report.html.j2",
        "fma_nb/commands/notebook.html.j2",
        "fma_nb/commands/style.css.j2",
        "fma_nb/raw/genres.toml",
    } <= names
    with zipfile.ZipFile(wheel) as file:
        assert {name for name in file.namelist() if name.startswith("fma_nb/")} == names


def in_its_environment(python: Path, *arguments: str) -> str:
    """Run the wheel's Python outside the project; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], cwd=python.parent, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_predicts(its_python: Path, tmp_path: Path) -> None:
    place = in_its_environment(its_python, "-c", "import fma_nb; print(fma_nb.__file__)").strip()
    assert Path(place).is_relative_to(its_python.parent.parent)  # not the editable project
    song = write_mp3(tmp_path / "song.mp3", music(0, 22_050, 1), 22_050)
    found = json.loads(in_its_environment(its_python, "-m", "fma_nb", "predict", str(song), "--json"))
    assert tuple(found["probabilities"]) == GENRES
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-6)


# ----- what a process loads -----


def loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh Python has loaded after some code."""
    printing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", printing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_making_spectrograms_loads_little() -> None:
    loaded = loaded_by("import fma_nb.bulk.workers, fma_nb.spectrogram")
    assert {"fma_nb.bulk.workers", "fma_nb.spectrogram"} <= loaded
    assert not loaded & HEAVY


def test_a_worker_that_is_sent_its_function_loads_little() -> None:
    """A worker is a fresh Python that unpickles what it has to do."""
    work = pickle.dumps(functools.partial(make_spectrogram, preset=get_preset("compact")))
    loaded = loaded_by(f"import pickle; pickle.loads({work!r})")
    assert "fma_nb.spectrogram" in loaded
    assert not loaded & HEAVY


# ----- the release -----


def test_citation_and_changelog_name_the_version_and_its_date() -> None:
    citation = (project_root() / "CITATION.cff").read_text()
    cited = [re.search(rf"^{key}: (\S+)$", citation, re.MULTILINE)[1] for key in ("version", "date-released")]
    changelog = (project_root() / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+?)\] - (\S+)$", changelog, re.MULTILINE).groups()
    assert cited == list(newest)
    assert cited[0] == __version__


@pytest.mark.parametrize(
    ("schema", "name"),
    [("github-workflows", ".github/workflows/test.yml"), ("citation-file-format", "CITATION.cff")],
)
def test_a_file_that_others_read_has_their_form(schema: str, name: str) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*check, str(project_root() / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
