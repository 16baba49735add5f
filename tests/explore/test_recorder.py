"""What the recorder stores, against dense changes; resuming, superseding and refusing."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_tsd import TsdCallback
from peft_tsd.directions.spectrum import Spectrum
from peft_tsd.explore import DirectionRecorder, Trajectory, agreement
from peft_tsd.explore import recorder as recorder_module
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny


def lora(model=None, **changes):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": tiny.LLAMA_TARGETS, "init_lora_weights": False, **changes}
    torch.manual_seed(1)
    return get_peft_model(model or tiny.llama(), LoraConfig(**settings))


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def trainer(tmp_path, model, recorder, steps=7, **changes) -> Trainer:
    arguments = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        **changes,
    }
    rows = tiny.tokens(40, 9).tolist()
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=data, callbacks=[recorder])


def test_rates_of_every_tsd_layer_are_those_of_the_dense_change(trained, tmp_path):
    DirectionRecorder(tmp_path / "rates").record(trained, 6)
    found = Trajectory.read(tmp_path / "rates")
    layers = adapted_layers(trained, "default")
    assert found.weights == tuple(layers)
    for name, layer in layers.items():
        expected = reference.change_rates(layer.weight_matrix(), reference.effective_change(layer))
        np.testing.assert_allclose(found.rates(name)[0], expected, rtol=1e-4, atol=1e-7)
        assert found.shapes[name] == tuple(layer.weight_matrix().shape)


@pytest.mark.parametrize(("make", "targets"), [(tiny.llama, tiny.LLAMA_TARGETS), (tiny.gpt2, ["c_attn"])])
@pytest.mark.parametrize("cache_gib", [4, 0])
def test_rates_of_plain_lora(make, targets, cache_gib, tmp_path):
    model = lora(make(), target_modules=targets)
    DirectionRecorder(tmp_path / "rates", cache_gib=cache_gib).record(model, 1)
    found = Trajectory.read(tmp_path / "rates")
    for name in found.weights:
        layer = model.base_model.model.get_submodule(name)
        transposed = layer.fan_in_fan_out
        weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
        expected = reference.change_rates(weight.T if transposed else weight, delta.T if transposed else delta)
        np.testing.assert_allclose(found.rates(name)[0], expected, rtol=1e-4, atol=1e-6)


def test_convolutions(tmp_path):
    model = lora(tiny.ConvNet(), target_modules=["first", "second", "head"])
    DirectionRecorder(tmp_path / "rates").record(model, 1)
    found = Trajectory.read(tmp_path / "rates")
    assert found.shapes == {"first": (12, 27), "second": (10, 12), "head": (4, 10)}
    first = model.base_model.model.first
    expected = reference.change_rates(
        first.get_base_layer().weight.flatten(1), first.get_delta_weight("default").flatten(1)
    )
    np.testing.assert_allclose(found.rates("first")[0], expected, rtol=1e-4)


def test_each_weight_is_factorized_once_while_the_cache_lasts(tmp_path, monkeypatch):
    made = []

    class Counting(Spectrum):
        def __init__(self, weight):
            made.append(weight.shape)
            super().__init__(weight)

    monkeypatch.setattr(recorder_module, "Spectrum", Counting)
    model = lora()
    kept = DirectionRecorder(tmp_path / "kept")
    for step in (1, 2, 3):
        kept.record(model, step)
    assert len(made) == 6
    # Room for one weight of 32 directions (8·32² bytes, and its σ), not for two.
    made.clear()
    small = DirectionRecorder(tmp_path / "small", cache_gib=10_000 / 2**30)
    for step in (1, 2, 3):
        small.record(model, step)
    assert len(made) == 6 + 5 + 5
    np.testing.assert_array_equal(
        Trajectory.read(tmp_path / "kept").rates(kept_name(model)),
        Trajectory.read(tmp_path / "small").rates(kept_name(model)),
    )


def kept_name(model) -> str:
    return next(n for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A"))


def test_trainer_records_the_grid_and_the_last_step(tmp_path):
    recorder = DirectionRecorder(tmp_path / "rates", every=3)
    trainer(tmp_path, lora(), recorder, steps=7, gradient_accumulation_steps=2).train()
    assert Trajectory.read(tmp_path / "rates").steps.tolist() == [3, 6, 7]
    assert agreement(Trajectory.read(tmp_path / "rates"), predicted=4, true=4).precision[-1].tolist() == [1.0] * 6


def test_trainer_with_the_schedule_of_tsd(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config("lora-tsd"))
    run = trainer(tmp_path, model, DirectionRecorder(tmp_path / "rates", every=2), steps=5)
    run.add_callback(TsdCallback())
    run.train()
    found = Trajectory.read(tmp_path / "rates")
    assert found.steps.tolist() == [2, 4, 5]
    name, layer = next(iter(adapted_layers(model, "default").items()))
    expected = reference.change_rates(layer.weight_matrix(), reference.effective_change(layer))
    np.testing.assert_allclose(found.rates(name)[-1], expected, rtol=1e-3, atol=1e-7)


def test_resumed_training_goes_on(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer(tmp_path, lora(), DirectionRecorder(tmp_path / "rates", every=3), steps=10, **saving).train()
    whole = Trajectory.read(tmp_path / "rates")
    assert whole.steps.tolist() == [3, 6, 9, 10]
    before = {name: whole.rates(name) for name in whole.weights}
    resumed = trainer(tmp_path, lora(), DirectionRecorder(tmp_path / "rates", every=3), steps=10, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    again = Trajectory.read(tmp_path / "rates")
    assert again.steps.tolist() == [3, 6, 9, 10]
    for name in again.weights:
        np.testing.assert_allclose(again.rates(name), before[name], rtol=1e-4, atol=1e-7)


def test_resuming_removes_what_came_later(tmp_path):
    model = lora()
    first = DirectionRecorder(tmp_path / "rates")
    for step in (10, 20, 30, 40):
        first.record(model, step)
    DirectionRecorder(tmp_path / "rates").record(model, 25)
    assert Trajectory.read(tmp_path / "rates").steps.tolist() == [10, 20, 25]


def test_another_run_or_model_is_refused(tmp_path):
    model = lora()
    DirectionRecorder(tmp_path / "rates").record(model, 10)
    before = files(tmp_path / "rates")
    with pytest.raises(ValueError, match="holds the rates of a run up to step 10, and this one begins at its start"):
        DirectionRecorder(tmp_path / "rates").record(model, 10)
    with pytest.raises(ValueError, match="up to step 10"):
        trainer(tmp_path, lora(), DirectionRecorder(tmp_path / "rates"), steps=1).train()
    with pytest.raises(ValueError, match=r"self_attn.k_proj is missing there and \(16, 32\) here"):
        DirectionRecorder(tmp_path / "rates").record(lora(target_modules=["q_proj", "k_proj"]), 20)
    with pytest.raises(ValueError, match="eps=1e-06, and eps=0.001 is asked for"):
        DirectionRecorder(tmp_path / "rates", eps=1e-3).record(model, 20)
    other = tiny.llama()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight *= 1.1
    with pytest.raises(ValueError, match="another base model: the weight of model.layers.1.self_attn.q_proj has norm"):
        DirectionRecorder(tmp_path / "rates").record(lora(other), 20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="is not empty, and holds no recorded rates"):
        DirectionRecorder(tmp_path / "full").record(model, 10)
    assert files(tmp_path / "rates") == before


def test_what_is_not_low_rank_is_left_out_or_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA or TSD layer .*DoraLinearVariant"):
        DirectionRecorder(tmp_path / "rates").record(lora(use_dora=True), 1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA or TSD layer"):
        DirectionRecorder(tmp_path / "rates").record(tiny.llama(), 1)
    recorder = DirectionRecorder(tmp_path / "rates")
    recorder.record(lora(target_modules=["q_proj", "embed_tokens"]), 1)
    assert list(recorder.left_out) == ["model.embed_tokens"]
    merged = lora()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weight of .*unmerge_adapter"):
        DirectionRecorder(tmp_path / "other").record(merged, 1)
    assert not (tmp_path / "other").exists()


def test_a_failed_record_leaves_nothing(tmp_path):
    model = lora()
    recorder = DirectionRecorder(tmp_path / "rates")
    recorder.record(model, 1)
    before = files(tmp_path / "rates")
    with torch.no_grad():
        model.base_model.model.get_submodule(kept_name(model)).lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"A of model.layers.0.self_attn.q_proj .* holds 1 NaN or Inf"):
        recorder.record(model, 2)
    assert files(tmp_path / "rates") == before == ["step-000001.safetensors", "trajectory.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a positive integer"),
        ({"cache_gib": -1}, "cache_gib must be 0 or more"),
        ({"eps": -1.0}, "eps must be positive"),
    ],
)
def test_bad_settings(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DirectionRecorder(tmp_path, **arguments)
    with pytest.raises(ValueError, match="step must be the number of optimizer steps"):
        DirectionRecorder(tmp_path).record(lora(), -1)


def test_reading_what_is_no_trajectory(tmp_path):
    with pytest.raises(ValueError, match=r"holds no trajectory.json; give a folder that DirectionRecorder wrote"):
        Trajectory.read(tmp_path)
    (tmp_path / "trajectory.json").write_text(json.dumps({"weights": []}))
    with pytest.raises(ValueError, match="is not what DirectionRecorder writes"):
        Trajectory.read(tmp_path)
    recorder = DirectionRecorder(tmp_path / "rates")
    recorder.record(lora(), 1)
    path = tmp_path / "rates" / "step-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"step-000001.safetensors cannot be read"):
        Trajectory.read(tmp_path / "rates").rates("model.layers.0.self_attn.q_proj")
    path.unlink()
    with pytest.raises(ValueError, match="holds no recorded step yet"):
        Trajectory.read(tmp_path / "rates")
