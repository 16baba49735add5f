"""GLUE: eight tasks of language understanding, one or two sentences to a label or a grade.

Wang et al., "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding" (arXiv
1804.07461). Tasks are trained one at a time and scored on the development set, whose answers are public: read from
GLUE's own files (`CoLA/train.tsv`, `MNLI/dev_matched.tsv`) or from nyu-mll/glue on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import RecipeError, did_you_mean
from ..sections import Data, Task
from .classification import logits, padded
from .cut import Cut
from .material import Material, apart
from .metrics import METRICS
from .scored import Scored
from .sources import Row, read_hub, read_table


class Sentences(NamedTuple):
    """One example."""

    first: str
    second: str | None
    """None in the tasks on single sentences."""
    answer: str
    """A label, or a grade in digits."""


class GlueTask(NamedTuple):
    """What one of GLUE's tasks is, and where it lies."""

    folder: str
    columns: tuple[str, ...]
    """Of the sentences in GLUE's files."""
    label_column: str
    hub_columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    """As GLUE's files write them, in the order of the hub's numbers; None for a grade."""
    metrics: tuple[str, ...]
    """What GLUE reports, the first being the one this package compares by."""
    tests: tuple[tuple[str, str, str], ...]
    """Name in the results, file, and split on the hub."""
    header: tuple[str, ...] | None = None
    """The columns of a file that does not name them."""


def _dev(name: str) -> tuple[tuple[str, str, str], ...]:
    return ((name, "dev.tsv", "validation"),)


_TWO = ("sentence1", "sentence2")

_ENTAILMENT = ("entailment", "not_entailment")

GLUE = {
    "cola": GlueTask(
        folder="CoLA",
        columns=("sentence",),
        label_column="label",
        hub_columns=("sentence",),
        labels=("0", "1"),
        metrics=("matthews",),
        tests=_dev("cola"),
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", ("sentence",), ("0", "1"), ("accuracy",), _dev("sst2")),
    "mrpc": GlueTask(
        "MRPC", ("#1 String", "#2 String"), "Quality", _TWO, ("0", "1"), ("accuracy", "f1"), _dev("mrpc")
    ),
    "qqp": GlueTask(
        folder="QQP",
        columns=("question1", "question2"),
        label_column="is_duplicate",
        hub_columns=("question1", "question2"),
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
        tests=_dev("qqp"),
    ),
    "stsb": GlueTask("STS-B", _TWO, "score", _TWO, None, ("pearson", "spearman"), _dev("stsb")),
    "mnli": GlueTask(
        folder="MNLI",
        columns=_TWO,
        label_column="gold_label",
        hub_columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        tests=(
            ("mnli-matched", "dev_matched.tsv", "validation_matched"),
            ("mnli-mismatched", "dev_mismatched.tsv", "validation_mismatched"),
        ),
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT, ("accuracy",), _dev("qnli")
    ),
    "rte": GlueTask("RTE", _TWO, "label", _TWO, _ENTAILMENT, ("accuracy",), _dev("rte")),
}

MOST_INCOMPLETE = 0.01
"""Share of a file's rows that may lack a cell: GLUE's own files have a few, and more means another kind of file."""


def glue_task(data: Data) -> GlueTask:
    """The task a recipe names.

    Raises:
        RecipeError: GLUE has none of that name.
    """
    [name] = data.tasks or [""]
    if name not in GLUE:
        raise RecipeError(f"data.tasks=[{name}]: GLUE has no such task{did_you_mean(name, GLUE)}")
    return GLUE[name]


def load_glue(data: Data, *, to_train: bool = True) -> Material:
    """Training rows (the first `train_size`, none without `to_train`) and development rows of the task a recipe names.

    Raises:
        RecipeError: A file is missing, or is not the task's.
    """
    task = glue_task(data)
    missing: list[str] = []
    notes: list[str] = []
    if data.folder is None:
        given = "nyu-mll/glue"
        [name] = data.tasks or [""]
        train = _from_hub(task, name, "train") if to_train else []
        tests = {part: _from_hub(task, name, split) for part, _, split in task.tests}
    else:
        given = f"data.folder={data.folder!r}"
        folder = _folder(Path(data.folder), task, "train.tsv" if to_train else task.tests[0][1])
        train = _from_file(task, folder / "train.tsv", notes) if to_train else []
        files = {part: folder / file for part, file, _ in task.tests}
        missing = [part for part, path in files.items() if not path.is_file()]
        if len(missing) == len(files):
            raise RecipeError(f"data.folder={data.folder!r}: there is no {files[missing[0]]} to score on")
        tests = {part: _from_file(task, path, notes) for part, path in files.items() if part not in missing}
    material = apart(train, tests, missing, data.test_size, given)
    return material._replace(train=material.train[: data.train_size], notes=[*notes, *material.notes])


class Glue(Scored):
    """The sentences are read by a model with a classification head, or one output for a grade."""

    peft_task_type = "SEQ_CLS"
    loses = "the end of their longer sentence"
    """What a row too long loses."""

    def __init__(self, task: Task, glue: GlueTask) -> None:
        self._task = task
        self._glue = glue
        self.metric = glue.metrics[0]
        for metric in glue.metrics:
            METRICS[metric].check_installed()

    @property
    def auto_class(self) -> Any:
        return AutoModelForSequenceClassification

    @property
    def config_fields(self) -> dict[str, Any]:
        labels = self._glue.labels
        if labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }

    def encode(
        self,
        examples: Sequence[Sentences],
        tokenizer: PreTrainedTokenizerBase,
        *,
        leave_out: bool = False,
        cut: Cut | None = None,
    ) -> list[dict[str, Any]]:
        """Rows of token ids and `labels`, a label's number or a grade, which every example has; `cut` counts what is
        lost."""
        encoded = self._encoded(examples, tokenizer)
        if cut is not None:

            def whole(places: list[int]) -> list[list[int]]:
                chosen = [examples[i] for i in places]
                uncut: list[list[int]] = self._encoded(chosen, tokenizer, truncation=False, verbose=False)["input_ids"]
                return uncut

            cut.rows(encoded["input_ids"], self._task.max_length, whole)
        return [
            {**{key: encoded[key][i] for key in encoded}, "labels": self._number(example)}
            for i, example in enumerate(examples)
        ]

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, base_model: PreTrainedModel
    ) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        """Rows to a batch, padded on the tokenizer's side."""
        return padded(tokenizer)

    def answers(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Sentences],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[int] | list[float]:
        """The label, or the grade, that the model gives each of `examples`."""
        outputs = logits(model, tokenizer, self._encoded(examples, tokenizer), batch_size, on_batch)
        guesses: list[int] | list[float]
        guesses = (outputs[:, 0] if self._glue.labels is None else outputs.argmax(-1)).tolist()
        return guesses

    def metrics(self, examples: Sequence[Sentences], answers: Sequence[float]) -> dict[str, float]:
        """Every metric of the task."""
        right = [self._number(example) for example in examples]
        return {metric: METRICS[metric].measure(right, answers) for metric in self._glue.metrics}

    def _encoded(
        self,
        examples: Sequence[Sentences],
        tokenizer: PreTrainedTokenizerBase,
        truncation: bool = True,
        verbose: bool = True,
    ) -> Any:
        first, second, _ = zip(*examples)
        # A pair too long loses the end of its longer sentence.
        return tokenizer(
            list(first),
            list(second) if second[0] is not None else None,
            truncation=truncation,
            max_length=self._task.max_length if truncation else None,
            verbose=verbose,
        )

    def _number(self, example: Sentences) -> int | float:
        labels = self._glue.labels
        return float(example.answer) if labels is None else labels.index(example.answer)


