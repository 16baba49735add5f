"""LoRA-GA and EVA, PEFT's methods that start from the first training batches."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_tsd.files.adapters import WEIGHTS
from peft_tsd.language import preparing, starts, trainers, training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs.stopping import Interrupted
from peft_tsd.tuner.opening import load_adapter
from support import text_models
from support.runs import interrupt_at, run

METHODS = ("lora-ga", "eva")


def tensors(result):
    return load_file(result.folder.adapter / WEIGHTS)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_for_the_base_weights_as_they_were(place, method):
    result = run(text_models.write_recipe(place), f"method={method}")
    metrics = result.metrics
    assert metrics["start_seconds"] > 0
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    assert evaluate(str(result.folder.path))["score"] == metrics["score"]["after"]
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    whole = load_adapter(base, result.folder.adapter, "the base").merge_and_unload()
    trained = result.model.merge_and_unload()
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(weight, trained.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.long), 7, pytest.param(12, marks=pytest.mark.long)]
)
def test_a_stopped_run_goes_on_to_the_same_end(place, monkeypatch, method, step):
    # Before the first checkpoint, after one, and after the last step.
    recipe = text_models.write_recipe(place, evaluation={"before": False, "every": 6, "during": "loss"})
    whole = run(recipe, f"method={method}", f"output={place / 'whole'}")
    interrupt_at(monkeypatch, f"step {step}:")
    stopped = [f"method={method}", f"output={place / 'stopped'}"]
    with pytest.raises(Interrupted):
        run(recipe, *stopped)
    monkeypatch.undo()
    again = run(recipe, *stopped, "resume=true")
    left, right = tensors(whole), tensors(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for key in ("loss", "evaluations", "score"):
        assert again.metrics[key] == whole.metrics[key], key


@pytest.mark.parametrize(("method", "similar"), [("lora-ga", False), ("eva", True)])
def test_the_batches_are_those_that_are_trained_on_first(place, monkeypatch, method, similar):
    seen, trained = [], []
    start, step = training.start_from_batches, trainers.EvaluatedTrainer.training_step

    def watched_start(base, config, batches, kept):
        seen.extend(batches)
        return start(base, config, batches, kept)

    def watched_step(self, model, inputs, *rest):
        trained.append({key: value.clone() for key, value in inputs.items()})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(training, "start_from_batches", watched_start)
    monkeypatch.setattr(trainers.EvaluatedTrainer, "training_step", watched_step)
    recipe = text_models.write_recipe(place, training={"start_batches": 3, "steps": 5, "similar_lengths": similar})
    run(recipe, f"method={method}")
    assert len(seen) == 3
    for one, other in zip(seen, trained):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def started(place, method, **adapter):
    """The base as it was, and with the start of a method, and the rows it started from."""
    recipe = load_recipe(str(text_models.write_recipe(place, adapter=adapter)), [f"method={method}"])
    job = preparing.prepare(recipe)
    base, untouched = (AutoModelForCausalLM.from_pretrained(place / "model") for _ in range(2))
    batch = job.task.collator(job.tokenizer, base)(job.rows[:3])
    return untouched, starts.start_from_batches(base, job.adapter_config, [batch], place / "start"), batch


@pytest.mark.parametrize("method", METHODS)
def test_the_start_computes_what_the_base_computes(place, method):
    untouched, model, batch = started(place, method)
    torch.testing.assert_close(model.eval()(**batch).logits, untouched.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_lora_ga_starts_in_the_gradients_leading_directions(place):
    untouched, model, batch = started(place, "lora-ga")
    untouched.train()(**batch).loss.backward()
    for name, weight in untouched.named_parameters():
        if "q_proj" in name:
            _, _, vt = torch.linalg.svd(weight.grad.double())
            a = model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight").double()
            assert torch.linalg.svdvals(a @ vt[:2].T).min() > 0.999


def test_eva_starts_in_the_answers_leading_inputs(place):
    untouched, model, batch = started(place, "eva", eva_config={"rho": 1.0})
    inputs = {}
    for name, module in untouched.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(lambda m, x, y, name=name: inputs.update({name: x[0].detach()}))
    aligned = starts._aligned(batch)
    untouched.eval()(**aligned)
    for name, x in inputs.items():
        rows = x[aligned["labels"] != -100].double()
        _, _, vt = torch.linalg.svd(rows - rows.mean(0))
        a = model.get_parameter(f"base_model.model.{name}.lora_A.default.weight").double()
        assert torch.linalg.svdvals(a @ vt[:2].T).min() > 0.99


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_stays_where_the_start_is_put_in(place, rslora):
    untouched, model, batch = started(place, "lora-ga", use_rslora=rslora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.3)
    model.save_pretrained(place / "adapter")
    starts.put_start_in(place / "adapter", place / "start")
    assert LoraConfig.from_pretrained(place / "adapter").r == 4
    again = load_adapter(untouched, place / "adapter", "the base")
    torch.testing.assert_close(again(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_start_is_refused_for_a_quantized_base(place):
    recipe = text_models.write_recipe(place)
    with pytest.raises(ValueError, match="model.quantization=bnb-4bit is for the methods"):
        load_recipe(str(recipe), ["method=lora-ga", "model.quantization=bnb-4bit"])
