"""Rows held out of training to choose settings by."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_tsd.errors import RecipeError
from peft_tsd.language.sections import Data
from peft_tsd.language.tasks.commonsense import COMMONSENSE, READING
from peft_tsd.language.tasks.instructions import load_suite
from peft_tsd.language.tasks.material import Material, hold_out
from peft_tsd.tasks import Example
from support.suites import PROMPT, boolq, write_rows


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 20), st.integers(0, 5))
def test_what_is_held_out_is_not_trained_on_in_any_copy(questions, size, seed):
    train = [Example(f"q{number}", f"a{copy}") for copy, number in enumerate(questions)]
    material = Material(train, {"test": []}, [], [], [])
    try:
        held = hold_out(material, size, seed)
    except RecipeError:
        # Only where every row asks what a held one asks.
        assert len(set(questions)) <= min(size, len(train))
        return
    assert len(held.validation) == min(size, len(train))
    asked = {example.prompt for example in held.validation}
    assert held.train == [example for example in train if example.prompt not in asked]
    assert hold_out(material, size, seed) == held
    assert held.tests == material.tests


def test_none_is_held_out_unasked():
    material = Material([Example("q", "a")], {}, [], [], [])
    assert hold_out(material, None, 0) is material
    with pytest.raises(RecipeError, match="data.validation_size=1 of 1 training rows leaves none to train on"):
        hold_out(material, 1, 0)


def test_rows_of_a_suite_are_scored_by_their_answer(tmp_path):
    write_rows(tmp_path / "boolq" / "train.json", boolq(20))
    write_rows(tmp_path / "boolq" / "test.json", boolq(4, start=20))
    material = load_suite(COMMONSENSE, Data(folder=str(tmp_path), validation_size=6), PROMPT, 0)
    assert (len(material.train), len(material.validation)) == (14, 6)
    assert {example.answer for example in material.validation} <= {"true", "false"}
    assert all(example.answer.startswith("the correct answer is ") for example in material.train)
    for example in material.validation:
        assert READING.right(example, f"the correct answer is {example.answer}")
    assert not {e.prompt for e in material.validation} & {e.prompt for e in material.train}
