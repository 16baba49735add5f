"""Values of options, read from text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..recipes.reading import parse_yaml


def numbers(option: str, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise InputError(f"{option}={given!r} must be whole numbers with commas between, such as 4,8") from None


def rates(option: str, given: str | None) -> list[float] | None:
    if given is None:
        return None
    try:
        return [float(number) for number in given.split(",")]
    except ValueError:
        raise InputError(f"{option}={given!r} must be numbers with commas between, such as 1e-4,1e-3") from None


def values_of(option: str, given: str) -> tuple[str, list[Any]]:
    key, equals, values = given.partition("=")
    if not equals or not key or not values:
        raise InputError(f"{option} {given!r} must be a key and its values, such as {option} lr=1e-4,1e-3")
    return key, [parse_yaml(value, f"{option} {given!r}") for value in values.split(",")]


def adapter_folder(given: str) -> Path:
    """The folder of an adapter; a run folder stands for its own."""
    folder = Path(given).expanduser()
    return folder / "adapter" if (folder / "adapter").is_dir() else folder
