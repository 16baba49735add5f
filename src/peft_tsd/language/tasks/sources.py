"""Where examples come from: local files, hub datasets, and reasoning-gym's generators."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import RecipeError, did_you_mean
from ..sections import Data

Row = dict[str, Any]

T = TypeVar("T")


class Example(NamedTuple):
    """One question, as it is put before a model, and its right answer."""

    prompt: str
    answer: str


def load_examples(data: Data, prompt: str, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and test examples. No test prompt occurs in training, nor twice.

    Args:
        data: What the recipe says.
        prompt: Template of the prompt; `{column}` stands for a column.
        seed: Chooses generated or held-out rows.

    Raises:
        RecipeError: A file, dataset, generator or column is not there, or a row cannot be read.
    """
    if data.generator is not None:
        return _generated(data, prompt, seed)
    rows, test_rows = stored(data, seed)
    train = [_example(row, prompt, data.answer) for row in rows]
    fresh = unseen((_example(row, prompt, data.answer) for row in test_rows), train, _prompt_of)
    test = list(islice(fresh, data.test_size))
    if not train or not test:
        raise RecipeError(
            f"data.name={data.name!r} gives {len(train)} rows to train on and {len(test)} to score on, not counting "
            "those trained on; both need one at least"
        )
    return train, test


def _generated(data: Data, prompt: str, seed: int) -> tuple[list[Example], list[Example]]:
    assert data.generator is not None
    assert data.train_size is not None
    assert data.test_size is not None
    # A generator's item i depends on seed + i, so neighbouring seeds would share items; these lie far apart.
    train_seed, test_seed = (random.Random(f"{seed} {part}").getrandbits(31) for part in ("train", "test"))
    train_rows = _generator(data, train_seed, data.train_size)
    train = [_example(row, prompt, data.answer) for row in train_rows]
    tries = 20 * data.test_size
    rows = _generator(data, test_seed, tries)
    fresh = unseen((_example(row, prompt, data.answer) for row in rows), train, _prompt_of)
    test = list(islice(fresh, data.test_size))
    if len(test) < data.test_size:
        raise RecipeError(
            f"data.generator={data.generator!r} gave {len(test)} of data.test_size={data.test_size} unseen questions "
            f"in {tries} tries; lower data.test_size or data.train_size, or widen data.parameters"
        )
    return train, test


def _generator(data: Data, seed: int, size: int) -> Iterator[Row]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"data.generator={data.generator!r} needs the package {error.name}: pip install 'peft-tsd[train]'"
        ) from None
    if data.generator not in DATASETS:
        raise RecipeError(
            f"data.generator={data.generator!r} is no reasoning-gym task{did_you_mean(str(data.generator), DATASETS)}"
        )
    known = {field.name for field in fields(DATASETS[data.generator][1])} - {"seed", "size"}
    for key in data.parameters:
        if key not in known:
            hint = did_you_mean(key, known, prefix="data.parameters.")
            raise RecipeError(f"unknown parameter 'data.parameters.{key}' of {data.generator}{hint}")
    try:
        yield from reasoning_gym.create_dataset(data.generator, seed=seed, size=size, **data.parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"data.parameters={data.parameters!r}: {data.generator} refuses them: {error}") from None


def unseen(examples: Iterable[T], trained: Iterable[T], asked: Callable[[T], Hashable]) -> Iterator[T]:
    """Those examples that ask what none of the `trained` ones asks, nor one before them."""
    seen = set(map(asked, trained))
    for example in examples:
        if asked(example) not in seen:
            seen.add(asked(example))
            yield example


def _prompt_of(example: Example) -> str:
    return example.prompt


def fill_prompt(prompt: str, row: Row) -> str:
    """`prompt` with every `{column}` replaced by the row's.

    Raises:
        RecipeError: The row has no such column.
    """
    return re.sub(r"\{(\w+)\}", lambda match: _column(row, match[1]), prompt)


def _column(row: Row, name: str) -> str:
    if name not in row:
        raise RecipeError(f"the data has no column {name!r}{did_you_mean(name, map(str, row))}")
    return str(row[name])


def _example(row: Row, prompt: str, answer: str) -> Example:
    text = fill_prompt(prompt, row)
    expected = _column(row, answer).strip()
    if row[answer] is None or not expected:
        raise RecipeError(
            f"column {answer!r} holds {row[answer]!r} for {text[:60]!r}...; every row needs one right answer"
        )
    return Example(text, expected)


def stored(data: Data, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows of a file or hub dataset, at most `train_size` of the former."""
    assert data.name is not None
    rows = read_rows(data.name, data.subset, data.split)
    if data.test_name is not None:
        test_rows = read_rows(data.test_name, None, "train")
    elif data.test_split is not None:
        test_rows = read_rows(data.name, data.subset, data.test_split)
    else:
        random.Random(seed).shuffle(rows)
        test_rows, rows = rows[: data.test_size], rows[data.test_size :]
    return rows[: data.train_size], test_rows


def read_rows(name: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """The rows of a local file (by its ending), or of a split of a hub dataset.

    Raises:
        RecipeError: It is not there, or cannot be read.
    """
    path = Path(name).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if path.is_file() and reader is None:
        raise RecipeError(f"data: cannot read {name!r}; known kinds are {', '.join(_READERS)}")
    if reader is None:
        return read_hub(name, subset, split)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"data: no file {name!r}{did_you_mean(path.name, siblings, listing=False)}")
    try:
        rows = list(reader(path))
    except (ValueError, OSError, csv.Error) as error:
        raise RecipeError(f"data: cannot read {name!r}: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise RecipeError(f"data: row {number} of {name!r} is a {type(row).__name__}, not a mapping of columns")
    return rows


def _read_json(path: Path) -> Iterable[Row]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list):
        raise ValueError(f"a list of rows is expected; got {type(content).__name__}; for a row a line use .jsonl")
    return content


def _read_jsonl(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _read_csv(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _read_tsv(path: Path, header: Sequence[str] | None = None) -> Iterable[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        # Quotes are part of the text.
        yield from csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_table(path: Path, header: Sequence[str] | None = None) -> list[Row]:
    """The rows of a .tsv file; `header` has the columns where its first line does not.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        return list(_read_tsv(path, header))
    except (ValueError, OSError, csv.Error) as error:
        raise RecipeError(f"data: cannot read {str(path)!r}: {' '.join(str(error).split())}") from None


def _read_parquet(path: Path) -> Iterable[Row]:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise ValueError("it needs the package pyarrow: pip install 'peft-tsd[train]'") from None
    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def read_hub(name: str, subset: str | None, split: str, revision: str | None = None) -> list[Row]:
    """The rows of a split of a hub dataset.

    Raises:
        RecipeError: It cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise RecipeError(f"data.name={name!r} needs the package datasets: pip install 'peft-tsd[train]'") from None
    try:
        return list(load_dataset(name, subset, split=split, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"cannot load the dataset {name!r}: {' '.join(str(error).split())[:400]}") from None