def _folder(root: Path, task: GlueTask, needed: str) -> Path:
    for folder in (root / task.folder, root):
        if (folder / needed).is_file():
            return folder
    siblings = [p.name for p in root.iterdir()] if root.is_dir() else []
    hint = did_you_mean(task.folder, siblings, listing=False) if root.is_dir() else "; there is no such folder"
    raise RecipeError(f"data.folder={str(root)!r} has no {task.folder}/{needed}{hint}")


def _from_file(task: GlueTask, path: Path, notes: list[str]) -> list[Sentences]:
    rows = read_table(path, task.header)
    if not rows:
        raise RecipeError(f"data: {str(path)!r} has no rows; remove the file, or fill it")
    needed = (*task.columns, task.label_column)
    for column in needed:
        if column not in rows[0]:
            known = [str(name) for name in rows[0] if name is not None]
            raise RecipeError(f"data: {str(path)!r} has no column {column!r}{did_you_mean(column, known)}")
    whole = [row for row in rows if all(row[column] for column in needed)]
    if len(rows) - len(whole) > MOST_INCOMPLETE * len(rows):
        raise RecipeError(
            f"data: {len(rows) - len(whole)} of {len(rows)} rows of {str(path)!r} lack one of {', '.join(needed)}; "
            f"give {task.folder} as GLUE distributes it"
        )
    if len(whole) < len(rows):
        notes.append(f"left out {len(rows) - len(whole)} incomplete rows of {path}")
    return [_checked(task, _sentences(row, task.columns, row[task.label_column]), str(path)) for row in whole]


def _from_hub(task: GlueTask, name: str, split: str) -> list[Sentences]:
    found = []
    for row in read_hub("nyu-mll/glue", name, split):
        label = row["label"]
        answer = str(label) if task.labels is None else task.labels[label]
        found.append(_sentences(row, task.hub_columns, answer))
    return found


def _sentences(row: Row, columns: Sequence[str], answer: str) -> Sentences:
    return Sentences(row[columns[0]], row[columns[1]] if len(columns) > 1 else None, answer)


def _checked(task: GlueTask, example: Sentences, where: str) -> Sentences:
    try:
        right = float(example.answer) >= 0 if task.labels is None else example.answer in task.labels
    except ValueError:
        right = False
    if not right:
        wanted = "a grade" if task.labels is None else f"one of {', '.join(task.labels)}"
        raise RecipeError(f"data: {where!r} has the label {example.answer!r}, which is not {wanted}")
    return example
