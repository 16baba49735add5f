"""Values of options, read from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..recipes.reading import parse_yaml

T = TypeVar("T", int, float)


def numbers(option: str, given: str | None) -> list[int] | None:
    return _listed(int, option, given, "whole numbers with commas between, such as 4,8")


def rates(option: str, given: str | None) -> list[float] | None:
    return _listed(float, option, given, "numbers with commas between, such as 1e-4,1e-3")


def _listed(kind: type[T], option: str, given: str | None, meant: str) -> list[T] | None:
    if given is None:
        return None
    try:
        return [kind(number) for number in given.split(",")]
    except ValueError:
        raise InputError(f"{option}={given!r} must be {meant}") from None


def values_of(option: str, given: str) -> tuple[str, list[Any]]:
    key, equals, values = given.partition("=")
    if not equals or not key or not values:
        raise InputError(f"{option} {given!r} must be a key and its values, such as {option} lr=1e-4,1e-3")
    return key, [parse_yaml(value, f"{option} {given!r}") for value in values.split(",")]


def adapter_folder(given: str) -> Path:
    """The folder of an adapter; a run folder stands for its own."""
    folder = Path(given).expanduser()
    return folder / "adapter" if (folder / "adapter").is_dir() else folder
