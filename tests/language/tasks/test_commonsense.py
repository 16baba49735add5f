"""Commonsense questions: how answers are read, how hub rows become rows of LLM-Adapters' form, and a whole run."""

import json

import pytest

from peft_tsd.errors import RecipeError
from peft_tsd.language import preparing, training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.language.sections import Data
from peft_tsd.language.tasks import instructions
from peft_tsd.language.tasks.commonsense import COMMONSENSE, READING, first_option
from peft_tsd.language.tasks.instructions import load_suite
from peft_tsd.tasks import Example
from support import text_models
from support.places import DATA
from support.suites import PROMPT, boolq, openbookqa, write_rows

# How an answer is read


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("answer2", "the correct answer is answer2", True),
        ("answer2", " answer2", True),
        ("answer2", "answer1 or answer2", False),
        ("answer2", "the correct answer is 2", False),
        ("answer5", "the correct answer is answer5", True),
        ("true", "the correct answer is true", True),
        ("true", "untrue", True),  # a part of a word counts, as in the published script
        ("true", "True", False),
        ("false", "the correct answer is false, not true", True),
        ("solution1", "solution1", True),
        ("solution1", "answer1", False),
        ("ending4", "the correct answer is ending4.", True),
        ("option1", "the correct answer is option2", False),
        ("option1", "", False),
    ],
)
def test_the_first_option_written_counts(answer, text, right):
    assert READING.right(Example("", answer), text) is right


def test_an_answer_is_complete_with_its_first_option():
    example = Example("", "answer2")
    assert not READING.complete(example, "the correct answer is answer")
    assert READING.complete(example, "the correct answer is answer1")
    assert first_option("answer1answer2", ["answer2", "answer1"]) == "answer1"


def test_an_unknown_kind_of_answer_is_refused():
    with pytest.raises(RecipeError, match="knows no answer 'yes'; known are true/false"):
        READING.right(Example("", "yes"), "yes")


def test_a_question_says_which_options_it_has():
    prompt = "Answer format: answer1/answer2/answer3\n\n### Response:\n"
    assert [option for _, option in READING.options(Example(prompt, "answer3"))] == ["answer1", "answer2", "answer3"]
    assert [text for text, _ in READING.options(Example("is it?", "true"))] == [
        "the correct answer is true",
        "the correct answer is false",
    ]


# From the hub's rows


