"""What has not changed has no task-specific directions: none are chosen by the order of a sort."""

import logging

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from torch import nn

from peft_tsd import DashConfig, TsdCallback, TsdConfig, check_adapter, export_lora, identify_from_gradients
from peft_tsd.tuner.phase import adapted_layers, steps_taken
from support import tiny
from support.trainers import trainer

METHODS = ["lora-dash", "lora-init", "lora-tsd"]


class Experts(nn.Module):
    """Three experts, of which the second sees no row, and a layer whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(16, 12) for _ in range(3))
        self.unused = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        return torch.cat([self.experts[0](x), self.experts[2](x)])


IDLE = {"experts.1", "unused"}
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def experts(method="lora-tsd", **changes):
    config = {"r": 3, "num_directions": 4, "prelaunch_steps": 2, "target_modules": r"experts\.\d|unused"}
    return get_peft_model(Experts(), TsdConfig(method=method, **{**config, **changes}))


def check_left_out(model, tmp_path):
    found = model.directions()
    assert {name for name, one in found.items() if not len(one.indices)} == IDLE
    for name in IDLE:
        assert len(found[name].rates) == len(found[name].delta_sigma) == found[name].u.shape[1] == 0
    assert str(found)  # has rows for them
    before = model(X).detach()
    model.save_pretrained(tmp_path / "adapter")
    check_adapter(tmp_path / "adapter")
    again = PeftModel.from_pretrained(Experts(), tmp_path / "adapter", is_trainable=True)
    assert again.phase() == "dash"
    assert torch.equal(again(X), before)
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(Experts(), tmp_path / "lora")
    assert torch.allclose(plain(X), before, atol=1e-5)
    return again


@pytest.mark.parametrize("budget", ["layer", "global"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_did_not_change_are_left_out_and_said(method, budget, tmp_path, caplog):
    if method == "lora-init" and budget == "global":
        pytest.skip("LoRA-Init has no budget")
    model = experts(method, direction_budget=budget)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="peft_tsd"):
        tiny.train(model, 5, inputs=X, optimizer=optimizer)
    [record] = caplog.records
    assert "2 of 4 layers have not changed" in record.getMessage()
    assert "experts.1, unused" in record.getMessage()
    again = check_left_out(model, tmp_path)
    # They are plain LoRA, which can learn later.
    layer = adapted_layers(again, "default")["experts.1"]
    layer(X).square().mean().backward()
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("memory", [1.0, 1e-9], ids=["one group", "a group a layer"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_without_a_gradient_are_left_out(method, memory, tmp_path):
    model = experts(method, prelaunch_steps=0)
    identify_from_gradients(model, [X], loss=lambda model, x: model(x).square().mean(), memory_gib=memory)
    check_left_out(model, tmp_path)


def test_a_gradient_of_zero_is_refused():
    model = experts(prelaunch_steps=0)
    with pytest.raises(ValueError, match="No gradient but zero reached .experts.0. or any of 4 layers"):
        identify_from_gradients(model, [X], loss=lambda model, x: model(x).mean() * 0)
    assert model.phase() == "pre-launch"


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
@pytest.mark.parametrize("prelaunch", [2, "auto"])
def test_the_transition_waits_for_a_change(start, prelaunch, caplog):
    steps = {"prelaunch_steps": prelaunch} | ({"prelaunch_min": 2, "prelaunch_max": 3} if prelaunch == "auto" else {})
    model = get_peft_model(tiny.llama(), tiny.config("lora-dash", init_lora_weights=start, **steps))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with caplog.at_level(logging.WARNING, logger="peft_tsd"):
        tiny.train(model, 6, optimizer=optimizer)
    assert model.phase() == "pre-launch"
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " a learning rate of 0, or no gradient. The directions are identified after the first step that changes any."
    ]
    optimizer.param_groups[0]["lr"] = 1e-2
    tiny.train(model, 1, optimizer=optimizer)
    assert model.phase() == "dash"
    assert model.directions().prelaunch_steps == 7
    assert all((one.rates > 0).all() for one in model.directions().values())


def test_a_warm_up_longer_than_the_pre_launch(tmp_path):
    """In Trainer, whose first learning rate of a warm-up is 0."""
    callback = TsdCallback()
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=1))
    run = trainer(tmp_path, model, [callback], warmup_steps=4, lr_scheduler_type="linear", max_steps=4)
    run.train()
    assert callback.transitions[0]["step"] == 2
    assert steps_taken(adapted_layers(model, "default"), "default") == 4


def test_a_check_of_an_automatic_pre_launch_does_not_settle_on_nothing():
    config = tiny.config("lora-dash", prelaunch_steps="auto", prelaunch_min=4, prelaunch_max=50)
    model = get_peft_model(tiny.llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tiny.train(model, 12, optimizer=optimizer)
    assert model.phase() == "pre-launch"


def test_beside_other_methods(caplog):
    model = get_peft_model(
        Experts(),
        DashConfig(peft=LoHaConfig(r=2, target_modules=r"experts\.\d|unused"), prelaunch_steps=2, num_directions=4),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tiny.train(model, 3, inputs=X, optimizer=optimizer)
    assert model.phase() == "pre-launch"
    optimizer.param_groups[0]["lr"] = 1e-2
    tiny.train(model, 3, inputs=X, optimizer=optimizer)
    found = model.directions()
    assert {name for name, one in found.items() if not len(one.indices)} == IDLE
    assert len(found["experts.0"].indices) == 4


def test_a_layer_with_fewer_changed_directions_gets_those_alone():
    """A change within three directions of a weight: the fourth would be any."""
    model = experts("lora-tsd", init_reading="svd")
    layer = adapted_layers(model, "default")["experts.0"]
    u, _, vt = torch.linalg.svd(layer.weight_matrix().double(), full_matrices=False)
    for other in adapted_layers(model, "default").values():
        nn.init.ones_(other.lora_B["default"].weight)
    with torch.no_grad():
        (
            layer.lora_A["default"].weight.copy_(torch.zeros(3, 16)),
            layer.lora_B["default"].weight.copy_(torch.zeros(12, 3)),
        )
        layer.lora_A["default"].weight[0] = vt[7]
        layer.lora_B["default"].weight[:, 0] = u[:, 7]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    tiny.train(model, 2, inputs=X, optimizer=optimizer)
    found = model.directions()["experts.0"]
    assert found.indices[0] == 7
    assert found.rates[0] > 1e4 * found.rates[1:].max() if len(found.rates) > 1 else True
