"""What is said where an adapter is not what it seems."""

import warnings

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from peft_tsd import PrelaunchWarning, TsdConfig
from support import tiny
from support.trainers import trainer


def test_a_layer_that_is_never_called_is_refused():
    base = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention reads its weight and never calls it"):
        get_peft_model(base, TsdConfig(target_modules=["out_proj"]))
    get_peft_model(base, TsdConfig(target_modules=["linear1"]))


def test_a_bilinear_layer_has_no_experts():
    base = nn.Sequential(nn.Bilinear(4, 4, 4))
    with pytest.raises(ValueError, match=r"of type Bilinear, and only") as told:
        get_peft_model(base, TsdConfig(target_modules=["0"]))
    assert "expert" not in str(told.value)


def test_layers_in_different_phases_are_no_dash():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    early = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    tiny.train(model, 2)
    part = {key: value for key, value in early.items() if "layers.1" in key}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, part)
    for ask in (model.phase, model.directions):
        with pytest.raises(ValueError, match=r"in two phases at once: 'model.layers.1.*' is in pre-launch"):
            ask()


def test_a_state_of_before_the_transition_that_is_restored():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    tiny.train(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrelaunchWarning)
        early = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    model.peft_config["default"].prelaunch_notice_given = False
    tiny.train(model, 1)
    set_peft_model_state_dict(model, early)
    with pytest.warns(PrelaunchWarning, match="was restored to its state after step 1, before the transition") as told:
        get_peft_model_state_dict(model)
    assert "train longer" not in str(told[0].message)


def test_an_adapter_beside_one_that_had_its_directions_was_not_restored():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=1))
    tiny.train(model, 1)
    model.add_adapter("other", tiny.config(prelaunch_steps=3))
    with pytest.warns(PrelaunchWarning, match="No step was ever counted"):
        get_peft_model_state_dict(model, adapter_name="other")


def test_a_run_too_short_is_not_told_to_pass_the_callback_it_has(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    with pytest.warns(PrelaunchWarning, match="Train for 3 steps more, or lower prelaunch_steps to at most 1") as told:
        run.train()
    assert not any("callbacks" in str(one.message) for one in told)
    assert torch.isfinite(next(iter(run.model.parameters()))).all()
