"""Data of a suite of tasks."""

import json
from pathlib import Path

from peft_tsd.language.tasks import commonsense
from support import text_models

PROMPT = "{instruction}\n"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def boolq(count: int, start: int = 0) -> list[dict]:
    found = []
    for i in range(start, start + count):
        row = {"question": f"{'oh ' * (i % 4)}is {text_models.WORDS[i % 10]} {i}", "answer": i % 3 > 0}
        found.append(commonsense.from_boolq(row))
    return found


def openbookqa(count: int, start: int = 0) -> list[dict]:
    choices = {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]}
    return [
        commonsense.from_openbookqa({"question_stem": f"what is {i}", "choices": choices, "answerKey": "ABCD"[i % 4]})
        for i in range(start, start + count)
    ]
