"""Data sets in the form of LLM-Adapters: rows of an instruction, an input, an output and an answer.

    {"instruction": "...", "input": "", "output": "the correct answer is answer2", "answer": "answer2"}

A model is trained to write `output`, and scored on whether what it writes gives `answer`. In a folder they are
`TASK/train.json` and `TASK/test.json`, and `train.json` beside the tasks where a mixture was prepared. The form, the
folders' names and the prompt (`recipe.INSTRUCTION`) are those of Hu et al., "LLM-Adapters" (arXiv 2304.01933), whose
commonsense and math data the literature on adapters compares on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...errors import RecipeError, did_you_mean
from ..sections import Data
from .generation import Reading
from .material import Material, apart, hold_out
from .sources import Example, Row, fill_prompt, read_hub, read_rows


class HubTask(NamedTuple):
    """Where a task lies on the hub, and how its rows get the form above."""

    name: str
    subset: str | None
    test_split: str
    """The split LLM-Adapters scores on: where a test split has no public answers, the validation split."""
    convert: Callable[[Row], Row]
    revision: str | None = None
    train_split: str | None = "train"
    """None where the rows have no output to learn."""


class Suite(NamedTuple):
    """Tasks of one kind that are trained on together."""

    name: str
    tasks: dict[str, HubTask | None]
    """By their folders' names, in the order of the literature's tables; None where the hub has no faithful copy."""
    reading: Reading


def load_suite(suite: Suite, data: Data, prompt: str, seed: int, *, to_train: bool = True) -> Material:
    """Read a suite's rows from `data.folder` or the hub.

    Args:
        suite: What there is.
        data: What the recipe says.
        prompt: Template of the prompt; `{instruction}` stands for the row's instruction, with its input if it has one.
        seed: Shuffles the training rows, so that `data.train_size` of them are of every task.
        to_train: Whether training rows are read.

    Raises:
        RecipeError: The folder or every task's file in it is missing, or a row cannot be read.
    """
    for key in ("tasks", "train_tasks"):
        for task in getattr(data, key) or ():
            if task not in suite.tasks:
                raise RecipeError(
                    f"data.{key} names {task!r}, no task of {suite.name}{did_you_mean(task, suite.tasks)}"
                )
    missing: list[str] = []
    notes: list[str] = []
    if data.folder is None:
        given = f"task.family={suite.name}"
        asked, missing = _tests_on_hub(suite, data.tasks)
        rows = _train_on_hub(suite, data.train_tasks) if to_train else []
    else:
        given = f"data.folder={data.folder!r}"
        asked, missing = _tests_in(Path(data.folder), suite, data.tasks, notes)
        rows = _train_in(Path(data.folder), suite, data.train_tasks, notes) if to_train else []
    learned = [_example(row, prompt, "output") for row in rows]
    row_of = dict(zip(learned, rows))
    material = apart(
        learned,
        {task: [_example(row, prompt, "answer") for row in tests] for task, tests in asked.items()},
        missing,
        data.test_size,
        given,
    )
    random.Random(seed).shuffle(material.train)
    material = material._replace(train=material.train[: data.train_size], notes=[*notes, *material.notes])
    material = hold_out(material, data.validation_size, seed)
    # Scored as test rows are: by their answer, not by the text that is learned.
    validation = [_example(row_of[example], prompt, "answer") for example in material.validation]
    for example in (*validation, *(example for examples in material.tests.values() for example in examples)):
        suite.reading.right(example, "")  # an answer that nothing could match is refused now, not after training
    return material._replace(validation=validation)


def _tests_in(
    folder: Path, suite: Suite, chosen: list[str] | None, notes: list[str]
) -> tuple[dict[str, list[Row]], list[str]]:
    """Test rows by task, and the tasks that have none."""
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, siblings, listing=False)
        raise RecipeError(f"data.folder={str(folder)!r} is no folder{hint}")
    files = {task: folder / task / "test.json" for task in chosen or suite.tasks}
    missing = [task for task, path in files.items() if not path.is_file()]
    if len(missing) == len(files):
        raise RecipeError(
            f"data.folder={str(folder)!r} has no TASK/test.json for any TASK of {', '.join(files)}; "
            f"give the folder that holds {suite.name}'s data sets in the form of LLM-Adapters"
        )
    return {task: _read(path, "answer", notes) for task, path in files.items() if task not in missing}, missing


def _train_in(folder: Path, suite: Suite, chosen: list[str] | None, notes: list[str]) -> list[Row]:
    """The prepared mixture, or the training rows of the tasks that have some."""
    mixture = folder / "train.json"
    if chosen is None and mixture.is_file():
        return _read(mixture, "output", notes)
    files = {task: folder / task / "train.json" for task in chosen or suite.tasks}
    missing = [task for task, path in files.items() if not path.is_file()]
    if len(missing) == len(files) or (chosen and missing):
        raise RecipeError(
            f"data.folder={str(folder)!r} has no {missing[0]}/train.json to train on"
            + (f", nor any other of {', '.join(files)}" if len(files) > 1 and len(missing) == len(files) else "")
            + "; name tasks that have one in data.train_tasks, or add it"
        )
    if missing:
        notes.append(f"no data to train on: {', '.join(missing)}")
    return [row for task, path in files.items() if task not in missing for row in _read(path, "output", notes)]


def _read(path: Path, needed: str, notes: list[str]) -> list[Row]:
    rows = read_rows(str(path))
    if not rows:
        raise RecipeError(f"data: {str(path)!r} has no rows; remove the file, or fill it")
    for number, row in enumerate(rows, 1):
        for column in ("instruction", needed):
            if not isinstance(row.get(column), str):
                was = f"is {row[column]!r}, not a text" if column in row else "is missing" + did_you_mean(column, row)
                raise RecipeError(f"data: {column!r} of row {number} of {str(path)!r} {was}")
    # LLM-Adapters' math mixture has some that nothing can be learned from.
    whole = [row for row in rows if row["instruction"].strip() and row[needed].strip()]
    if len(whole) < len(rows):
        notes.append(f"left out {len(rows) - len(whole)} of {len(rows)} rows of {path}: they are empty")
    if not whole:
        raise RecipeError(f"data: every row of {str(path)!r} has an empty 'instruction' or {needed!r}")
    return whole


def _tests_on_hub(suite: Suite, chosen: list[str] | None) -> tuple[dict[str, list[Row]], list[str]]:
    """Test rows by task, and the tasks that have none."""
    places = {task: suite.tasks[task] for task in chosen or suite.tasks}
    found = {task: _from_hub(task, place, place.test_split) for task, place in places.items() if place is not None}
    missing = [task for task in places if task not in found]
    if not found:
        raise RecipeError(
            f"data.tasks: the hub has no faithful copy of {', '.join(missing)}; give data.folder, or other tasks of "
            f"{', '.join(task for task, place in suite.tasks.items() if place)}"
        )
    return found, missing


def _train_on_hub(suite: Suite, chosen: list[str] | None) -> list[Row]:
    """The training rows of the tasks that have some."""
    places = {task: place for task, place in suite.tasks.items() if place and place.train_split}
    for task in chosen or ():
        if task not in places:
            raise RecipeError(
                f"data.train_tasks: {task!r} has no rows to train on on the hub; give data.folder, or tasks of "
                f"{', '.join(places)}"
            )
    return [row for task in chosen or places for row in _from_hub(task, places[task], str(places[task].train_split))]


def _from_hub(task: str, place: HubTask, split: str) -> list[Row]:
    try:
        return [place.convert(row) for row in read_hub(place.name, place.subset, split, place.revision)]
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"a row of the dataset {place.name!r} has not the columns it used to have "
            f"({type(error).__name__}: {error}); give data.folder, or data.tasks and data.train_tasks without {task!r}"
        ) from None


def _example(row: Row, prompt: str, answer: str) -> Example:
    instruction = row["instruction"]
    if not isinstance(row.get(answer), str):
        raise RecipeError(f"data: the row {instruction[:60]!r} has no {answer!r}, which rows to score on need")
    if row.get("input"):
        instruction += f"\n\n### Input:\n{row['input']}"
    return Example(fill_prompt(prompt, {**row, "instruction": instruction}), row[answer].strip())
