"""While an adapter is merged, nothing of it changes: an unmerge would take another change out of the base weight."""

import copy

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import TrainerState

from peft_tsd import DashConfig, TsdCallback, advance, identify_from_gradients
from peft_tsd.tuner.phase import adapted_layers
from support import tiny


def tsd(**changes):
    return get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2, **changes))


def dash():
    config = DashConfig(peft=LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS), prelaunch_steps=2, num_directions=4)
    return get_peft_model(tiny.llama(), config)


def stepped(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 1, optimizer=optimizer)
    tiny.language_loss(model, 1).backward()
    optimizer.step()
    return optimizer


def base_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name}


CHANGES = {
    "advance": lambda model, optimizer, state: advance(model, optimizer),
    "gradients": lambda model, optimizer, state: identify_from_gradients(
        model, [0], optimizer, loss=lambda m, step: tiny.language_loss(m, step)
    ),
    "a trainer": lambda model, optimizer, state: TsdCallback().on_train_begin(
        None, TrainerState(max_steps=9), None, model=model
    ),
    "a state dict of the adapter": lambda model, optimizer, state: set_peft_model_state_dict(model, state),
    "a whole state dict": lambda model, optimizer, state: model.load_state_dict(model.state_dict()),
    "deleting it": lambda model, optimizer, state: model.delete_adapter("default"),
    "deleting it from a layer": lambda model, optimizer, state: next(
        iter(adapted_layers(model, "default").values())
    ).delete_adapter("default"),
}
OF_LORA = {
    "its scale": lambda model, optimizer, state: next(iter(adapted_layers(model, "default").values())).set_scale(
        "default", 0.5
    ),
    "the scale of the layer": lambda model, optimizer, state: next(
        iter(adapted_layers(model, "default").values())
    ).scale_layer(0.5),
    "putting the scale back": lambda model, optimizer, state: next(
        iter(adapted_layers(model, "default").values())
    ).unscale_layer(),
}


@pytest.mark.parametrize("make", [tsd, dash])
@pytest.mark.parametrize("change", [*CHANGES, *OF_LORA])
def test_a_change_of_a_merged_adapter_is_refused_and_the_base_comes_back(make, change):
    if make is dash and change in OF_LORA:
        pytest.skip("of LoRA's layers")
    model = make()
    optimizer = stepped(model)
    before = base_of(model)
    state = {
        name.replace(".default", ""): torch.randn_like(value) if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
        if ".default" in name
    }
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        (CHANGES | OF_LORA)[change](model, optimizer, state)
    model.unmerge_adapter()
    for name, value in base_of(model).items():
        assert torch.allclose(value, before[name], atol=1e-6), name
    assert model.phase() == "pre-launch"
    assert advance(model, optimizer)  # the step that was refused is counted now


def test_another_adapter_can_be_loaded_and_dropped_beside_a_merged_one(tmp_path):
    model = tsd()
    tiny.train(model, 3)
    model.save_pretrained(tmp_path)
    before = base_of(model)
    model.merge_adapter()
    model.load_adapter(str(tmp_path), "other")
    model.delete_adapter("other")
    model.set_adapter("default")
    if next(iter(adapted_layers(model, "default").values())).merged:
        model.unmerge_adapter()
    for name, value in base_of(model).items():
        assert torch.allclose(value, before[name], atol=1e-6), name


def test_a_merged_adapter_is_saved_and_copied_as_ever(tmp_path):
    model = tsd()
    tiny.train(model, 3)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.allclose(again(tiny.tokens()).logits, twin(tiny.tokens()).logits, atol=1e-5)
