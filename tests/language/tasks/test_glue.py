"""GLUE: files in their official layout, metrics against slow references, and whole runs."""

import json
import math
import sys
from pathlib import Path

import pytest

from peft_tsd.errors import RecipeError
from peft_tsd.language import training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.language.sections import Data
from peft_tsd.language.tasks import glue
from peft_tsd.language.tasks.glue import GLUE, Sentences, load_glue
from peft_tsd.language.tasks.metrics import METRICS
from support import text_models
from support.places import DATA

pytest.importorskip("sklearn")

# The first lines of GLUE's files as they are distributed, with sentences of our own.
FILES = {
    "CoLA": {"": "gj04\t{label}\t{star}\tThe {n} \"dogs sleep.\n"},
    "SST-2": {"": "{n} fine films\t{label}\n", "header": "sentence\tlabel\n"},
    "MRPC": {
        "": "{label}\t1\t2\tIt cost {n}.\tThe price was {n}.\n",
        "header": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    },
    "QQP": {
        "": "{n}\t1\t2\tIs it {n}?\tHow many, {n}?\t{label}\n",
        "header": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
    },
    "STS-B": {
        "": "{n}\tnews\tfile\t2012\t1\tnone\tnone\tA {n} falls.\tThe {n} is falling.\t{grade}\n",
        "header": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
    },
    "MNLI": {
        "": "{n}\t1\t1\tfiction\tp\tp\tp\tp\tAll {n} left.\tSome {n} left.\tneutral\t{three}\n",
        "header": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n",
    },
    "QNLI": {"": "{n}\tWho has {n}?\tAnn has {n}.\t{two}\n", "header": "index\tquestion\tsentence\tlabel\n"},
    "RTE": {
        "": "{n}\tAnn has {n} dogs.\tThere are dogs: {n}.\t{two}\n",
        "header": "index\tsentence1\tsentence2\tlabel\n",
    },
}  # fmt: skip


def write_glue(root: Path, name: str, train: int = 24, dev: int = 8) -> Path:
    lines = FILES[name]

    def write(path: Path, numbers: range) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            lines[""].format(
                n=n,
                label=n % 2,
                star="" if n % 2 else "*",
                grade=f"{n % 6 * 0.9:.3f}",
                two=["entailment", "not_entailment"][n % 2],
                three=["entailment", "neutral", "contradiction"][n % 3],
            )
            for n in numbers
        ]
        path.write_text(lines.get("header", "") + "".join(rows), encoding="utf-8")

    write(root / name / "train.tsv", range(train))
    names = ["dev_matched.tsv", "dev_mismatched.tsv"] if name == "MNLI" else ["dev.tsv"]
    for i, file in enumerate(names):
        write(root / name / file, range(1000 * (i + 1), 1000 * (i + 1) + dev))
    return root


EXPECTED = {
    "cola": Sentences('The 1000 "dogs sleep.', None, "0"),
    "sst2": Sentences("1000 fine films", None, "0"),
    "mrpc": Sentences("It cost 1000.", "The price was 1000.", "0"),
    "qqp": Sentences("Is it 1000?", "How many, 1000?", "0"),
    "stsb": Sentences("A 1000 falls.", "The 1000 is falling.", "3.600"),
    "mnli-matched": Sentences("All 1000 left.", "Some 1000 left.", "neutral"),
    "qnli": Sentences("Who has 1000?", "Ann has 1000.", "entailment"),
    "rte": Sentences("Ann has 1000 dogs.", "There are dogs: 1000.", "entailment"),
}


@pytest.mark.parametrize("name", GLUE)
def test_every_task_reads_the_official_files(tmp_path, name):
    task = GLUE[name]
    write_glue(tmp_path, task.folder)
    material = load_glue(Data(folder=str(tmp_path), tasks=[name]))
    assert list(material.tests) == [part for part, _, _ in task.tests]
    part = task.tests[0][0]
    assert material.tests[part][0] == EXPECTED[part]
    assert len(material.train) == 24
    # The task's own folder will do too.
    inner = load_glue(Data(folder=str(tmp_path / task.folder), tasks=[name], train_size=3, test_size=2))
    assert inner.train == material.train[:3]
    assert inner.tests[part] == material.tests[part][:2]


