"""What PEFT and transformers offer on a model, where it has directions beside another method."""

import copy
import io

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from peft_tsd import DashModel, PrelaunchWarning, advance, export_lora
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.dash import config, logits, trained


def test_several_adapters():
    model = get_peft_model(tiny.llama(), config(), adapter_name="one")
    assert isinstance(model.base_model, DashModel)
    model.add_adapter("two", config(LoHaConfig(r=2, target_modules=["q_proj", "up_proj"])))
    tiny.train(model, 6)
    one = logits(model.eval())
    model.set_adapter("two")
    assert (model.phase("one"), model.phase("two")) == ("dash", "pre-launch")
    assert torch.equal(logits(model), logits(tiny.llama()))
    tiny.train(model, 6)
    assert set(model.directions("one")) != set(model.directions("two"))
    model.eval().set_adapter("one")
    assert torch.equal(logits(model), one)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not torch.allclose(both, one)
    torch.testing.assert_close(
        logits(copy.deepcopy(model).merge_and_unload(adapter_names=["one", "two"])), both, rtol=1e-4, atol=1e-5
    )
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert set(layer.dash_scalars) == set(layer.dash_directions) == set(layer.dash_config) == {"one"}
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("three", config(LoKrConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(NotImplementedError, match="export_lora"):
        model.add_weighted_adapter(["one"], [1.0], "sum")


def test_rows_of_one_batch_may_use_different_adapters():
    inner = {"r": 3, "target_modules": tiny.LLAMA_TARGETS}
    model = get_peft_model(tiny.llama(), config(LoraConfig(**inner)), adapter_name="one")
    tiny.train(model, 6)
    ids = tiny.tokens(3)
    expected = logits(model.eval(), ids)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["one", "__base__", "one"]).logits
    expected[1] = logits(tiny.llama(), ids)[1]
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


def test_injection_into_a_model_without_a_tuner():
    model = inject_adapter_in_model(config(), tiny.llama())
    tiny.train(model, 6)
    assert {layer.fixed("default").identified for layer in adapted_layers(model, "default").values()} == {True}
    for inner in (VeraConfig(r=2, target_modules=["q_proj"]), AdaLoraConfig(target_modules=["q_proj"], total_step=9)):
        with pytest.raises(ValueError, match="because it uses shared state"):
            inject_adapter_in_model(config(inner), tiny.llama())
    plain = inject_adapter_in_model(LoHaConfig(target_modules=["q_proj"]), tiny.llama())
    with pytest.raises(ValueError, match=r"q_proj already carries adapters of type peft.tuners.loha.layer.Linear"):
        inject_adapter_in_model(config(), plain, adapter_name="two")


def test_a_classifier_keeps_its_head(tmp_path):
    model = get_peft_model(tiny.bert(), config(LoKrConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")))
    ids = tiny.tokens(6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        model(ids, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, optimizer)
    model.eval().save_pretrained(tmp_path)
    export_lora(model, tmp_path / "lora")
    for folder in (tmp_path, tmp_path / "lora"):
        other = tiny.bert()
        nn.init.normal_(other.classifier.weight)
        torch.testing.assert_close(logits(PeftModel.from_pretrained(other, folder), ids), logits(model, ids))


def test_copies_and_pickles():
    model = trained()
    for other in (copy.deepcopy(model), torch.load(_saved(model), weights_only=False)):
        assert type(other.base_model) is type(model.base_model)
        assert torch.equal(logits(other), logits(model))


def _saved(model) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_a_broken_adapter_is_not_merged_safely():
    model = trained()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_base_layer().weight.clone()
    layer.dash_scalars["default"].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


def test_saving_in_pre_launch_says_so(tmp_path):
    with pytest.warns(PrelaunchWarning, match=r"'default' \(LOHA with directions\) is saved while still"):
        trained(steps=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is not for adapters"):
        trained().save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "b"))