@pytest.mark.parametrize(
    ("task", "row", "instruction", "answer"),
    [
        (
            "boolq",
            {"question": "is ice cold", "answer": True, "passage": "Ice is water."},
            "Please answer the following question with true or false, question: is ice cold?\n\n"
            "Answer format: true/false",
            "true",
        ),
        (
            "piqa",
            {"goal": "Cool a drink", "sol1": "Heat it.", "sol2": "Add ice.", "label": 1},
            "Please choose the correct solution to the question: Cool a drink\n\nSolution1: Heat it.\n\n"
            "Solution2: Add ice.\n\nAnswer format: solution1/solution2",
            "solution2",
        ),
        (
            "social_i_qa",
            {"context": "Ann ran.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"},
            "Please choose the correct answer to the question: Ann ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer3",
        ),
        (
            "hellaswag",
            {"activity_label": "Rowing", "ctx": "A man", "endings": ["rows.", "eats.", "is", "the"], "label": "0"},
            "Please choose the correct ending to complete the given sentence: Rowing: A man\n\n"
            "Ending1: rows. Ending2: eats. Ending3: is Ending4: the\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "ending1",
        ),
        (
            "winogrande",
            {"sentence": "Ann beat Bea as _ was fast.", "option1": "Ann", "option2": "Bea", "answer": "1"},
            "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Ann beat Bea as _ was fast.\n\nOption1: Ann Option2: Bea Answer format: option1/option2",
            "option1",
        ),
        (
            "ARC-Challenge",
            {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
            "Please choose the correct answer to the question: What is hot?\n\nAnswer1: ice Answer2: fire\n\n"
            "Answer format: answer1/answer2",
            "answer2",
        ),
        (
            "openbookqa",
            {
                "question_stem": "The sun",
                "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
                "answerKey": "D",
            },
            "Please choose the correct answer to the question: The sun\n\nAnswer1: w Answer2: x Answer3: y Answer4: z"
            "\n\nAnswer format: answer1/answer2/answer3/answer4",
            "answer4",
        ),
    ],
)
def test_converters(task, row, instruction, answer):
    assert COMMONSENSE.tasks[task].convert(row) == {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def test_from_the_hub(monkeypatch):
    """Which dataset, subset, split and revision are asked for, and what becomes of the rows."""
    asked = []

    def read(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        rows = {"train": "wood", "test": "iron"}
        choices = {"text": ["no", "yes"], "label": ["A", "B"]}
        return [{"question": f"Is {rows[split]} hard?", "choices": choices, "answerKey": "B"}]

    monkeypatch.setattr(instructions, "read_hub", read)
    chosen = Data(tasks=["ARC-Easy"], train_tasks=["ARC-Easy", "ARC-Challenge"])
    material = load_suite(COMMONSENSE, chosen, PROMPT, 0)
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "test", None),
        ("allenai/ai2_arc", "ARC-Easy", "train", None),
        ("allenai/ai2_arc", "ARC-Challenge", "train", None),
    ]
    assert len(material.train) == 2
    assert material.train[0].answer == "the correct answer is answer2"
    assert material.tests["ARC-Easy"][0].answer == "answer2"
    monkeypatch.setattr(instructions, "read_hub", lambda *where: [{"question": "?"}])
    with pytest.raises(RecipeError, match="'allenai/ai2_arc' has not the columns it used to have.*KeyError"):
        load_suite(COMMONSENSE, chosen, PROMPT, 0)


# From a folder


@pytest.fixture
def folder(tmp_path):
    """Two tasks with training rows, and one with test rows alone."""
    for task, rows in (("boolq", boolq), ("openbookqa", openbookqa)):
        write_rows(tmp_path / "sets" / task / "train.json", rows(12))
        write_rows(tmp_path / "sets" / task / "test.json", rows(5, start=12))
    write_rows(tmp_path / "sets" / "ARC-Easy" / "test.json", openbookqa(3, start=40))
    return tmp_path / "sets"


def test_a_folder_is_read_by_task(folder):
    material = load_suite(COMMONSENSE, Data(folder=str(folder)), PROMPT, 0)
    assert {task: len(examples) for task, examples in material.tests.items()} == {
        "boolq": 5,
        "ARC-Easy": 3,
        "openbookqa": 5,
    }
    assert material.left_out == ["piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge"]
    assert len(material.train) == 24
    # A part of the training rows is of every task, the same at each seed.
    some = load_suite(COMMONSENSE, Data(folder=str(folder), train_size=12, test_size=2), PROMPT, 0)
    assert some.train == material.train[:12]
    assert {"true" in example.prompt for example in some.train} == {True, False}
    assert load_suite(COMMONSENSE, Data(folder=str(folder)), PROMPT, 1).train != material.train
    assert some.tests["boolq"] == material.tests["boolq"][:2]


def test_tasks_to_train_and_to_score_are_chosen(folder):
    data = Data(folder=str(folder), tasks=["ARC-Easy", "piqa"], train_tasks=["boolq"])
    material = load_suite(COMMONSENSE, data, PROMPT, 0)
    assert list(material.tests) == ["ARC-Easy"]
    assert material.left_out == ["piqa"]
    assert sorted(e.prompt for e in material.train) == sorted(row["instruction"] + "\n" for row in boolq(12))


def test_a_ready_mixture_goes_first(folder):
    write_rows(folder / "train.json", boolq(7, start=100))
    assert len(load_suite(COMMONSENSE, Data(folder=str(folder)), PROMPT, 0).train) == 7
    assert len(load_suite(COMMONSENSE, Data(folder=str(folder), train_tasks=["boolq"]), PROMPT, 0).train) == 12


def test_what_is_asked_in_a_test_is_not_trained_on(folder):
    write_rows(folder / "boolq" / "train.json", boolq(12) + boolq(2, start=12))
    material = load_suite(COMMONSENSE, Data(folder=str(folder), train_tasks=["boolq"], test_size=1), PROMPT, 0)
    asked = {row["instruction"] + "\n" for row in boolq(5, start=12)}
    assert len(material.train) == 12
    assert not asked & {example.prompt for example in material.train}


def test_validation_rows_need_an_answer(folder):
    for task in ("boolq", "openbookqa"):
        path = folder / task / "train.json"
        write_rows(
            path, [{key: row[key] for key in ("instruction", "output")} for row in json.loads(path.read_text())]
        )
    assert len(load_suite(COMMONSENSE, Data(folder=str(folder)), PROMPT, 0).train) == 24
    with pytest.raises(RecipeError, match="the row 'Please .*has no 'answer', which rows to score on need"):
        load_suite(COMMONSENSE, Data(folder=str(folder), validation_size=2), PROMPT, 0)


def test_an_input_is_part_of_the_instruction(folder):
    write_rows(folder / "boolq" / "test.json", [{**boolq(1)[0], "input": "Ice floats."}])
    [example] = load_suite(COMMONSENSE, Data(folder=str(folder), tasks=["boolq"]), PROMPT, 0).tests["boolq"]
    assert example.prompt.endswith("Answer format: true/false\n\n### Input:\nIce floats.\n")


def test_folders_refused(folder):
    def refusal(**fields) -> str:
        with pytest.raises(RecipeError) as caught:
            load_suite(COMMONSENSE, Data(**{"folder": str(folder), **fields}), PROMPT, 0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no folder; did you mean 'sets'" in refusal(folder=str(folder.parent / "set"))
    assert "is no folder" in refusal(folder=str(folder / "boolq" / "test.json"))
    assert "has no TASK/test.json for any TASK of boolq, piqa" in refusal(folder=str(folder.parent))
    assert "has no TASK/test.json for any TASK of piqa" in refusal(tasks=["piqa"])
    assert "data.tasks names 'bolq', no task of commonsense; did you mean 'boolq'" in refusal(tasks=["bolq"])
    assert "data.train_tasks names 'arc'" in refusal(train_tasks=["arc"])
    assert "has no ARC-Easy/train.json to train on" in refusal(train_tasks=["ARC-Easy"])
    write_rows(folder / "openbookqa" / "test.json", [{"instruction": "?", "anser": "answer1"}])
    assert "'answer' of row 1 of" in refusal()
    assert "is missing; did you mean 'anser'" in refusal()
    write_rows(folder / "openbookqa" / "test.json", [{"instruction": "?", "answer": None}])
    assert "is None, not a text" in refusal()
    write_rows(folder / "openbookqa" / "test.json", [])
    assert "has no rows" in refusal()
    write_rows(folder / "openbookqa" / "test.json", [{"instruction": "?", "answer": "maybe"}])
    assert "knows no answer 'maybe'" in refusal()
    (folder / "openbookqa" / "test.json").write_text("{")
    assert "cannot read" in refusal()


@pytest.mark.parametrize("task", ["ARC-Easy", "boolq", "openbookqa", "piqa", "social_i_qa", "winogrande"])
def test_published_files(task):
    """What LLM-Adapters' own files would have a model write is read as their answer."""
    path = DATA / "commonsense" / task / "test.json"
    if not path.is_file():
        pytest.skip("no local copy of LLM-Adapters' data sets")
    data = Data(folder=str(path.parents[1]), tasks=[task], train_tasks=["boolq"], train_size=1)
    for row, example in zip(json.loads(path.read_text()), load_suite(COMMONSENSE, data, PROMPT, 0).tests[task]):
        assert READING.right(example, row["output"])
        assert example.answer in [option for _, option in READING.options(example)]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "sets' is no folder"),
        (lambda folder: write_rows(folder / "boolq" / "test.json", [{"instruction": "?"}]), "'answer' of row 1 of"),
        (lambda folder: write_rows(folder / "boolq" / "test.json", []), "has no rows"),
        (lambda folder: write_rows(folder / "boolq" / "test.json", [{"instruction": "?", "answer": "no"}]), "'no'"),
    ],
)
def test_nothing_is_loaded_or_written_before_the_data_are_read(folder, tmp_path, monkeypatch, break_it, message):
    text_models.llama_folder(tmp_path / "model")
    recipe = text_models.write_recipe(
        tmp_path,
        data={"name": None, "test_size": None, "folder": str(folder)},
        task={"family": "commonsense", "prompt": PROMPT},
    )
    recipe = load_recipe(str(recipe))
    break_it(folder)
    monkeypatch.setattr(preparing, "load_model", None)
    with pytest.raises(RecipeError, match=message) as caught:
        training.train(recipe)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# A run


