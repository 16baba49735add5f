"""`peft-tsd train` in several processes: the run of one, said once, and ended together."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from peft_tsd.language import train
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs import processes
from support import text_models
from support.several import assert_same, assert_same_adapter, metrics_of, recipe_in, said, srun, torchrun

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny Llama and 37 rows: 6 to score on, and a last batch of three rows in each epoch."""
    return text_models.place_in(tmp_path, 37)


OTHER_BATCHES = ["training.similar_lengths=true", "training.gradient_accumulation=2", "training.steps=9"]


@pytest.mark.parametrize("change", [[], pytest.param(OTHER_BATCHES, marks=pytest.mark.long)])
def test_two_processes_do_the_run_of_one(place, change):
    """With evaluations, a last batch that is not full, rows of similar length; each line of the log is there once."""
    recipe = recipe_in(place, evaluation={"every": 4}, data={"validation_size": 3})
    two, alone = place / "two", place / "one"
    torchrun(2, [[str(recipe), *change, f"output={two}"]])
    train(load_recipe(str(recipe), [*change, f"output={alone}"]))
    assert_same(two, alone)
    assert_same_adapter(place, two, alone)
    assert metrics_of(two)["machine"]["processes"] == 2
    assert "processes" not in metrics_of(alone)["machine"]
    score, expected = metrics_of(two)["score"], metrics_of(alone)["score"]
    assert score["validation_loss"] == pytest.approx(expected["validation_loss"], abs=2e-4)
    log = (two / "train.log").read_text()
    assert [log.count(f" step {n}: loss") for n in range(1, 10)] == [1] * 9


@pytest.mark.long
def test_a_refusal_is_said_once_and_with_the_code_of_one_process(place):
    ended = srun(2, "train", str(recipe_in(place)), "training.batch_size=3")
    assert [code for code, _, _ in ended] == [2, 2]
    assert said(ended).count("peft-tsd: training.batch_size=3 rows are those of a batch in all") == 1
    assert not (place / "run").exists()


@pytest.mark.long
def test_one_process_that_is_told_to_stop_stops_all_and_one_continues(place):
    recipe = recipe_in(place)
    at = {"rank": 1, "step": 6, "signal": int(signal.SIGTERM)}
    ended = srun(2, json.dumps({"runs": [[str(recipe)]], "at": at}), by="support.in_recipes")
    assert [code for code, _, _ in ended] == [143, 143], said(ended)
    assert said(ended).count("interrupted; to continue:") == 1
    assert metrics_of(place / "run")["status"] == "running"
    train(load_recipe(str(recipe), ["resume=true"]))
    train(load_recipe(str(recipe), [f"output={place / 'alone'}"]))
    assert_same(place / "run", place / "alone")
    assert_same_adapter(place, place / "run", place / "alone")
    log = (place / "run" / "train.log").read_text()
    assert [log.count(f" step {n}: loss") for n in range(1, 13)] == [1] * 12


def test_sruns_variables_are_read_where_there_is_a_step_of_several_tasks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # A batch script: it is one process, though its job has several tasks.
    job = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    processes.read_slurm()
    assert processes.launched() == 1
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04,09],x"}
    for name, value in {**step, "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    # Of torchrun inside srun the own variables hold.
    monkeypatch.setenv("WORLD_SIZE", "4")
    processes.read_slurm()
    assert "RANK" not in os.environ
    monkeypatch.delenv("WORLD_SIZE")
    before = dict(os.environ)
    processes.read_slurm()
    try:
        set_by_it = {name: os.environ[name] for name in os.environ.keys() - before.keys()}
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
    assert 1024 < int(set_by_it.pop("MASTER_PORT")) < 32768
    assert set_by_it == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu03"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a[1-3]", "a1"), ("n[007,9]-ib", "n007-ib"), ("x,y[1-2]", "x"), ("10.0.0.1", "10.0.0.1")],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert processes._first_host(nodes) == first


@pytest.mark.long
def test_four_processes_of_which_some_have_no_row_of_the_last_batch(place):
    """29 rows to train on in batches of four: the last one has a single row, and three processes none."""
    text_models.jsonl(place / "data.jsonl", text_models.rows(35))
    recipe = recipe_in(place, training={"steps": 18}, evaluation={"every": 9})
    torchrun(4, [[str(recipe), f"output={place / 'four'}"], [str(recipe), f"output={place / 'again'}"]])
    train(load_recipe(str(recipe), [f"output={place / 'one'}"]))
    for name in ("four", "again"):
        assert_same(place / name, place / "one")
        assert_same_adapter(place, place / name, place / "one")
    assert metrics_of(place / "four")["loss"] == metrics_of(place / "again")["loss"]


def a_chat(place) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "model")
    chats = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in text_models.rows(37)
    ]
    text_models.jsonl(place / "chats.jsonl", chats)


