"""What a task family is given: rows to train on, and rows to score on by task."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from ...errors import RecipeError


class Material(NamedTuple):
    """Examples, as the family's own tuples."""

    train: list[Any]
    tests: dict[str, list[Any]]
    """By task, in the suite's order; a recipe's own data are the one task `test`."""
    left_out: list[str]
    """Tasks asked for that have no data."""
    notes: list[str]
    """What the run's log should say about the data."""
    validation: list[Any]
    """Held out of the training rows."""

    @property
    def questions(self) -> int:
        return sum(map(len, self.tests.values()))


def apart(
    train: list[Any], tests: dict[str, list[Any]], left_out: list[str], test_size: int | None, given: str
) -> Material:
    """`train` without what the tests ask, and the first `test_size` examples of each test.

    Args:
        train: Tuples whose last field is the answer; the others are what is asked. None where nothing will be trained.
        tests: The same.
        left_out: Tasks asked for that have no data.
        test_size: Most examples of a test; all without it.
        given: The source, for error messages.

    Raises:
        RecipeError: Nothing is left to train on.
    """
    asked = {example[:-1] for examples in tests.values() for example in examples}
    unseen = [example for example in train if example[:-1] not in asked]
    if train and not unseen:
        raise RecipeError(f"{given} has {len(train)} rows to train on, of which none is not also a test row")
    notes = []
    if left_out:
        notes.append(f"no data to score on, left out: {', '.join(left_out)}")
    if len(unseen) < len(train):
        notes.append(f"left out {len(train) - len(unseen)} of {len(train)} training rows: test rows ask the same")
    return Material(unseen, {task: examples[:test_size] for task, examples in tests.items()}, left_out, notes, [])


def hold_out(material: Material, size: int | None, seed: int) -> Material:
    """`material` with `size` of the training rows set aside as its `validation`, and none of what they ask trained on.

    Raises:
        RecipeError: Nothing would be left to train on.
    """
    if size is None or not material.train:
        return material
    held = random.Random(seed).sample(material.train, min(size, len(material.train)))
    asked = {example[:-1] for example in held}
    train = [example for example in material.train if example[:-1] not in asked]
    if not train:
        raise RecipeError(
            f"data.validation_size={size} of {len(material.train)} training rows leaves none to train on; lower it"
        )
    return material._replace(train=train, validation=held)
