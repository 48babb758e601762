"""In a notebook each name means one thing: who goes back and runs a cell again relies on it."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted([*FOLDER.glob("0*.ipynb"), *FOLDER.glob("solutions/0*.ipynb")])
SCRATCH = {"figure", "fig", "ax", "axes", "caption", "_"}  # of one cell, never read in another
NEW_SCOPE = (
    ast.FunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk through what runs at a cell's top level, also inside its loops and branches."""
    for child in ast.iter_child_nodes(tree):
        yield child
        if not isinstance(child, NEW_SCOPE):
            yield from statements(child)


def names_in(tree: ast.AST, context: type) -> set[str]:
    nodes = (tree, *statements(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def loop_variables(source: str) -> set[str]:
    loops = [names_in(n.target, ast.Store) for n in statements(ast.parse(source)) if isinstance(n, ast.For)]
    return set().union(*loops)


def meanings(source: str) -> set[str]:
    """Return the names to which a cell gives a meaning that other cells may rely on.

    An update is none, it reads the name that it sets: ``run = run or dataset``.
    """
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.withitem | ast.NamedExpr):
            found |= names_in(node, ast.Store) - names_in(node, ast.Load)
    return found - SCRATCH - loop_variables(source)


def names_with_two_meanings(sources: list[str]) -> list[str]:
    """Return the names that two cells give a meaning, or that one cell does and a loop of another."""
    times = Counter(name for source in sources for name in meanings(source))
    looped = set().union(*map(loop_variables, sources))
    return sorted(name for name, n in times.items() if n > 1 or name in looped)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_name_means_two_things(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert names_with_two_meanings([c.source for c in cells if c.cell_type == "code"]) == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("whole = table['a']", "whole, parts = 1, 2", ["whole"]),
        ("def shown(p):\n    return p", "shown = 3", ["shown"]),
        ("if True:\n    text = 1", "with open('f') as text:\n    pass", ["text"]),
        ("run: str = ''", "run = run or 'fma_mini'", []),
        ("table = 1", "for table in [1]:\n    print(table)", ["table"]),
        ("for row in [1]:\n    print(row)", "for row in 'ab':\n    print(row)", []),
        ("figure, ax = subplots()", "figure, axes = subplots()", []),
        ("squares = [x for x in 'ab']", "def f():\n    x = squares = 1\n    return x", []),
    ],
)
def test_what_counts_as_a_second_meaning(first: str, second: str, expected: list[str]) -> None:
    assert names_with_two_meanings([first, second]) == expected
