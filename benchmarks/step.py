"""Does a training step cost more than LoRA's?

    python benchmarks/step.py                     # CPU, 1024-wide Llama blocks in float32
    python benchmarks/step.py --device cuda       # GPU, blocks of LLaMA-7B's shapes in bfloat16
    python benchmarks/step.py --dropout 0.05

Every method, in pre-launch and after its transition (`kept`: with what pre-launch learned), beside PEFT's LoRA of the
same rank, PEFT's DoRA and the dense form of the dash, `W + s·B·A + U·diag(Δσ)·Vᵀ` with the last term multiplied out at
every step. All are trained in one process on copies of one model, one step each in turn, so that what else the machine
does falls on all alike. Reported: the median over rounds of the time of a step (forward, backward, AdamW) divided by
LoRA's in the same round, with its quartiles; and the peak of the memory allocated during a step, over LoRA's. The row
"base" is what no adapter can go below: the same model with nothing but a rank-1 LoRA in front, so that gradients flow
through all of it. `--inference` times the forward pass alone, unmerged, against a LoRA of rank r + s; `--compile`
compares compiled with compiled.

The directions are random orthonormal ones: a step costs the same whichever they are.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaModel

from peft_tsd import TsdConfig, __version__
from peft_tsd.directions import TaskSpecificDirections
from peft_tsd.tuner.directed import Identified
from peft_tsd.tuner.layer import TsdLayer

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def base_model(device: str) -> LlamaModel:
    torch.manual_seed(0)
    if device == "cuda":
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4}
    else:
        shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 2}
    model = LlamaModel(LlamaConfig(vocab_size=128, **shape))
    return model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)


class DenseDash(nn.Module):
    """The dash as published: a dense product of the frozen directions in every forward pass."""

    def __init__(self, lora: LoraLinear, num_directions: int) -> None:
        super().__init__()
        self.lora = lora
        out, inner = lora.get_base_layer().weight.shape
        self.u = nn.Parameter(orthonormal(out, num_directions), requires_grad=False)
        self.v = nn.Parameter(orthonormal(inner, num_directions).mT.contiguous(), requires_grad=False)
        self.delta_sigma = nn.Parameter(torch.zeros(num_directions))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = self.u @ torch.diag(self.delta_sigma) @ self.v
        dropped = self.lora.lora_dropout["default"](x)
        return self.lora(x) + F.linear(dropped, dense.to(x.dtype))


def orthonormal(size: int, num: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, num)).Q


def peft_lora(base: nn.Module, rank: int, dropout: float, **changes: object) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=TARGETS, **changes)
    return get_peft_model(base, config)


def dense_dash(base: nn.Module, rank: int, dropout: float) -> nn.Module:
    model = peft_lora(base, rank, dropout)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                setattr(parent, name, DenseDash(child, 8).to(child.get_base_layer().weight.device))
    return model


def tsd(base: nn.Module, rank: int, dropout: float, method: str, moved: bool, keep: bool) -> nn.Module:
    config = TsdConfig(
        keep_prelaunch=keep,
        method=method,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=dropout,
        target_modules=TARGETS,
        prelaunch_steps=10**9,
    )
    model = get_peft_model(base, config)
    if moved:
        for layer in model.modules():
            if isinstance(layer, TsdLayer):
                fill(layer, rank)
    return model


def fill(layer: TsdLayer, rank: int) -> None:
    out, inner = layer.weight_matrix().shape
    u, v, n = orthonormal(out, 16), orthonormal(inner, 16), len(layer.fixed("default").indices)
    chosen = TaskSpecificDirections(torch.arange(n), torch.ones(n), u[:, :8], torch.ones(n), v[:, :8])
    layer.fill("default", Identified(chosen, None, v[:, :rank].mT.contiguous(), u[:, :rank].contiguous()))


def contenders(rank: int, dropout: float) -> dict[str, Callable[[nn.Module], nn.Module]]:
    table: dict[str, Callable[[nn.Module], nn.Module]] = {
        "PEFT LoRA": lambda base: peft_lora(base, rank, dropout),
        "base": lambda base: get_peft_model(base, LoraConfig(r=1, target_modules=r".*\.0\.self_attn\.[qkv]_proj")),
        "PEFT DoRA": lambda base: peft_lora(base, rank, dropout, use_dora=True),
        "dense dash": lambda base: dense_dash(base, rank, dropout),
    }
    for method, keep in (("lora-dash", False), *itertools.product(("lora-init", "lora-tsd"), (False, True))):
        for moved, phase in ((False, "pre-launch"), (True, "dash")):
            name = f"{method}{' kept' * keep}, {phase}"
            table[name] = lambda base, how=(method, moved, keep): tsd(base, rank, dropout, *how)
    return table


class Contender:
    """A model, its optimizer and the seconds of each of its steps."""

    def __init__(self, model: nn.Module, compiled: bool, inference: bool) -> None:
        self.model = model.train(not inference)
        self.inference = inference
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.seconds: list[float] = []

    def step(self, inputs: torch.Tensor) -> None:
        if self.inference:
            with torch.no_grad():
                self.forward(inputs_embeds=inputs)
            return
        self.forward(inputs_embeds=inputs).last_hidden_state.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self, inputs: torch.Tensor) -> None:
        synchronize(inputs)
        start = time.perf_counter()
        self.step(inputs)
        synchronize(inputs)
        self.seconds.append(time.perf_counter() - start)

    def memory(self, inputs: torch.Tensor) -> int:
        """Peak bytes allocated during a step, beyond what was allocated before it."""
        if inputs.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(inputs)
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step(inputs)
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(itertools.accumulate(change for _, change in changes))


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=20, help="timed rounds (default 20)")
    parser.add_argument("--tokens", type=int, nargs=2, default=None, metavar=("BATCH", "LENGTH"))
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) every contender")
    parser.add_argument("--inference", action="store_true", help="time the forward pass alone, unmerged")
    parser.add_argument("--only", default="", help="only contenders whose name holds this, and LoRA")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    batch, length = args.tokens or ((8, 512) if args.device == "cuda" else (4, 128))
    base = base_model(args.device)
    table = {n: m for n, m in contenders(args.rank, args.dropout).items() if args.only in n or n == "PEFT LoRA"}
    if args.inference:
        table["PEFT LoRA"] = lambda base: peft_lora(base, args.rank + 8, args.dropout)
    # One base for all: the frozen weights are shared, so that memory and caches are the same for each.
    rows = {name: Contender(make(share(base)), args.compile, args.inference) for name, make in table.items()}
    dtype = next(base.parameters()).dtype
    inputs = torch.randn(batch, length, base.config.hidden_size, device=args.device, dtype=dtype)
    for _ in range(3):
        for row in rows.values():
            row.step(inputs)
    gc.collect()
    gc.disable()
    # In another order every round: what a step costs depends on what the one before it left in caches and heap.
    order, shuffle = list(rows.values()), random.Random(0).shuffle
    for i in range(args.steps):
        shuffle(order)
        for row in order:
            row.timed_step(inputs)
        print(f"\rround {i + 1} of {args.steps}", end="", file=sys.stderr)
    gc.enable()
    print(file=sys.stderr)

    lora = rows["PEFT LoRA"]
    kept = lora.memory(inputs)
    results = {}
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(row.seconds, lora.seconds)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {
            "ms": 1000 * statistics.median(row.seconds),
            "time": middle,
            "quartiles": [low, high],
            "memory": row.memory(inputs) / kept,
        }
    setting = {
        "machine": machine(args.device),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
        | {"peft_tsd": __version__},
        "model": f"{base.config.num_hidden_layers} Llama blocks, {base.config.hidden_size} wide, {dtype}",
        **{key: value for key, value in vars(args).items() if key != "out"},
        "tokens": [batch, length],
    }
    print(
        f"{setting['machine']}; {setting['model']}; {batch} x {length} tokens, r {args.rank}, dropout {args.dropout}"
    )
    print(f"{'':24} {'ms a step':>10} {'/ LoRA':>8} {'quartiles':>15} {'memory / LoRA':>14}")
    for name, row in results.items():
        low, high = row["quartiles"]
        print(f"{name:24} {row['ms']:10.1f} {row['time']:8.3f} {low:8.3f}-{high:.3f} {row['memory']:14.3f}")
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")


def share(base: LlamaModel) -> LlamaModel:
    """A new model around the same weights."""
    with torch.device("meta"):
        twin = LlamaModel(base.config)
    twin.load_state_dict(base.state_dict(), assign=True)
    twin.rotary_emb = base.rotary_emb
    return twin.to(next(base.parameters()).device)


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
