import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_tsd.errors import RecipeError
from peft_tsd.language.sections import Data, Task
from peft_tsd.language.tasks.generation import IGNORED, normalize
from peft_tsd.tasks import Classification, Example, Generation, load_examples
from support import text_models

GENERATE = Task(family="generate", max_new_tokens=5)


def examples(count: int) -> list[Example]:
    return [Example(row["question"], row["answer"]) for row in text_models.rows(count)]


# Where examples come from


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path, kind):
    content = text_models.rows(10)
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(content))
    elif kind == "jsonl":
        text_models.jsonl(path, content)
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    train, test = load_examples(Data(name=str(path), test_name=str(path), train_size=4, test_size=50), "{question}", 0)
    assert train == examples(4)
    assert test == examples(10)[4:]


def test_held_out_rows_are_unseen_and_depend_on_the_seed_alone(tmp_path):
    # Every row twice, so that a split by rows would leak.
    path = text_models.jsonl(tmp_path / "data.jsonl", text_models.rows(30) * 2)
    data = Data(name=str(path), test_size=20)
    train, test = load_examples(data, "{question}", 0)
    assert test
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert len({e.prompt for e in test}) == len(test)
    assert load_examples(data, "{question}", 0) == (train, test)
    assert load_examples(data, "{question}", 1) != (train, test)


def test_generated_questions_are_unseen():
    pytest.importorskip("reasoning_gym")
    data = Data(generator="family_relationships", train_size=60, test_size=40, parameters={"max_family_size": 5})
    train, test = load_examples(data, "{question}\nAnswer:", 0)
    assert (len(train), len(test)) == (60, 40)
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert all(e.prompt.endswith("\nAnswer:") for e in train)
    other, _ = load_examples(data, "{question}\nAnswer:", 1)
    assert not {e.prompt for e in train} & {e.prompt for e in other}


def test_a_small_space_of_questions_is_refused_not_repeated():
    pytest.importorskip("reasoning_gym")
    # Sums of two one-digit numbers: fewer than 200 questions exist.
    parameters = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = Data(generator="chain_sum", train_size=400, test_size=200, parameters=parameters)
    with pytest.raises(RecipeError, match=r"gave \d+ of data.test_size=200 unseen questions"):
        load_examples(data, "{question}", 0)


def test_sources_refused(tmp_path):
    path = text_models.jsonl(tmp_path / "data.jsonl", text_models.rows(5))

    def refusal(prompt="{question}", **fields) -> str:
        with pytest.raises(RecipeError) as caught:
            load_examples(Data(**fields), prompt, 0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no file" in refusal(name=str(tmp_path / "dat.jsonl"))
    assert "did you mean 'data.jsonl'" in refusal(name=str(tmp_path / "dat.jsonl"))
    assert "no column 'questin'; did you mean 'question'" in refusal(name=str(path), prompt="{questin}")
    assert "no column 'answr'; did you mean 'answer'" in refusal(name=str(path), answer="answr")
    assert "0 rows to train on" in refusal(name=str(path), test_size=9)
    (tmp_path / "data.txt").write_text("x")
    assert "known kinds are .json," in refusal(name=str(tmp_path / "data.txt"))
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n{"question": \n')
    assert "line 2" in refusal(name=str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.json").write_text('{"question": 1}')
    assert "a list of rows is expected; got dict" in refusal(name=str(tmp_path / "bad.json"))
    (tmp_path / "list.json").write_text("[[1]]")
    assert "row 1" in refusal(name=str(tmp_path / "list.json"))
    text_models.jsonl(tmp_path / "empty.jsonl", [{"question": "a", "answer": None}])
    assert "column 'answer' holds None" in refusal(name=str(tmp_path / "empty.jsonl"))
    assert "cannot load the dataset 'no/such'" in refusal(name="no/such")


def test_generators_refused():
    pytest.importorskip("reasoning_gym")

    def refusal(**fields) -> str:
        with pytest.raises(RecipeError) as caught:
            load_examples(Data(train_size=5, **fields), "{question}", 0)
        return str(caught.value)

    assert "did you mean 'family_relationships'" in refusal(generator="family_relationship")
    hint = refusal(generator="family_relationships", parameters={"max_family": 5})
    assert "'data.parameters.max_family'" in hint
    assert "did you mean 'data.parameters.max_family_size'" in hint
    assert "refuses them: min_family_size" in refusal(
        generator="family_relationships", parameters={"min_family_size": 1}
    )


# Generation


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" Mother. ", "mother"),
        ('"Mother-in-law"!', "mother-in-law"),
        ("**Two  words**", "two words"),
        ("-3.5", "-3.5"),
        ("3.5.", "3.5"),
        ("!", "!"),
        ("", ""),
    ],
)
def test_normalize(given, expected):
    assert normalize(given) == expected


