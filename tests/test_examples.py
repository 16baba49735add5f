"""The examples run as they are: each a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_tsd import TsdConfig
from support.places import ROOT
from support.waiting import PATIENCE

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.long


def run(name: str, *words: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def exported(folder: Path) -> PeftModel:
    """The example's export on its base, and that it is one of an adapter that has learned along directions."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import stand_in
    finally:
        sys.path.remove(str(EXAMPLES))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        native = PeftModel.from_pretrained(stand_in.load(None)[0], str(folder / "adapter")).eval()
        assert isinstance(native.peft_config["default"], TsdConfig)
        assert native.phase() == "dash"
        plain = PeftModel.from_pretrained(stand_in.load(None)[0], str(folder / "adapter-lora")).eval()
        torch.testing.assert_close(plain(ids).logits, native(ids).logits, rtol=1e-5, atol=1e-6)
        assert not torch.equal(plain(ids).logits, stand_in.load(None)[0].eval()(ids).logits)
    return plain


def test_the_trainer_and_serving_what_it_made(tmp_path):
    assert "highest change rate first" in run("trainer.py", "--out", tmp_path / "sums", "--steps", 12)
    exported(tmp_path / "sums")
    said = run("serve.py", tmp_path / "sums" / "adapter-lora")
    rank = json.loads((tmp_path / "sums" / "adapter-lora" / "adapter_config.json").read_text())["r"]
    limit = 8 if rank <= 8 else 16 if rank <= 16 else 32
    assert f"vllm serve BASE --enable-lora --max-lora-rank {limit} --lora-modules sums=" in said
    assert f"--max-lora-rank {rank} --lora-paths sums=" in said
    assert "Export anew" not in said


def test_trl(tmp_path):
    pytest.importorskip("trl")
    run("sft.py", "--out", tmp_path, "--steps", 6)
    exported(tmp_path)


def test_a_loop_with_accelerate(tmp_path):
    assert "model.layers.0.self_attn.q_proj" in run("accelerate_loop.py", "--out", tmp_path, "--epochs", 2)
    exported(tmp_path)


def test_diffusers_own_script(tmp_path):
    pytest.importorskip("diffusers")
    assert "plain LoRA of rank" in run("dreambooth_script.py", "--out", tmp_path, "--steps", 6)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["picture.png", "pytorch_lora_weights.safetensors"]


def test_the_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = EXAMPLES / "explore.ipynb"
    assert path.stat().st_size < 50_000, "strip the outputs but for a few lines of text"
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=int(PATIENCE), kernel_name="python3", resources=resources).execute()
    texts = ["".join(out.get("text", "") for out in cell.get("outputs", [])) for cell in notebook.cells]
    assert any("model.layers.1.mlp.down_proj" in text for text in texts)
    assert any("report.html" in text for text in texts)
