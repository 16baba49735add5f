"""docs/many-gpus.md has the table that its command prints, of shapes that are LLaMA's."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_tsd import TsdConfig
from peft_tsd.tuner.layer import TsdLayer
from support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import many_gpus

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def test_the_page_has_the_table_that_the_command_prints():
    command = [sys.executable, str(ROOT / "benchmarks" / "many_gpus.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.count("\n") == 14
    assert printed in (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", many_gpus.MODELS, ids=lambda model: model.name)
def test_its_bytes_are_those_of_a_model_of_this_shape(model):
    config = LlamaConfig(
        vocab_size=32000 if model.name == "7B" else 128256 if model.name == "405B" else 32000 * 4,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=1,
        num_attention_heads=model.hidden // 128,
        num_key_value_heads=model.kv // 128,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
        block = sum(p.numel() for p in base.model.layers.parameters())
        rest = sum(p.numel() for p in base.parameters()) - block
        settings = TsdConfig(r=8, num_directions=8, target_modules=TARGETS, prelaunch_steps=9)
        adapted = get_peft_model(base, settings, low_cpu_mem_usage=True)
    assert model.layers * block + rest == pytest.approx(model.parameters, rel=0.01)
    layers = [layer for layer in adapted.modules() if isinstance(layer, TsdLayer)]
    assert [tuple(layer.matrix_shape) for layer in layers] == model._replace(layers=1).weights()
    one = many_gpus.row(model, 1)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert one.adapter == pytest.approx(16 * trained * model.layers)
    held = sum(b.nbytes for layer in layers for name, b in layer.fixed("default").named_buffers() if b.ndim == 2)
    assert one.directions == pytest.approx(held * model.layers)
