"""Math problems: which number or letter a solution gives."""

import json

import pytest

from peft_tsd.errors import RecipeError
from peft_tsd.language.sections import Data
from peft_tsd.language.tasks import instructions
from peft_tsd.language.tasks.instructions import load_suite
from peft_tsd.language.tasks.math_problems import MATH, chosen_letter, last_number
from peft_tsd.tasks import Example
from support.places import DATA


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


def test_an_answer_that_nothing_could_match_is_refused(tmp_path):
    rows = [{"instruction": "How many?", "input": "", "output": "Some.", "answer": "some"}]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.json").write_text(json.dumps(rows))
    (tmp_path / "train.json").write_text(json.dumps([{**rows[0], "instruction": "Why?"}]))
    with pytest.raises(RecipeError, match="the answer 'some' is neither a number nor a letter, A to E"):
        load_suite(MATH, Data(folder=str(tmp_path)), "{instruction}", 0)


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


# From the hub's rows

ROWS = {
    "gsm8k": {
        "question": "A pen costs $600. What do two cost?",
        "answer": "Two pens cost 2*600=$<<2*600=1200>>1200.\nThat is all.\n#### 1,200",
    },
    "AQuA": {
        "question": "What is 3 + 4? ",
        "options": ["A)6", "B) 7", "C)8", "D)9", "E)None of these"],
        "rationale": "3 + 4 = 7.\nAnswer: B",
        "correct": "B",
    },
    "SVAMP": {
        "ID": "chal-1",
        "Body": "Ann has 8 pens and gives 3 away",
        "Question": "How many are left?",
        "Equation": "( 8.0 - 3.0 )",
        "Answer": "5.0",
        "Type": "Subtraction",
    },
    "MultiArith": {"question": " Ann buys 2 packs of 6 pens. How many pens are these?\n", "final_ans": "12"},
}

EXPECTED = {
    "gsm8k": (
        "A pen costs $600. What do two cost?",
        "Two pens cost 2*600=$1200.\nThat is all.\nThe answer is 1200.",
        "1200",
    ),
    "AQuA": (
        "What is 3 + 4? Answer Choices: (A) 6 (B) 7 (C) 8 (D) 9 (E) None of these",
        "3 + 4 = 7.\nAnswer: B\nThe answer is (B).",
        "B",
    ),
    "SVAMP": ("Ann has 8 pens and gives 3 away. How many are left?", "", "5.0"),
    "MultiArith": ("Ann buys 2 packs of 6 pens. How many pens are these?", "", "12"),
}


@pytest.mark.parametrize("task", ROWS)
def test_converters(task):
    place = MATH.tasks[task]
    row = place.convert(ROWS[task])
    instruction, output, answer = EXPECTED[task]
    assert row == {"instruction": instruction, "input": "", "output": output, "answer": answer}
    # What can be trained on is what a right answer looks like.
    assert (place.train_split is not None) is bool(output)
    if output:
        assert MATH.reading.right(Example("", answer), output)


def test_from_the_hub(monkeypatch):
    asked = []

    def read(name, subset, split, revision):
        asked.append((name, subset, split))
        [task] = [task for task, place in MATH.tasks.items() if place and place.name == name]
        first = next(iter(ROWS[task]))
        if split == "train":
            return [{**ROWS[task], "question": "Another?"}, ROWS[task]]
        return [ROWS[task], {**ROWS[task], first: "One more"}]

    monkeypatch.setattr(instructions, "read_hub", read)
    material = load_suite(MATH, Data(), "{instruction}", 0)
    assert asked == [
        ("ChilleD/MultiArith", None, "train+test"),
        ("ChilleD/SVAMP", None, "train+test"),
        ("openai/gsm8k", "main", "test"),
        ("deepmind/aqua_rat", "raw", "test"),
        ("openai/gsm8k", "main", "train"),
        ("deepmind/aqua_rat", "raw", "train"),
    ]
    assert {task: len(rows) for task, rows in material.tests.items()} == dict.fromkeys(
        ["MultiArith", "SVAMP", "gsm8k", "AQuA"], 2
    )
    assert material.left_out == ["AddSub", "SingleEq"]
    assert {example.answer.splitlines()[-1] for example in material.train} == {
        "The answer is 1200.",
        "The answer is (B).",
    }
    assert any("test rows ask the same" in note for note in material.notes)


def test_what_the_hub_has_not_is_refused(monkeypatch):
    monkeypatch.setattr(instructions, "read_hub", lambda name, *where: [{**row} for row in [ROWS["gsm8k"]]])
    with pytest.raises(
        RecipeError, match="no faithful copy of AddSub; give data.folder, or other tasks of MultiArith"
    ):
        load_suite(MATH, Data(tasks=["AddSub"]), "{instruction}", 0)
    with pytest.raises(RecipeError, match="'SVAMP' has no rows to train on.*tasks of gsm8k, AQuA"):
        load_suite(MATH, Data(tasks=["gsm8k"], train_tasks=["SVAMP"]), "{instruction}", 0)
    monkeypatch.setattr(instructions, "read_hub", lambda *where: [{"question": "?", "answer": "4"}])
    with pytest.raises(RecipeError, match="'openai/gsm8k' has not the columns it used to have .ValueError: no ####"):
        load_suite(MATH, Data(tasks=["gsm8k"]), "{instruction}", 0)


def test_published_files():
    """Most of LLM-Adapters' own test solutions, which a language model wrote, come to the right number."""
    folder = DATA / "math"
    if not folder.is_dir():
        pytest.skip("no local copy of LLM-Adapters' data sets")
    for task in load_suite(MATH, Data(folder=str(folder)), "{instruction}", 0).tests:
        rows = json.loads((folder / task / "test.json").read_text())
        right = sum(MATH.reading.right(Example("", row["answer"]), row["output"]) for row in rows)
        assert right / len(rows) > 0.8
