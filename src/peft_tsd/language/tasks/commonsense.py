"""Commonsense reasoning: eight sets of questions with two to five options, written as "the correct answer is ...".

The form, and how an answer is read, are those of LLM-Adapters (see `instructions`). Its script searches four beams;
here one greedy text is written, which ends where the answer can no longer change. The converters give rows of the
hub's data sets the wording of LLM-Adapters' files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import RecipeError
from .generation import Reading
from .instructions import HubTask, Suite
from .sources import Example, Row

# What an answer may be, by kind of question; a question may offer fewer of them.
_WORDS = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)


def first_option(text: str, words: Sequence[str]) -> str:
    """The one of `words` that stands first in `text`, in part of a longer word too; "" where none does.

    >>> first_option("the correct answer is answer2, not answer1", ["answer1", "answer2"])
    'answer2'
    """
    found = re.search("|".join(map(re.escape, words)), text)
    return found[0] if found else ""


def _words(example: Example) -> tuple[str, ...]:
    for words in _WORDS:
        if example.answer in words:
            return words
    known = "; ".join("/".join(words) for words in _WORDS)
    raise RecipeError(f"task.family=commonsense knows no answer {example.answer!r}; known are {known}")


def _options(example: Example) -> list[tuple[str, str]]:
    """The answers a question offers, by its own "Answer format: a/b/c", as whole texts."""
    formats = re.findall(r"Answer format: *(\w+(?:/\w+)+)", example.prompt)
    options = formats[-1].split("/") if formats else _words(example)
    return [(f"the correct answer is {option}", option) for option in options]


READING = Reading(
    metric="accuracy",
    right=lambda example, text: first_option(text, _words(example)) == example.answer,
    # The first one counts, so nothing that follows it matters.
    complete=lambda example, text: first_option(text, _words(example)) != "",
    options=_options,
)


def _row(instruction: str, answer: str) -> Row:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _numbered(kind: str, texts: Sequence[str]) -> tuple[str, str]:
    """`Answer1: ... Answer2: ...` and `answer1/answer2`."""
    listed = " ".join(f"{kind.capitalize()}{i}: {text}" for i, text in enumerate(texts, 1))
    return listed, "/".join(f"{kind}{i}" for i in range(1, len(texts) + 1))


def _question(question: str, texts: Sequence[str], right: int) -> Row:
    """A question with numbered answers; `right` counts from 0."""
    listed, names = _numbered("answer", texts)
    text = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"
    return _row(text, f"answer{right + 1}")


def from_boolq(row: Row) -> Row:
    """google/boolq: `question` (without its mark), `answer` (a bool). The passage is not shown."""
    question = row["question"].rstrip("?")
    text = f"Please answer the following question with true or false, question: {question}?"
    return _row(f"{text}\n\nAnswer format: true/false", "true" if row["answer"] else "false")


def from_piqa(row: Row) -> Row:
    """ybisk/piqa: `goal`, `sol1`, `sol2`, `label` (from 0)."""
    text = f"Please choose the correct solution to the question: {row['goal']}\n\n"
    text += f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\nAnswer format: solution1/solution2"
    return _row(text, f"solution{int(row['label']) + 1}")


def from_siqa(row: Row) -> Row:
    """allenai/social_i_qa: `context`, `question`, `answerA` to `answerC`, `label` ("1" to "3")."""
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def from_hellaswag(row: Row) -> Row:
    """Rowan/hellaswag: `activity_label`, `ctx`, `endings`, `label` ("0" to "3")."""
    listed, names = _numbered("ending", row["endings"])
    text = "Please choose the correct ending to complete the given sentence: "
    text += f"{row['activity_label']}: {row['ctx']}\n\n{listed}\n\nAnswer format: {names}"
    return _row(text, f"ending{int(row['label']) + 1}")


def from_winogrande(row: Row) -> Row:
    """allenai/winogrande: `sentence` with a blank `_`, `option1`, `option2`, `answer` ("1" or "2")."""
    text = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    text += f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
    return _row(f"{text}Answer format: option1/option2", f"option{row['answer']}")


def from_arc(row: Row) -> Row:
    """allenai/ai2_arc: `question`, `choices` (`text`, `label`: A to E or 1 to 5), `answerKey`."""
    choices = row["choices"]
    return _question(row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def from_openbookqa(row: Row) -> Row:
    """allenai/openbookqa: as ARC, the question in `question_stem`. The fact behind it is not shown."""
    return from_arc({**row, "question": row["question_stem"]})


# `datasets` runs no loading scripts any more; here the hub keeps, as files, what a script built.
_CONVERTED = "refs/convert/parquet"

COMMONSENSE = Suite(
    name="commonsense",
    tasks={
        "boolq": HubTask("google/boolq", None, "validation", from_boolq),
        "piqa": HubTask("ybisk/piqa", None, "validation", from_piqa, _CONVERTED),
        "social_i_qa": HubTask("allenai/social_i_qa", None, "validation", from_siqa, _CONVERTED),
        "hellaswag": HubTask("Rowan/hellaswag", None, "validation", from_hellaswag),
        "winogrande": HubTask("allenai/winogrande", "winogrande_xl", "validation", from_winogrande),
        "ARC-Easy": HubTask("allenai/ai2_arc", "ARC-Easy", "test", from_arc),
        "ARC-Challenge": HubTask("allenai/ai2_arc", "ARC-Challenge", "test", from_arc),
        "openbookqa": HubTask("allenai/openbookqa", "main", "test", from_openbookqa),
    },
    reading=READING,
)