@pytest.mark.long
def test_every_way_to_train_is_shared_out(place):
    """Conversations (packed and not), directions of gradients, starts from batches, other methods, a whole model."""
    a_chat(place)
    recipe = str(recipe_in(place))
    chat = ["task.family=chat", f"data.name={place / 'chats.jsonl'}"]
    gradient = ["directions.prelaunch_steps=0", "directions.direction_source=gradient"]
    changes = {
        "chat": chat,
        "packed": [*chat, "task.packing=true", "task.max_length=64"],
        "gradient": gradient,
        "packed gradient": [*chat, "task.packing=true", "task.max_length=64", *gradient],
        "gradient of weights": ["directions.prelaunch_steps=0", "directions.dash_unit=sigma"],
        "early": ["evaluation.every=2", "evaluation.patience=2", "evaluation.during=loss"],
        **{method: [f"method={method}"] for method in ("lora-init", "lora-ga", "eva", "loha-dash", "full", "pissa")},
    }
    torchrun(2, [[recipe, *change, f"output={place / f'two {name}'}"] for name, change in changes.items()])
    for name, change in changes.items():
        train(load_recipe(recipe, [*change, f"output={place / f'one {name}'}"]))
        assert_same(place / f"two {name}", place / f"one {name}")
        if name in ("chat", "packed", "gradient", "packed gradient", "lora-init"):
            assert_same_adapter(place, place / f"two {name}", place / f"one {name}")


@pytest.mark.long
def test_a_classifier_is_shared_out(tmp_path):
    """Its loss is a mean over rows, of which the processes may have different numbers."""
    text_models.bert_folder(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    rows = [{**row, "answer": ("odd", "even")[i % 2]} for i, row in enumerate(text_models.rows(35))]
    text_models.jsonl(tmp_path / "data.jsonl", rows)
    recipe = recipe_in(
        tmp_path,
        task={"family": "classify", "max_new_tokens": 16},
        adapter={"target_modules": ["query", "value"]},
        training={"steps": 18},
    )
    torchrun(2, [[str(recipe), f"output={tmp_path / name}"] for name in ("two", "again")])
    train(load_recipe(str(recipe), [f"output={tmp_path / 'one'}"]))
    assert_same(tmp_path / "two", tmp_path / "one")
    mine, theirs = (load_file(tmp_path / run / "adapter-lora" / "adapter_model.safetensors") for run in ("two", "one"))
    heads = [name for name in theirs if "classifier" in name]
    assert heads
    for name in heads:
        torch.testing.assert_close(mine[name], theirs[name], atol=1e-3, rtol=0)


@pytest.mark.long
def test_a_run_continues_in_other_numbers_of_processes(place):
    recipe = recipe_in(place)
    train(load_recipe(str(recipe), [f"output={place / 'whole'}"]))
    for first, then in ((1, 2), (2, 4)):
        run = place / f"{first}-{then}"
        at = {"rank": 0, "step": 7, "signal": int(signal.SIGTERM)}
        given = json.dumps({"runs": [[str(recipe), f"output={run}"]], "at": at})
        ended = srun(first, given, by="support.in_recipes", **({"RANK": "0"} if first == 1 else {}))
        assert [code for code, _, _ in ended] == [143] * first, said(ended)
        torchrun(then, [[str(recipe), f"output={run}", "resume=true"]] * 2)
        assert_same(run, place / "whole")
        assert_same_adapter(place, run, place / "whole")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all_and_the_run_continues(place, rank):
    recipe = recipe_in(place)
    at = {"rank": rank, "step": 7, "signal": int(signal.SIGKILL)}
    ended = srun(2, json.dumps({"runs": [[str(recipe)]], "at": at}), by="support.in_recipes")
    assert ended[rank][0] == -signal.SIGKILL
    assert ended[1 - rank][0] == 1
    assert "Traceback" not in said(ended)
    torchrun(2, [[str(recipe), "resume=true"]] * 2)
    train(load_recipe(str(recipe), [f"output={place / 'whole'}"]))
    assert_same(place / "run", place / "whole")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_says_why_and_ends_all(place, rank):
    ended = srun(
        2,
        json.dumps({"runs": [[str(recipe_in(place))]], "at": {"rank": rank, "step": 7}}),
        by="support.in_recipes",
    )
    assert [code for code, _, _ in ended] == [1, 1]
    assert said(ended).count("RuntimeError: one process has had enough") == 1
    assert ended[rank][2].count("RuntimeError: one process has had enough") == 1


@pytest.mark.long
def test_a_full_disk_is_said_once(place):
    """Here: in the main process no file may grow beyond 8 KB."""
    ended = srun(2, json.dumps({"runs": [[str(recipe_in(place))]]}), by="support.in_recipes", LARGEST_FILE="8000")
    assert [code for code, _, _ in ended] == [2, 2], said(ended)
    assert said(ended).count("no room to write") == 1
    torchrun(2, [[str(place / "tiny.yaml"), "resume=true"]] * 2)
    assert metrics_of(place / "run")["status"] == "finished"


@pytest.mark.long
def test_other_verbs_are_one_process_and_other_data_are_refused(place):
    ended = srun(2, "evaluate", str(place))
    assert [code for code, _, _ in ended] == [2, 2]
    assert said(ended).count("peft-tsd: WORLD_SIZE=2: several processes can do `peft-tsd train`") == 1
    ended = srun(2, "train")
    assert [code for code, _, _ in ended] == [2, 2]
    assert said(ended).count("the following arguments are required: RECIPE") == 1
    shutil.rmtree(place / "model")
    ended = srun(2, "train", str(recipe_in(place, method="adalora")))
    assert said(ended).count("peft-tsd: method=adalora adds a penalty") == 1
