"""The package's plan: who imports whom, and that what is imported is installed with it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest

from fma_nb.project import project_root

ROOT = project_root()
PACKAGE = ROOT / "fma_nb"
# Each imports only from those before it; a room also from itself, without a circle.
FLAT = (
    *(
        "project",
        "progress",
        "metadata",
        "audio",
        "spectrogram",
        "dataset",
        "model",
        "recipe",
        "augmentation",
    ),
    *("optimization", "training", "evaluation", "calibration", "plots"),
)
ROOMS = ("codec", "bulk", "raw", "runs", "commands")
# The codec stands below the lessons: it imports nothing of the package. All other rooms stand above them.
ORDER = ("codec", *FLAT, *ROOMS[1:], "__main__")
PROJECTS = {"PIL": "pillow", "sklearn": "scikit-learn", "mpl_toolkits": "matplotlib"}  # where names differ
NOT_IMPORTED = {
    "jupyterlab": "the notebooks are read and run in it",
    "ipykernel": "Jupyter and papermill execute the notebooks with it",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported, also within a function: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules that one of them imports; ``fma_nb`` itself, which knows the version, may be by all."""
    found = set()
    for name in imported(ast.parse(MODULES[module].read_text())):
        if name.split(".")[0] == "fma_nb":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {"fma_nb"}


def place(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def top_level_modules(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported(ast.parse(source))}


def cells(path: Path) -> str:
    return "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")


def third_party(sources: Iterator[str]) -> set[str]:
    """The projects that sources import, by their name in a package index."""
    names = set().union(*(top_level_modules(source) for source in sources))
    own = names - sys.stdlib_module_names - {"fma_nb"}
    return {PROJECTS.get(name, name.lower().replace("_", "-")) for name in own}


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


# ----- imports -----


def test_every_module_has_its_place() -> None:
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert flat == set(FLAT)
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == set(ROOMS)
    assert not list(PACKAGE.glob("*/*/*.py"))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fma_nb"])
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    in_a_room = module.split(".")[1] in ROOMS
    last = place(module) if in_a_room else place(module) - 1
    wrong = [name for name in own_imports(module) if place(name) > last]
    assert not wrong, f"{module} imports {wrong}"


def test_the_package_itself_loads_predict_only_when_asked() -> None:
    assert own_imports("fma_nb") == {"fma_nb.commands.predict"}
    tree = ast.parse(MODULES["fma_nb"].read_text())
    lazy = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
    )
    assert "fma_nb.commands.predict.predict" in imported(lazy)
    tree.body.remove(lazy)
    assert set(imported(tree)) <= sys.stdlib_module_names


def test_the_package_stays_thin() -> None:
    """The flat part is read in an hour; a new line earns its place, or an old one goes."""
    n_lines = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert sum(n_lines.values()) <= 6000
    assert sum(n for path, n in n_lines.items() if path.parent == PACKAGE) <= 2700


def test_imports_do_not_go_in_a_circle() -> None:
    graph = {module: own_imports(module) for module in MODULES if module != "fma_nb"}
    TopologicalSorter(graph).prepare()


# ----- what is installed -----


def test_every_folder_of_the_package_is_installed() -> None:
    folders = {module_name(path / "__init__.py") for path in {path.parent for path in PACKAGE.rglob("*.py")}}
    named = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(folders)


def test_what_the_package_imports_is_declared() -> None:
    project = pyproject()["project"]
    wanted = third_party(path.read_text() for path in MODULES.values())
    optional = declared(project["optional-dependencies"]["cluster"])
    assert wanted - declared(project["dependencies"]) - optional == set()


def test_what_is_declared_is_imported() -> None:
    sources = [path.read_text() for path in MODULES.values()]
    sources += [cells(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    unused = declared(pyproject()["project"]["dependencies"]) - third_party(iter(sources))
    assert unused == set(NOT_IMPORTED)
