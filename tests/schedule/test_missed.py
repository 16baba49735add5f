"""A step that nobody counts is said when the next one is taken: once, and nowhere else."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_tsd import DashConfig, PrelaunchWarning, TsdCallback, advance
from support import tiny
from support.trainers import trainer


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model, optimizer, seed, after=lambda: None) -> None:
    tiny.language_loss(model, seed).backward()
    optimizer.step()
    after()
    optimizer.zero_grad()


def said(work) -> list[str]:
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in given if one.category is PrelaunchWarning]


def adapted(**changes):
    return get_peft_model(tiny.llama(), tiny.config(**{"prelaunch_steps": 50, **changes}))


REMEDY = "pass callbacks=[TsdCallback()] to the Trainer, or call advance(model, optimizer) after each optimizer step"


def test_a_trainer_without_the_callback_says_so_at_once_and_not_again(tmp_path):
    model = adapted()
    training = trainer(tmp_path, model, callbacks=[], max_steps=2)
    [told] = said(training.train)
    assert "'default' (lora-tsd) took an optimizer step that nobody counted" in told
    assert REMEDY in told
    assert said(lambda: model.save_pretrained(tmp_path / "adapter")) == []
    assert said(trainer(tmp_path, model, callbacks=[], max_steps=2).train) == []


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_loop_that_counts_nothing(make, set_to_none):
    model = adapted()
    optimizer = make(trained(model), lr=1e-2)
    heard = []
    for seed in range(4):
        tiny.language_loss(model, seed).backward()
        heard.append(len(said(optimizer.step)))
        optimizer.zero_grad(set_to_none=set_to_none)
    assert heard == [0, 1, 0, 0]


def test_what_another_method_trains_beside_its_directions():
    config = DashConfig(peft=LoraConfig(target_modules=["q_proj"], use_dora=True), prelaunch_steps=50)
    model = get_peft_model(tiny.llama(), config)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    assert len(said(lambda: [step(model, optimizer, seed) for seed in range(3)])) == 1


def test_without_a_prelaunch_it_is_gradients_that_are_missing(tmp_path):
    [told] = said(trainer(tmp_path, adapted(prelaunch_steps=0), callbacks=[], max_steps=3).train)
    assert "identify_from_gradients(model, batches) before the first step" in told


def test_an_adapter_that_was_loaded_to_go_on_with(tmp_path):
    model = adapted()
    tiny.train(model, 2)
    assert len(said(lambda: model.save_pretrained(tmp_path))) == 1
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    optimizer = torch.optim.SGD(trained(again), lr=1e-2)
    [told] = said(lambda: [step(again, optimizer, seed) for seed in range(2)])
    assert "nobody counted" in told
    assert "train longer" not in told


def test_two_adapters_of_which_one_is_trained():
    model = adapted()
    model.add_adapter("other", tiny.config(prelaunch_steps=50))
    model.set_adapter("other")
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    [told] = said(lambda: [step(model, optimizer, seed) for seed in range(3)])
    assert "'other'" in told


# Nothing is said where steps are counted, however they are taken.


def test_with_the_callback(tmp_path):
    assert said(trainer(tmp_path, adapted(prelaunch_steps=2), callbacks=[TsdCallback()], max_steps=4).train) == []


@pytest.mark.parametrize("first", [True, False], ids=["before zero_grad", "after the whole step"])
def test_a_loop_that_advances(first):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)

    def run() -> None:
        for seed in range(4):
            step(model, optimizer, seed, lambda: first and advance(model, optimizer))
            if not first:
                advance(model, optimizer)

    assert said(run) == []


def test_two_optimizers_that_step_one_after_the_other():
    model = adapted()
    parameters = trained(model)
    both = [torch.optim.SGD(parameters[::2], lr=1e-2), torch.optim.AdamW(parameters[1::2], lr=1e-2)]

    def run() -> None:
        for seed in range(3):
            step(model, both[0], seed, both[1].step)
            advance(model, both)

    assert said(run) == []


def test_an_optimizer_that_steps_in_parts():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)

    def run() -> None:
        for seed in range(3):
            step(model, optimizer, seed, optimizer.step)
            advance(model, optimizer)

    assert said(run) == []


@pytest.mark.parametrize("fused", [True, False])
def test_steps_that_a_scaler_leaves_out(fused):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def run() -> None:
        for seed, overflows in enumerate([True, True, False, False]):
            scaler.scale(tiny.language_loss(model, seed) * (float("inf") if overflows else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            advance(model, optimizer)
            optimizer.zero_grad()

    assert said(run) == []


def test_a_state_that_is_made_by_a_step_which_moves_nothing():
    """As torch.distributed.checkpoint makes one to load into."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state
    assert said(lambda: step(model, optimizer, 0, lambda: advance(model, optimizer))) == []


def test_what_is_no_adapter_in_prelaunch():
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    assert said(lambda: [step(model, optimizer, seed) for seed in range(3)]) == []
    model = adapted(prelaunch_steps=1)
    tiny.train(model, 1)
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    assert said(lambda: [step(model, optimizer, seed) for seed in range(3)]) == []
