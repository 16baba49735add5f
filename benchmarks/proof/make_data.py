"""The rows of the proof: three tasks of reasoning-gym that a small model can learn in a minute, with short rows.

    python benchmarks/proof/make_data.py
    python benchmarks/proof/make_data.py FOLDER/train.json    # of LLM-Adapters' math data, which are not committed

Writes `spell.json`, `words.json` and `family.json` and their `…-test.json` beside this file, the same ones each time
(reasoning-gym of constraints.txt); or `math.json` and `math-test.json`, of worked solutions that are short. No
question occurs twice, in training or between the two.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from reasoning_gym import create_dataset

HERE = Path(__file__).parent

TRAIN, TEST = 700, 100
"""Rows. A run of 60 steps of 8 sees 480, and 100 more are held out to choose its learning rate."""

SHORT = 320
"""Characters of a question and its worked solution, at most."""

Row = dict[str, str]


def spell(item: dict[str, Any]) -> Row:
    return {"question": f"Reverse: {item['metadata']['word']}", "answer": " ".join(item["answer"])}


def words(item: dict[str, Any]) -> Row:
    return {"question": f"{', '.join(item['metadata']['words'])} reversed:", "answer": item["answer"]}


def family(item: dict[str, Any]) -> Row:
    story = item["question"].split("\n\n")[0]
    one, other = item["metadata"]["person1"], item["metadata"]["person2"]
    return {"question": f"{story}\nHow is {one} related to {other}?", "answer": item["answer"]}


TASKS: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], Row]]] = {
    "spell": ("spell_backward", {"min_word_len": 3, "max_word_len": 7}, spell),
    "words": ("word_sequence_reversal", {"min_words": 3, "max_words": 4}, words),
    "family": ("family_relationships", {"min_family_size": 4, "max_family_size": 4}, family),
}


def rows(task: str) -> Iterator[Row]:
    """Different questions, in the generator's order."""
    generator, parameters, form = TASKS[task]
    seen: set[str] = set()
    for item in create_dataset(generator, size=4 * (TRAIN + TEST), seed=17, **parameters):
        row = form(item)
        if row["question"] not in seen:
            seen.add(row["question"])
            yield row


def solutions(path: Path) -> Iterator[Row]:
    """Different questions with a short worked solution, in a fixed random order: neighbours are variants of one."""
    given = json.loads(path.read_text(encoding="utf-8"))
    found = {row["instruction"].strip(): row["output"].strip() for row in given}
    short = [(q, a) for q, a in found.items() if a and len(q) + len(a) <= SHORT]
    random.Random(17).shuffle(short)
    return ({"question": question, "answer": answer} for question, answer in short)


def write(task: str, found: list[Row]) -> None:
    assert len(found) == TRAIN + TEST, f"{task}: {len(found)} different questions"
    for name, part in ((f"{task}-test", found[:TEST]), (task, found[TEST:])):
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in part)
        (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    if len(sys.argv) > 1:
        write("math", list(islice(solutions(Path(sys.argv[1])), TRAIN + TEST)))
        return
    for task in TASKS:
        write(task, list(rows(task))[: TRAIN + TEST])


if __name__ == "__main__":
    main()
