"""`peft-tsd recipes`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ..diffusion.recipe import load_recipe as load_dreambooth
from ..language.recipe import load_recipe
from ..recipes.choices import combinations
from ..recipes.reading import choices_of, describe, find_recipe, kind_of, shipped_recipes
from .screen import DONE, screen


def list_recipes(arguments: argparse.Namespace) -> int:
    width = max(map(len, shipped_recipes()))
    for name, path in shipped_recipes().items():
        print(f"{name:{width}}  {describe(str(path))}")
        for choice, (_, table) in choices_of(str(path)).items():
            print(f"{'':{width}}  {choice}={'|'.join(table)}")
    print("\npeft-tsd recipes show NAME prints one; peft-tsd train NAME runs it.")
    return DONE


def show_recipe(arguments: argparse.Namespace) -> int:
    if arguments.overrides:
        print(_load(arguments.name, arguments.overrides).to_yaml(), end="")
    else:
        print(find_recipe(arguments.name).read_text(encoding="utf-8"), end="")
    return DONE


def _load(reference: str, overrides: Sequence[str]) -> Any:
    """A recipe of whatever kind it is."""
    if kind_of(reference) == "dreambooth":
        return load_dreambooth(reference, overrides)
    return load_recipe(reference, overrides)


def check_recipes(arguments: argparse.Namespace) -> int:
    with screen():
        for name in arguments.names or shipped_recipes():
            # The other one needs diffusers.
            room = "language" if kind_of(name) is None else "diffusion"
            check: Any = import_module(f"peft_tsd.{room}.counting")
            lines = [name]
            for overrides in combinations(choices_of(name)):
                parts = check.check_recipe_model(_load(name, overrides))
                trained = " + ".join(f"{part} {count:,}" for part, count in parts.items())
                lines.append(f"  {' '.join(overrides):22} {sum(parts.values()):>12,} = {trained}")
            print("\n".join(lines))
    return DONE
