"""Choices: settings of a recipe that go together, under one name.

A recipe for a model on a suite is the same at every rank but for a few numbers. It keeps these in a table:

    choices:
      rank:
        default: 32
        table:
          16: {adapter.r: 16, adapter.lora_alpha: 32, optimizer.learning_rate: 2.0e-4}
          32: {adapter.r: 32, adapter.lora_alpha: 64, optimizer.learning_rate: 1.0e-4}

`peft-tsd train NAME rank=16` takes the first row. A row is what overrides are, dotted keys with values, and is applied
before those of the command line. The recipe kept in a run folder is what came out, and has no choices any more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import RecipeError, did_you_mean


class Choice(NamedTuple):
    """A name's rows, by their own names as text."""

    default: str
    table: dict[str, dict[str, Any]]


def take_choices(content: dict[str, Any], where: str) -> dict[str, Choice]:
    """Remove `choices` from a recipe's content and read them.

    Args:
        content: What the file holds.
        where: The file, for error messages.

    Raises:
        RecipeError: They are not such tables.
    """
    given = content.pop("choices", None) or {}
    if not isinstance(given, dict):
        raise RecipeError(f"{where}: choices is a mapping of names; got {type(given).__name__}")
    found = {}
    for name, choice in given.items():
        table = choice.get("table") if isinstance(choice, dict) else None
        if not isinstance(table, dict) or set(choice) != {"default", "table"} or choice["default"] not in table:
            raise RecipeError(f"{where}: choices.{name} must have a table of rows and a default that is one of them")
        for row, settings in table.items():
            if not isinstance(settings, dict):
                raise RecipeError(
                    f"{where}: row {row!r} of choices.{name} must be a mapping of dotted keys to values, such as "
                    f"{{adapter.r: 16}}; got {settings!r}"
                )
        rows = {str(row): {str(key): value for key, value in settings.items()} for row, settings in table.items()}
        found[str(name)] = Choice(str(choice["default"]), rows)
    return found


def pick(choices: dict[str, Choice], overrides: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The row of every choice, and the overrides that name none.

    An override `NAME=ROW` picks one; the default is the row of a choice that none names. A whole section under a
    choice's name, as in `task={family: glue}`, stays an override.

    Raises:
        RecipeError: A choice has no such row.
    """
    chosen = {name: choice.default for name, choice in choices.items()}
    rest = []
    for override in overrides:
        name, equals, row = override.partition("=")
        if name not in choices or not equals or row.lstrip().startswith("{"):
            rest.append(override)
            continue
        table = choices[name].table
        if row.strip() not in table:
            near = did_you_mean(row, table, prefix=f"{name}=", listing=False)
            raise RecipeError(f"{override!r} is no choice of this recipe: it has {name}={'|'.join(table)}{near}")
        chosen[name] = row.strip()
    return chosen, rest


def combinations(choices: dict[str, Choice]) -> list[list[str]]:
    """The overrides that pick every combination of rows; one empty list where nothing is to choose."""
    return [
        [f"{name}={row}" for name, row in zip(choices, rows)]
        for rows in itertools.product(*(choice.table for choice in choices.values()))
    ]