@pytest.mark.parametrize("scoring", ["generation", "likelihood"])
def test_a_run(folder, tmp_path, scoring):
    text_models.llama_folder(tmp_path / "model")
    recipe = text_models.write_recipe(
        tmp_path,
        data={"name": None, "test_size": 4, "folder": str(folder)},
        task={"family": "commonsense", "prompt": PROMPT, "max_new_tokens": 12, "scoring": scoring},
    )
    result = training.train(load_recipe(str(recipe)))
    score = result.metrics["score"]
    assert score["metric"] == "accuracy"
    assert score["questions"] == 4 + 3 + 4
    assert list(score["tasks"]) == ["boolq", "ARC-Easy", "openbookqa"]
    assert score["left_out"] == ["piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge"]
    for when in ("before", "after"):
        by_task = [score["tasks"][task][when]["accuracy"] for task in score["tasks"]]
        assert score[when] == pytest.approx(sum(by_task) / 3)
    log = result.folder.log.read_text()
    assert "left out: piqa, social_i_qa" in log
    assert "boolq after training: accuracy" in log
    assert load_recipe(str(result.folder.recipe)) == load_recipe(str(recipe))

    again = evaluate(str(result.folder.path))
    assert again["score"] == score["after"]
    assert again["tasks"]["boolq"] == score["tasks"]["boolq"]["after"]
    assert again["left_out"] == score["left_out"]
    # Scoring needs no training rows.
    for path in folder.glob("*/train.json"):
        path.unlink()
    assert evaluate(str(result.folder.path))["tasks"] == again["tasks"]


def test_a_tiny_model_learns_the_form(folder, tmp_path):
    """From never a right answer to some: the prompt trained on is the prompt scored."""
    text_models.llama_folder(tmp_path / "model")
    recipe = text_models.write_recipe(
        tmp_path,
        method="lora",
        data={"name": None, "test_size": None, "folder": str(folder), "tasks": ["boolq"], "train_tasks": ["boolq"]},
        task={"family": "commonsense", "prompt": "{instruction}\n", "max_new_tokens": 32},
        adapter={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        training={"steps": 80, "batch_size": 12, "save_every": 100},
    )
    score = training.train(load_recipe(str(recipe))).metrics["score"]
    assert score["before"] == 0.0
    assert score["after"] > 0.0
