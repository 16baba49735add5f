"""Math word problems with worked solutions: a model writes the steps, and the last number counts.

The form is that of LLM-Adapters (see `instructions`), and so is the reading of numbers: the last one in the text,
within 0.001 of the right one. AQuA's answers are letters.
"""

from __future__ import annotations

import re

from .generation import Reading
from .instructions import Suite
from .sources import Example

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
    """Whether `text` ends in the example's number, or chooses its letter."""
    if re.fullmatch("[A-E]", example.answer):
        return chosen_letter(text) == example.answer
    written, expected = last_number(text), last_number(example.answer)
    return written is not None and expected is not None and abs(written - expected) <= TOLERANCE


MATH = Suite(
    name="math",
    tasks=dict.fromkeys(["AddSub", "SingleEq", "MultiArith", "SVAMP", "gsm8k", "AQuA"]),
    # No text is complete before its end: another number may follow.
    reading=Reading("accuracy", right),
)