@pytest.mark.parametrize("folder", [text_models.llama_folder, text_models.gpt2_folder])
def test_loss_is_the_mean_over_answer_tokens_of_the_plain_model(tmp_path, folder):
    """Two accumulated, padded, trimmed batches against one unpadded row at a time with all its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder(tmp_path / "model"))
    tokenizer = text_models.tokenizer()
    task = Generation(GENERATE)
    rows = task.encode(examples(8), tokenizer)
    assert len({len(row["prompt"]) for row in rows}) > 1
    assert len({len(row["answer"]) for row in rows}) > 1

    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["prompt"] + row["answer"]])).logits[0].double()
        predicted = logits[len(row["prompt"]) - 1 : -1].log_softmax(-1)
        total -= predicted[torch.arange(len(row["answer"])), row["answer"]].sum().item()
        count += len(row["answer"])

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    for module in model.modules():  # dropout has no part in this
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=task.collator(tokenizer, model))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_batches_keep_only_the_logits_a_label_needs(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(text_models.llama_folder(tmp_path / "model"))
    task, tokenizer = Generation(GENERATE), text_models.tokenizer()
    rows = task.encode(examples(6), tokenizer)
    batch = task.collator(tokenizer, model)(rows)
    keep = max(len(row["answer"]) for row in rows) + 1
    assert batch["labels"].shape == (6, keep)
    assert model(**batch).logits.shape[1] == keep
    assert batch["labels"].ne(IGNORED).sum() == sum(len(row["answer"]) for row in rows)
    for ids, row in zip(batch["input_ids"], rows, strict=True):
        assert ids[-len(row["answer"]) :].tolist() == row["answer"]


def test_long_prompts_lose_their_beginning_and_long_answers_are_refused():
    tokenizer = text_models.tokenizer()
    task = Generation(Task(family="generate", max_length=8))
    [row] = task.encode([Example("what is this long question here?", "one")], tokenizer)
    assert len(row["prompt"]) + len(row["answer"]) == 8
    assert tokenizer.decode(row["prompt"]).endswith("here?")
    with pytest.raises(RecipeError, match=r"task.max_length is 8"):
        task.encode([Example("q", "an answer that is much too long")], tokenizer)


def test_chat_needs_a_template_and_uses_it():
    tokenizer = text_models.tokenizer()
    task = Generation(Task(family="generate", chat=True))
    with pytest.raises(RecipeError, match="no chat template"):
        task.encode(examples(1), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [reply] "
    [row] = task.encode([Example("one?", "two")], tokenizer)
    assert tokenizer.decode(row["prompt"]) == "[user] one? [reply] "
    assert tokenizer.decode(row["answer"]) == "two<end>"


@pytest.mark.parametrize("folder", [text_models.llama_folder, text_models.gpt2_folder])
def test_score_is_greedy_exact_match_whatever_the_batch(tmp_path, folder):
    """Against a token-by-token loop without batches, padding or cache; some answers are made right on purpose."""
    model = AutoModelForCausalLM.from_pretrained(folder(tmp_path / "model")).eval()
    tokenizer = text_models.tokenizer()
    task = Generation(GENERATE)

    def answer(prompt: str) -> str:
        ids = tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 5:
            with torch.no_grad():
                token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
        return tokenizer.decode(new, skip_special_tokens=True)

    asked = [
        Example(e.prompt, answer(e.prompt).upper() if i % 3 == 0 else "never this") for i, e in enumerate(examples(9))
    ]
    seen: list[int] = []
    assert text_models.score(task, model, tokenizer, asked, 4, seen.append) == {"exact_match": pytest.approx(3 / 9)}
    assert sum(seen) == 9
    assert text_models.score(task, model, tokenizer, asked, 1) == {"exact_match": pytest.approx(3 / 9)}


# Classification


def test_classifier_learns_its_labels_and_scores_accuracy(tmp_path):
    given = [Example(f"{'yes' if i % 3 else 'no'} {i}", "positive" if i % 3 else "negative") for i in range(30)]
    task = Classification(Task(family="classify"), given)
    assert task.labels == ["negative", "positive"]
    assert task.majority(given) == pytest.approx(2 / 3)
    folder = text_models.bert_folder(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder, **task.config_fields).eval()
    tokenizer = text_models.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = task.collator(tokenizer, model)(task.encode(given, tokenizer))
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert text_models.score(task, model, tokenizer, given, 7) == {"accuracy": 1.0}
    assert text_models.score(task, model, tokenizer, [*given, Example("yes 1", "unknown")], 7) == {
        "accuracy": pytest.approx(30 / 31)
    }
    flipped = [Example(e.prompt, "negative" if e.answer == "positive" else "positive") for e in given]
    assert text_models.score(task, model, tokenizer, flipped, 7) == {"accuracy": 0.0}


def test_labels_refused():
    with pytest.raises(RecipeError, match="1 different answers, such as 'a'"):
        Classification(Task(family="classify"), [Example("q", "a")])
    with pytest.raises(RecipeError, match="the training rows hold 'c', which is not one of"):
        Classification(Task(family="classify", labels=["a", "b"]), [Example("q", "c")])
