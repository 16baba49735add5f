"""Optimizers that LoRA is trained with, over the transition."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainerState

from peft_tsd import TsdCallback, advance
from peft_tsd.tuner.phase import adapted_layers, steps_taken
from support import tiny

schedulefree = pytest.importorskip("schedulefree")
METHOD = Path(__file__).parents[2] / "docs" / "method.md"


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


FREE = {
    "SGD in a wrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
    "Adagrad in a wrapper": lambda p: schedulefree.ScheduleFreeWrapper(torch.optim.Adagrad(p, lr=1e-2)),
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=1e-2),
}


@pytest.mark.parametrize("kind", FREE)
@pytest.mark.parametrize("method", ["lora-init", "lora-tsd"])
def test_schedule_free(kind, method):
    model = get_peft_model(tiny.llama(), tiny.config(method, prelaunch_steps=2))
    optimizer = FREE[kind](trained(model))
    optimizer.train()
    tiny.train(model, 5, optimizer=optimizer)
    assert model.phase() == "dash"
    assert steps_taken(adapted_layers(model, "default"), "default") == 5
    optimizer.eval()
    assert all(torch.isfinite(p).all() for p in trained(model))


def blocks() -> list[str]:
    section = METHOD.read_text(encoding="utf-8").partition("## Optimizers")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_muon_as_the_docs_say():
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        torch.optim.Muon(trained(get_peft_model(tiny.llama(), tiny.config())), lr=1e-3)
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    names = {"torch": torch, "model": model, "advance": advance}
    build, _, call = blocks()[0].partition("...\n")
    exec(build, names)
    for step in range(4):
        tiny.language_loss(model, step).backward()
        names["muon"].step(), names["scalars"].step()
        model.zero_grad()
        exec(call, names)
    assert model.phase() == "dash"
    assert steps_taken(adapted_layers(model, "default"), "default") == 4


def test_lora_plus_is_refused_before_training_and_works_as_the_docs_say():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    message = r"Δσ in the group of B, whose learning rate is 0\.0016, where A's is 0\.0001"
    with pytest.raises(ValueError, match=message):
        advance(model, optimizer)
    with pytest.raises(ValueError, match=message):
        TsdCallback().on_train_begin(None, TrainerState(max_steps=9), None, model=model, optimizer=optimizer)
    names = {"torch": torch, "model": model, "create_loraplus_optimizer": create_loraplus_optimizer}
    exec(blocks()[1], names)
    tiny.train(model, 4, optimizer=names["optimizer"])
    assert model.phase() == "dash"
    # LoRA-Init has no Δσ, and takes it as it is.
    model = get_peft_model(tiny.llama(), tiny.config("lora-init", prelaunch_steps=2))
    tiny.train(model, 3, optimizer=create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16))
    assert model.phase() == "dash"
