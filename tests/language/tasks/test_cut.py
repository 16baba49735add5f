"""What rows lose to `task.max_length`, said before training."""

import json
import re

import pytest

from peft_tsd.cli.main import main
from peft_tsd.language.preparing import prepare
from peft_tsd.language.recipe import load_recipe
from peft_tsd.language.sections import Task
from peft_tsd.language.tasks.cut import Cut
from peft_tsd.language.tasks.glue import GLUE, Glue, Sentences
from peft_tsd.tasks import Classification, Example, Generation
from support import text_models

LONG = "what is this long question here, of many more words than the others have? "


@pytest.fixture
def tokenizer():
    return text_models.tokenizer()


def length(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_to_write_after(tokenizer, chat):
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    task = Generation(Task(family="generate", max_length=24, chat=chat))
    examples = [Example("one?", "two"), Example(LONG, "three"), Example(2 * LONG, "four")]
    cut = Cut()
    rows = task.encode(examples, tokenizer, cut=cut)
    expected = []
    for example in examples:
        prompt = f"<{example.prompt}>" if chat else example.prompt
        answer = example.answer if chat or prompt.endswith(" ") else f" {example.answer}"
        expected.append(length(tokenizer, prompt) + length(tokenizer, answer) + 1 - 24)
    assert cut.lost == [lost for lost in expected if lost > 0]
    assert len(cut.lost) == 2
    assert [len(row["prompt"]) + len(row["answer"]) for row in rows[1:]] == [24, 24]


def test_answers_that_do_not_fit_are_counted_where_they_are_left_out(tokenizer):
    task = Generation(Task(family="generate", max_length=8))
    cut = Cut()
    rows = task.encode([Example("q", LONG), Example("q", "one")], tokenizer, leave_out=True, cut=cut)
    assert len(rows) == 1
    assert (cut.lost, cut.left_out) == ([], 1)
    assert cut.notes(8, 2, "rows to score on", task.loses) == [
        "1 of 2 rows to score on have an answer that task.max_length=8 does not hold, and are left out of the "
        "held-out loss"
    ]


def test_texts_to_classify(tokenizer):
    examples = [Example(text, label) for text, label in ((LONG, "a"), ("short", "b"), (3 * LONG, "a"))]
    task = Classification(Task(family="classify", max_length=16), examples)
    cut = Cut()
    rows = task.encode(examples, tokenizer, cut=cut)
    assert cut.lost == [length(tokenizer, LONG) - 16, length(tokenizer, 3 * LONG) - 16]
    assert [len(row["input_ids"]) for row in rows] == [16, length(tokenizer, "short"), 16]


def test_a_row_that_just_fits_loses_nothing(tokenizer):
    most = length(tokenizer, LONG)
    task = Classification(Task(family="classify", max_length=most), [Example(LONG, "a"), Example("x", "b")])
    cut = Cut()
    task.encode([Example(LONG, "a")], tokenizer, cut=cut)
    assert cut.lost == []
    assert cut.notes(most, 1, "training rows", task.loses) == []


@pytest.mark.parametrize(
    ("name", "examples"),
    [
        ("sst2", [Sentences(LONG, None, "1"), Sentences("good", None, "0")]),
        ("rte", [Sentences(LONG, "short", "entailment"), Sentences("a", "b", "not_entailment")]),
    ],
)
def test_sentences_of_glue(tokenizer, name, examples):
    task = Glue(Task(family="glue", max_length=16), GLUE[name])
    cut = Cut()
    rows = task.encode(examples, tokenizer, cut=cut)
    both = sum(length(tokenizer, text) for text in examples[0][:2] if text is not None)
    assert cut.lost == [both - 16]
    assert len(rows[0]["input_ids"]) == 16


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_models.llama_folder(tmp_path / "model")
    rows = text_models.rows(20)
    rows[3]["question"] = 3 * LONG
    text_models.jsonl(tmp_path / "data.jsonl", rows)
    return tmp_path


def test_train_says_it_once_and_before_the_first_step(place, capsys):
    recipe = text_models.write_recipe(place, task={"max_length": 40}, data={"test_size": 4})
    assert main(["train", str(recipe), "evaluation.before=false"]) == 0
    said = re.findall(
        r"\d+ of \d+ training rows are longer than task.max_length=40 and lose .*", capsys.readouterr().err
    )
    [line] = said
    assert re.fullmatch(r"1 of 16 .* lose the beginning of their prompt; answers stay whole: \d+ tokens .*", line)
    log = (place / "run" / "train.log").read_text()
    assert log.count("task.max_length") == 1
    assert log.index("task.max_length") < log.index("step 1:")


def test_rows_to_score_on_are_told_apart(place):
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    text_models.jsonl(
        place / "test.jsonl", [{**rows[0], "question": LONG}, {"question": "and this?", "answer": 3 * LONG}]
    )
    data = {"test_name": str(place / "test.jsonl"), "test_size": None}
    recipe = load_recipe(str(text_models.write_recipe(place, task={"max_length": 30}, data=data)))
    notes = prepare(recipe).material.notes
    assert [re.sub(r":.*", "", note) for note in notes] == [
        "1 of 20 training rows are longer than task.max_length=30 and lose the beginning of their prompt; answers "
        "stay whole",
        "1 of 2 rows to score on are longer than task.max_length=30 and lose the beginning of their prompt; answers "
        "stay whole",
        "1 of 2 rows to score on have an answer that task.max_length=30 does not hold, and are left out of the "
        "held-out loss",
    ]
    assert prepare(load_recipe(str(text_models.write_recipe(place, data=data)))).material.notes == []