def test_from_the_hub(monkeypatch):
    asked = []

    def read(*where):
        asked.append(where)
        n = len(asked)
        return [{"premise": f"p{n}", "hypothesis": "h", "label": 2, "idx": 0}]

    monkeypatch.setattr(glue, "read_hub", read)
    material = load_glue(Data(tasks=["mnli"]))
    assert [split for _, _, split in asked] == ["train", "validation_matched", "validation_mismatched"]
    assert {where[:2] for where in asked} == {("nyu-mll/glue", "mnli")}
    assert material.tests["mnli-mismatched"] == [Sentences("p3", "h", "contradiction")]
    monkeypatch.setattr(glue, "read_hub", lambda *w: [{"sentence1": w[2], "sentence2": "b", "label": 2.5}])
    assert load_glue(Data(tasks=["stsb"])).tests["stsb"] == [Sentences("validation", "b", "2.5")]


def test_files_refused(tmp_path):
    def refusal(**fields) -> str:
        with pytest.raises(RecipeError) as caught:
            load_glue(Data(**{"folder": str(tmp_path), "tasks": ["rte"], **fields}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no RTE/train.tsv" in refusal()
    assert "there is no such folder" in refusal(folder=str(tmp_path / "nowhere"))
    assert "GLUE has no such task; did you mean 'rte'" in refusal(tasks=["rt"])
    write_glue(tmp_path, "RTE")
    dev = tmp_path / "RTE" / "dev.tsv"
    text = dev.read_text()
    dev.write_text(text.replace("sentence2", "sentence_2", 1))
    assert "no column 'sentence2'; did you mean" in refusal()
    dev.write_text(text.replace("not_entailment", "contradicts"))
    assert "the label 'contradicts', which is not one of entailment, not_entailment" in refusal()
    dev.write_text(text + "8\tonly one\n")
    assert "1 of 9 rows of" in refusal()
    dev.write_text(text.partition("\n")[0] + "\n")
    assert "has no rows" in refusal()
    dev.unlink()
    assert "to score on" in refusal()
    write_glue(tmp_path, "STS-B")
    dev = tmp_path / "STS-B" / "dev.tsv"
    dev.write_text(dev.read_text().replace("3.600", "much"))
    assert "the label 'much', which is not a grade" in refusal(tasks=["stsb"])


def test_a_few_incomplete_rows_are_left_out(tmp_path):
    """As GLUE's own QQP has."""
    write_glue(tmp_path, "QQP", train=200)
    train = tmp_path / "QQP" / "train.tsv"
    train.write_text(train.read_text() + "7\t1\t2\tIs it?\n")
    assert len(load_glue(Data(folder=str(tmp_path), tasks=["qqp"])).train) == 200


@pytest.mark.parametrize(("name", "train", "dev"), [("cola", 7250, 1043), ("rte", 2127, 277), ("sst2", 60614, 6735)])
def test_published_files(name, train, dev):
    folder = DATA / "glue"
    if not folder.is_dir():
        pytest.skip("no local copy of GLUE")
    material = load_glue(Data(folder=str(folder), tasks=[name]))
    assert len(material.tests[name]) == pytest.approx(dev, abs=1)
    # What the development set asks too is left out.
    assert train - 80 <= len(material.train) <= train


# Metrics


def slow(right, guesses) -> dict[str, float]:
    """From the definitions, in Python."""
    n = len(right)
    true_pos = sum(r == g == 1 for r, g in zip(right, guesses))
    true_neg = sum(r == g == 0 for r, g in zip(right, guesses))
    false_pos = sum(r == 0 and g == 1 for r, g in zip(right, guesses))
    false_neg = n - true_pos - true_neg - false_pos
    under = (true_pos + false_pos) * (true_pos + false_neg) * (true_neg + false_pos) * (true_neg + false_neg)
    return {
        "accuracy": (true_pos + true_neg) / n,
        "f1": 2 * true_pos / (2 * true_pos + false_pos + false_neg),
        "matthews": (true_pos * true_neg - false_pos * false_neg) / math.sqrt(under),
    }


def test_metrics_of_labels():
    right = [0, 1, 1, 0, 1, 1, 1, 0, 0, 1]
    guesses = [0, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    for name, value in slow(right, guesses).items():
        assert METRICS[name].measure(right, guesses) == pytest.approx(value), name


def pearson(x, y) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return above / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(x) -> list[float]:
    """Equal values share the mean of their ranks."""
    return [sum(other < value for other in x) + (x.count(value) + 1) / 2 for value in x]


def test_metrics_of_grades():
    right = [0.0, 2.5, 5.0, 2.5, 1.0, 4.2]
    guesses = [0.3, 2.0, 9.0, 2.6, 2.0, 3.0]
    assert METRICS["pearson"].measure(right, guesses) == pytest.approx(pearson(right, guesses))
    assert METRICS["spearman"].measure(right, guesses) == pytest.approx(pearson(ranks(right), ranks(guesses)))


def test_a_constant_guess_scores_nothing():
    for name in ("matthews", "pearson", "spearman"):
        assert METRICS[name].measure([0, 1, 1, 0], [1.0] * 4) == 0.0
    assert METRICS["f1"].measure([0, 1, 1, 0], [0] * 4) == 0.0


# Runs


def glue_recipe(place: Path, name: str, **sections) -> Path:
    text_models.bert_folder(place / "bert")
    write_glue(place / "sets", GLUE[name].folder)
    recipe = text_models.write_recipe(
        place,
        model={"name": str(place / "bert")},
        data={"name": None, "test_size": None, "folder": str(place / "sets"), "tasks": [name]},
        adapter={"target_modules": ["query", "value"]},
        **sections,
    )
    recipe.write_text(
        recipe.read_text().replace("family: generate", "family: glue").replace("  max_new_tokens: 4\n", "")
    )
    return recipe


@pytest.mark.parametrize("name", ["cola", "stsb", "mnli"])
def test_a_run(tmp_path, name):
    recipe = glue_recipe(tmp_path, name)
    result = training.train(load_recipe(str(recipe), ["optimizer.warmup_ratio=0.1"]))
    score = result.metrics["score"]
    task = GLUE[name]
    assert score["metric"] == task.metrics[0]
    assert list(score["tasks"]) == [part for part, _, _ in task.tests]
    for part in score["tasks"].values():
        assert part["questions"] == 8
        assert set(part["after"]) == set(part["before"]) == set(task.metrics)
    assert evaluate(str(result.folder.path))["score"] == score["after"]
    assert evaluate(str(result.folder.adapter_lora))["tasks"][task.tests[0][0]] == pytest.approx(
        score["tasks"][task.tests[0][0]]["after"], abs=1e-4
    )
    (tmp_path / "sets" / task.folder / "train.tsv").unlink()
    assert evaluate(str(result.folder.path))["score"] == score["after"]
    # Two steps of warm-up: the rate is 0, then half, then all.
    rates = [entry["learning_rate"] for entry in result.metrics["loss"][:3]]
    assert rates == pytest.approx([0.0, 0.005, 0.01])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_without_a_padding_token(tmp_path, dtype):
    """The last token of every row is read, whatever the padding of its batch."""
    folder = text_models.llama_folder(tmp_path / "llama")
    for file, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        content = json.loads((folder / file).read_text())
        del content[key]
        (folder / file).write_text(json.dumps(content))
    recipe = load_recipe(
        str(glue_recipe(tmp_path, "stsb")),
        [
            f"model.name={folder}",
            f"model.dtype={dtype}",
            "adapter.target_modules=[q_proj, v_proj]",
            "optimizer.learning_rate=0.003",
        ],
    )
    result = training.train(recipe)
    assert result.model.config.pad_token_id == text_models.tokenizer().eos_token_id
    assert result.metrics["loss"][-1]["loss"] < result.metrics["loss"][0]["loss"]
    score = result.metrics["score"]["after"]
    for batch_size in (1, 8):
        change = {"evaluation": recipe.evaluation.model_copy(update={"batch_size": batch_size})}
        again = evaluate(str(result.folder.path), change=lambda r, c=change: r.model_copy(update=c))
        assert again["score"] == pytest.approx(score, abs=1e-4 if dtype == "float32" else 0.05)


def test_pairs_are_told_apart_by_token_types(tmp_path):
    tokenizer = text_models.tokenizer()
    rows = glue.Glue(load_recipe(str(glue_recipe(tmp_path, "rte"))).task, GLUE["rte"]).encode(
        [Sentences("Ann has dogs.", "Dogs are there.", "not_entailment")], tokenizer
    )
    first, second = (tokenizer(text)["input_ids"] for text in ("Ann has dogs.", "Dogs are there."))
    assert rows[0]["input_ids"] == first + second
    assert rows[0]["labels"] == 1


def test_one_task_a_run(tmp_path):
    recipe = glue_recipe(tmp_path, "rte")
    for tasks in ("null", "[rte, cola]"):
        with pytest.raises(RecipeError, match="trains and scores one of GLUE's tasks; got data.tasks="):
            load_recipe(str(recipe), [f"data.tasks={tasks}"])


@pytest.mark.parametrize(
    ("name", "module", "package"), [("cola", "sklearn", "scikit-learn"), ("stsb", "scipy", "scipy")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module, package):
    recipe = load_recipe(str(glue_recipe(tmp_path, name)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf"needs the package {package}: pip install 'peft-tsd\[train\]'"):
        training.train(recipe)
    assert not (tmp_path / "run").exists()
