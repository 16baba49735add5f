"""What is said to a user whose input cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Found = TypeVar("Found")


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given, and what to do.

    Args:
        complaints: That line; or several, where several things are wrong.
    """

    def __init__(self, *complaints: str) -> None:
        super().__init__(*(_printable(complaint, 2000) for complaint in complaints))

    def __str__(self) -> str:
        return "\n".join(self.args)


class RecipeError(InputError):
    """A recipe cannot be read, or not be carried out."""


class AdapterError(InputError):
    """An adapter's files are missing, damaged, unsafe, or for another base."""


class TransitionError(ValueError):
    """The transition cannot be made; nothing but the step count was changed."""


def in_layer(name: str, work: Callable[[str], Found], adapter: str) -> Found:
    """What `work` on the adapter of layer `name` gives.

    Raises:
        TransitionError: In place of its ValueError, with the layer's name.
    """
    try:
        return work(adapter)
    except ValueError as error:
        raise TransitionError(
            f"Cannot identify directions in layer {name!r}: {error} Nothing was changed; the adapter is still in "
            "pre-launch, and can be saved or trained on."
        ) from error


def did_you_mean(given: str, known: Iterable[str], *, prefix: str = "", listing: bool = True) -> str:
    """The end of an error message: the nearest of `known`, or (with `listing`) all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix + near[0]!r}?"
    return f"; known: {', '.join(names)}" if listing and names else ""


def one_line(error: BaseException) -> str:
    """The message of an error from elsewhere, on one line and not too long."""
    return _printable(" ".join(str(error).split()) or type(error).__name__, 400)


def _printable(text: str, most: int) -> str:
    # What a file holds must not break the line, or give commands to a terminal.
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of `choices`.

    Raises:
        InputError: With the nearest.
    """
    if value not in choices:
        raise InputError(f"{key}={value!r} is not known{did_you_mean(value, choices)}")
