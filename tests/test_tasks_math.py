"""Math problems: which number or letter a solution gives."""

import json
from pathlib import Path

import pytest

from peft_tsd.recipe import Data, RecipeError
from peft_tsd.tasks import Example
from peft_tsd.tasks.instructions import load_suite
from peft_tsd.tasks.math_problems import MATH, chosen_letter, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 7 - 3 = 4. The answer is 4.", 4.0),
        ("The answer is 9.8.", 9.8),
        ("It costs $1,250.", 1250.0),
        ("1,2", 2.0),
        ("6,252.5 litres", 6252.5),
        ("The answer is -3", -3.0),
        ("1/2 is .5", 0.5),
        ("80%", 80.0),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number_counts(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A: 3 and 4 are 7. The answer is (C).", "C"),
        ("The answer is B", "B"),
        ("the answer is: D.", "D"),
        ("A: so it is E", "E"),
        ("(A) or (B)", "B"),
        ("A: Apples", None),
        ("CD", None),
        ("", None),
    ],
)
def test_the_letter_chosen(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("15.0", "The answer is 15.", True),
        ("0.3333", "0.333", True),
        ("0.33", "0.3333", False),
        ("1000", "1,000", True),
        ("4", "none", False),
        ("C", "The answer is (C).", True),
        ("C", "The answer is 3.", False),
    ],
)
def test_right(answer, text, right):
    assert MATH.reading.right(Example("", answer), text) is right


def test_a_mixture_is_trained_on_and_tasks_are_scored(tmp_path):
    row = {"instruction": "1 + 1?", "input": "", "output": "\nA: 1 + 1 = 2. The answer is 2.", "answer": "2"}
    (tmp_path / "SVAMP").mkdir()
    (tmp_path / "SVAMP" / "test.json").write_text(json.dumps([{**row, "instruction": "2 + 2?", "answer": "4"}]))
    with pytest.raises(RecipeError, match="has no AddSub/train.json to train on, nor any other of AddSub, SingleEq"):
        load_suite(MATH, Data(folder=str(tmp_path)), "{instruction}", 0)
    (tmp_path / "train.json").write_text(json.dumps([row]))
    material = load_suite(MATH, Data(folder=str(tmp_path)), "Q: {instruction}\n", 0)
    assert material.train == [Example("Q: 1 + 1?\n", "A: 1 + 1 = 2. The answer is 2.")]
    assert material.tests == {"SVAMP": [Example("Q: 2 + 2?\n", "4")]}
    assert material.left_out == ["AddSub", "SingleEq", "MultiArith", "gsm8k", "AQuA"]


def test_published_files():
    """Most of LLM-Adapters' own test solutions, which a language model wrote, come to the right number."""
    folder = Path(__file__).parents[1] / "../shared/data/math"
    if not folder.is_dir():
        pytest.skip("no local copy of LLM-Adapters' data sets")
    for task in load_suite(MATH, Data(folder=str(folder)), "{instruction}", 0).tests:
        rows = json.loads((folder / task / "test.json").read_text())
        right = sum(MATH.reading.right(Example("", row["answer"]), row["output"]) for row in rows)
        assert right / len(rows) > 0.8
