"""The README's code runs as printed."""

import re
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_tsd import TsdConfig
from support import tiny
from support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(containing: str) -> str:
    return next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in code)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [{"input_ids": tiny.tokens(1, 9, seed=i)[0], "labels": tiny.tokens(1, 9, seed=i)[0]} for i in range(8)]
    args = TrainingArguments("out", max_steps=102, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    return {"base": tiny.llama(), "args": args, "data": data, "Trainer": Trainer}


def test_the_trainer_snippet(names, tmp_path):
    exec(block("callbacks=[TsdCallback()]"), names)
    assert names["model"].phase() == "dash"
    expected = names["model"].eval()(tiny.tokens()).logits
    for folder in ("adapter", "adapter-lora"):
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / folder)
        torch.testing.assert_close(loaded(tiny.tokens()).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_snippet_of_a_loop_of_ones_own():
    model = get_peft_model(tiny.llama(), TsdConfig(r=4, target_modules=tiny.LLAMA_TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batches = iter([{"input_ids": ids, "labels": ids} for ids in (tiny.tokens(2, 9), tiny.tokens(2, 9, seed=1))])
    loss = SimpleNamespace(backward=lambda: tiny.language_loss(model, 0).backward())
    exec(
        block("advance(model, optimizer)"),
        {"model": model, "optimizer": optimizer, "batches": batches, "loss": loss},
    )
    assert model.phase() == "dash"


def test_the_snippet_of_the_definitions():
    weight = torch.randn(6, 9)
    names = {"weight": weight, "tuned_weight": weight + 1, "lora_B": torch.randn(6, 2), "lora_A": torch.randn(2, 9)}
    exec(block("task_specific_directions"), names)
    assert names["rates"].shape == (6,)
    assert len(names["found"].indices) == 6
