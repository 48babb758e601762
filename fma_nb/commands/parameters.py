"""The texts of ``-p NAME VALUE`` as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from fma_nb.project import FmaNbError
from fma_nb.recipe import Recipe


def changed_recipe(recipe: Recipe, changes: Iterable[tuple[str, str]]) -> Recipe:
    """Return a recipe with fields changed by name, their values given as text."""
    types = {field.name: type(field.default) for field in fields(Recipe)} | {"warmup": float}
    given: dict[str, Any] = {}
    for name, text in changes:
        if name not in types:
            raise FmaNbError(f"-p {name}: the recipe has no such field; it has {', '.join(sorted(types))}.")
        given[name] = typed(name, text, types[name])
    return replace(recipe, **given)


def typed(name: str, text: str, kind: type) -> Any:
    """Turn the text of ``-p NAME TEXT`` into a value of a type, or raise `FmaNbError`."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise FmaNbError(f"-p {name} {text}: not a value of type {kind.__name__}.") from error
