"""Math word problems with worked solutions: a model writes the steps, and the last number counts.

The form is that of LLM-Adapters (see `instructions`), and so is the reading of numbers: the last one in the text,
within 0.001 of the right one. AQuA's answers are letters. The converters give rows of the hub's data sets the wording
of LLM-Adapters' files; their solutions are those of the data sets' authors, where LLM-Adapters had a model write them.
"""

from __future__ import annotations

import re

from ...errors import RecipeError
from .generation import Reading
from .instructions import HubTask, Suite
from .sources import Example, Row

TOLERANCE = 1e-3
"""Two numbers this near are one, in the problem's own unit."""


def last_number(text: str) -> float | None:
    """The last number in `text`, without thousands' commas; None where there is none.

    >>> last_number("5 boxes at $1,250.50. The answer is $6,252.5.")
    6252.5
    """
    found = re.findall(r"-?\d+(?:\.\d+)?|-?\.\d+", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(found[-1]) if found else None


def chosen_letter(text: str) -> str | None:
    """The letter, A to E, after "answer is"; without these words the last one that stands alone.

    A letter with a colon after it opens a solution ("A: ...") or quotes an option, and is not taken.

    >>> chosen_letter("A: 3 apples and 4 pears are 7. The answer is (C).")
    'C'
    """
    said = re.findall(r"answer is:?\s*\(?([A-E])\b", text)
    alone = said or re.findall(r"(?<![\w'])([A-E])(?![\w':])", text)
    return alone[-1] if alone else None


def right(example: Example, text: str) -> bool:
    """Whether `text` ends in the example's number, or chooses its letter.

    Raises:
        RecipeError: The example's answer is neither a number nor a letter from A to E.
    """
    if re.fullmatch("[A-E]", example.answer):
        return chosen_letter(text) == example.answer
    written, expected = last_number(text), last_number(example.answer)
    if expected is None:
        raise RecipeError(f"task.family=math: the answer {example.answer!r} is neither a number nor a letter, A to E")
    return written is not None and abs(written - expected) <= TOLERANCE


def _row(instruction: str, answer: str, output: str = "") -> Row:
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def from_gsm8k(row: Row) -> Row:
    """openai/gsm8k: `question`, `answer` (steps with `<<calculator's notes>>`, then `#### 72`)."""
    steps, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError(f"no #### in {row['answer'][-40:]!r}")
    answer = answer.strip().replace(",", "")
    steps = re.sub(r"<<[^>]*>>", "", steps).strip()
    return _row(row["question"], answer, f"{steps}\nThe answer is {answer}.")


def from_aqua(row: Row) -> Row:
    """deepmind/aqua_rat: `question`, `options` (`A)21`), `rationale`, `correct` (`A`)."""
    listed = " ".join(f"({option[0]}) {option[2:].strip()}" for option in row["options"])
    solution = f"{row['rationale'].strip()}\nThe answer is ({row['correct']})."
    return _row(f"{row['question'].strip()} Answer Choices: {listed}", row["correct"], solution)


def from_svamp(row: Row) -> Row:
    """ChilleD/SVAMP: `Body`, `Question`, `Answer`. Of the solution there is the equation alone."""
    body = row["Body"].strip()
    return _row(f"{body if body.endswith('.') else body + '.'} {row['Question'].strip()}", str(row["Answer"]))


def from_multiarith(row: Row) -> Row:
    """ChilleD/MultiArith: `question`, `final_ans`."""
    return _row(row["question"].strip(), str(row["final_ans"]))


# Both parts, because LLM-Adapters scores on all there is.
_ALL = "train+test"

MATH = Suite(
    name="math",
    tasks={
        # The hub's copies of these two are parts of larger mixtures, reworded or filtered.
        "AddSub": None,
        "SingleEq": None,
        "MultiArith": HubTask("ChilleD/MultiArith", None, _ALL, from_multiarith, train_split=None),
        "SVAMP": HubTask("ChilleD/SVAMP", None, _ALL, from_svamp, train_split=None),
        "gsm8k": HubTask("openai/gsm8k", "main", "test", from_gsm8k),
        "AQuA": HubTask("deepmind/aqua_rat", "raw", "test", from_aqua),
    },
    # No text is complete before its end: another number may follow.
    reading=Reading("accuracy", right),
)
